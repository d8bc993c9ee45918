"""A second decoder, in numpy and float64, written from the papers and not from `subjax.models`: it has no padding, no
mask, no cache, no batch and no scan, so what it agrees with cannot be wrong in the same way.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from subjax.models.architecture import DecoderConfig
from subjax.models.network import Network


def random_params(net: Network, seed: int) -> dict[str, np.ndarray]:
    """Parameters with nothing at its initial zero or one, so that a bias or gain that is left out shows.

    Matrices have variance 1 / inputs: much larger ones would blow rounding up layer by layer.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for name, d in net.declarations.items():
        center = 1.0 if d.role == "gain" else 0.0
        inputs = np.prod(d.shape[1:-1] if name.endswith("o/kernel") else d.shape[1:2])
        std = float(inputs) ** -0.5 if name.endswith("kernel") else 0.3
        out[name] = (center + rng.normal(0, std, d.shape)).astype(np.float32)
    return out


def _norm(config: DecoderConfig, params: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    if config.norm == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return y * params[f"{name}/gain"] + params[f"{name}/bias"]
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * params[f"{name}/gain"]


def _linear(params: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """x (length, inputs) times the kernel laid out as a matrix; biases flat."""
    kernel = params[f"{name}/kernel"]
    y = x @ kernel.reshape(x.shape[-1], -1)
    return y + params[f"{name}/bias"].reshape(-1) if f"{name}/bias" in params else y


def _rotate(config: DecoderConfig, x: np.ndarray) -> np.ndarray:
    """Turn each pair (i, i + dim/2) of the last axis of (length, heads, dim) by position x theta^(-2i/dim)."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    turn = np.arange(len(x))[:, None] * config.rope.theta ** (-2 * np.arange(half) / x.shape[-1])
    pairs = pairs * np.exp(1j * turn)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _attention(config: DecoderConfig, params: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    length, dim = len(x), config.head_dim
    q, k, v = (_linear(params, f"attention/{n}", x).reshape(length, -1, dim) for n in "qkv")
    if config.positions == "rotary":
        q, k = _rotate(config, q), _rotate(config, k)
    out = np.zeros_like(q)
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        for i in range(length):
            scores = k[: i + 1, shared] @ q[i, head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v[: i + 1, shared] / weights.sum()
    return _linear(params, "attention/o", out.reshape(length, -1))


def _feed_forward(config: DecoderConfig, params: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def activate(y: np.ndarray) -> np.ndarray:
        if config.activation == "silu":
            return y / (1 + np.exp(-y))
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    up = _linear(params, "mlp/up", x)
    inner = activate(_linear(params, "mlp/gate", x)) * up if config.gated else activate(up)
    return _linear(params, "mlp/down", inner)


def logits(config: DecoderConfig, params: Mapping[str, np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Logits after each token of one row without padding, (length, vocab), float64."""
    wide = {n: np.asarray(p, np.float64) for n, p in params.items()}
    x = wide["embed"][np.asarray(tokens)]
    if config.positions == "learned":
        x = x + wide["position"][: len(x)]
    for layer in range(config.layers):
        block = {n.removeprefix("blocks/"): p[layer] for n, p in wide.items() if n.startswith("blocks/")}
        x = x + _attention(config, block, _norm(config, block, "norm1", x))
        x = x + _feed_forward(config, block, _norm(config, block, "norm2", x))
    return _norm(config, wide, "norm", x) @ wide["embed" if config.tied else "head"].T


def log_probabilities(config: DecoderConfig, params: Mapping[str, np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities of the next token after each token of one row, (length, vocab), float64."""
    scores = logits(config, params, tokens)
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
