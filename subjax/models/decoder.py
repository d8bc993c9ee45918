"""One decoder for every decoder family, chosen by a frozen config.

Flax NNX owns the declarations: each parameter is declared once, with its shape, its logical axes, its initializer and
its role, and the abstract tree, the shardings and the real initialization all derive from that line. The layers of a
stack are one parameter with a leading `layers` axis, and the forward pass scans over it, so compile time does not grow
with depth. Outside this package only (graphdef, plain arrays) travel: see `subjax.models.network`.
"""

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subjax.models.architecture import DecoderConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
NEGATIVE = -1e30  # stands for minus infinity in attention scores: a row with no valid key stays finite


def _normal(std: float) -> Initializer:
    return jax.nn.initializers.normal(std)


_ZEROS: Initializer = jax.nn.initializers.zeros
_ONES: Initializer = jax.nn.initializers.ones


class Declarer:
    """Turns one line a parameter into an `nnx.Param` whose key is addressed by its name, not by the order of lines."""

    def __init__(self, key: jax.Array, prefix: str, layers: int | None = None):
        self._key, self._prefix, self._layers = key, prefix, layers

    def __call__(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, role: str = "weight"
    ) -> nnx.Param:
        """Declare one parameter of `shape` with one logical axis a dimension; a stack gets its `layers` axis here."""
        if self._layers is not None:
            shape, axes = (self._layers, *shape), ("layers", *axes)
        key = jax.random.fold_in(self._key, zlib.crc32(f"{self._prefix}/{name}".encode()))
        return nnx.Param(init(key, shape, jnp.dtype("float32")), axes=axes, role=role)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, config: DecoderConfig, declare: Declarer, name: str):
        self.config = config
        self.gain = declare(f"{name}/gain", (config.width,), ("embed",), _ONES, "gain")
        if config.norm == "layernorm":
            self.bias = declare(f"{name}/bias", (config.width,), ("embed",), _ZEROS, "bias")

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """Normalize the last axis; the result has the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.config.norm == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.norm_eps)
        y = y * self.gain[None, None]
        if self.config.norm == "layernorm":
            y = y + self.bias[None, None]
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """A matrix product over the last axes of `x`, with an optional bias and an optional low-rank update."""

    def __init__(
        self, config: DecoderConfig, declare: Declarer, name: str, inputs: dict[str, int], outputs: dict[str, int],
        scale: float = 1.0, bias_role: str = "bias",
    ):  # fmt: skip
        self.config, self.n_in = config, len(inputs)
        std = scale / math.prod(inputs.values()) ** 0.5
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        self.kernel = declare(f"{name}/kernel", shape, axes, _normal(std))
        if config.biases:
            self.bias = declare(f"{name}/bias", tuple(outputs.values()), tuple(outputs), _ZEROS, bias_role)

    def __call__(self, x: Array, adapter: dict[str, Array] | None = None) -> Array:
        """Map (batch, length, *inputs) to (batch, length, *outputs); `adapter` holds LoRA's `a`, `b` and `scale`."""
        dtype, n = x.dtype, self.n_in
        contract = (tuple(range(2, 2 + n)), tuple(range(n)))
        product = lambda u, w, dims: jax.lax.dot_general(  # noqa: E731
            u, w.astype(dtype), (dims, ((), ())), precision=self.config.matmul_precision
        )
        y = product(x, self.kernel[...], contract)
        if adapter is not None:
            low = product(x, adapter["a"], contract)
            y = y + product(low, adapter["b"], ((2,), (0,))) * adapter["scale"].astype(dtype)
        if self.config.biases:
            y = y + self.bias[...].astype(dtype)[None, None]
        return y


class Rotation(NamedTuple):
    """Cosines and signed sines of rotary positions (Su et al. 2021), each (batch, length, 1, head_dim), float32."""

    cos: Array
    sin: Array

    def last(self, length: int) -> "Rotation":
        """The rotation at the last positions."""
        return Rotation(self.cos[:, -length:], self.sin[:, -length:])


def rotation(positions: Int[Array, "batch length"], dim: int, theta: float) -> Rotation:
    """The rotation of heads of size `dim` at these positions, in the half-split layout; once for all layers."""
    half = dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return Rotation(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def rotate(x: Float[Array, "batch length heads dim"], by: Rotation | None) -> Array:
    """Turn each pair (i, i + dim / 2) of a head by its angle, in float32; None leaves `x` as it is.

    Written with a roll, since halves split off and joined again are slower on CPU (`benchmarks/cpu_choices.py`).
    """
    if by is None:
        return x
    y = x.astype(jnp.float32)
    return (y * by.cos + jnp.roll(y, x.shape[-1] // 2, -1) * by.sin).astype(x.dtype)


@jax.custom_vjp
def softmax(scores: Float[Array, "*rows keys"]) -> Float[Array, "*rows keys"]:
    """Softmax over the last axis.

    Its own gradient, because XLA's CPU back end runs the fused product and sum of the usual one along a short last axis
    without vector instructions; written as a contraction it is faster (`benchmarks/cpu_choices.py` measures it).
    """
    return jax.nn.softmax(scores, axis=-1)


def _softmax_forward(scores: Array) -> tuple[Array, Array]:
    p = jax.nn.softmax(scores, axis=-1)
    return p, p


def _softmax_backward(p: Array, gradient: Array) -> tuple[Array]:
    inner = jnp.einsum("...t,...t->...", p, gradient, precision="highest")
    return (p * (gradient - inner[..., None]),)


softmax.defvjp(_softmax_forward, _softmax_backward)


class Attention(nnx.Module):
    """Causal attention with grouped key-value heads (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, declare: Declarer, out_scale: float):
        self.config = config
        width = {"embed": config.width}
        queries = {"heads": config.heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        self.q = Linear(config, declare, "q", width, queries)
        # Without rotation the softmax does not see a bias of the keys: its gradient is zero but for rounding, which
        # Adam would turn into drift. Rotated after it is added, it does act. Its role is its own, so that tuning can
        # leave it out.
        self.k = Linear(config, declare, "k", width, keys, bias_role="key-bias")
        self.v = Linear(config, declare, "v", width, keys)
        self.o = Linear(config, declare, "o", queries, width, out_scale)

    def queries(self, x: Array, turn: Rotation | None, adapter: dict) -> Float[Array, "batch length heads dim"]:
        """Queries of `x`, rotated."""
        return rotate(self.q(x, adapter.get("q")), turn)

    def keys_values(self, x: Array, turn: Rotation | None, adapter: dict) -> tuple[Array, Array]:
        """Keys (rotated) and values of `x`, each (batch, length, kv_heads, head_dim)."""
        return rotate(self.k(x, adapter.get("k")), turn), self.v(x, adapter.get("v"))

    def mix(
        self, q: Array, k: Array, v: Array, mask: Bool[Array, "batch queries keys"], adapter: dict
    ) -> Float[Array, "batch queries width"]:
        """Attend from `q` to `k`, `v` where `mask` holds, softmax in float32, and project back to the width."""
        b, s, h, d = q.shape
        groups = h // self.config.kv_heads
        # Heads before positions, written out: left to the compiler, the products run on strided operands.
        q = q.reshape(b, s, self.config.kv_heads, groups, d).transpose(0, 2, 3, 1, 4)
        k, v = (a.astype(q.dtype).transpose(0, 2, 1, 3) for a in (k, v))
        scores = jnp.einsum("bkgqd,bktd->bkgqt", q, k, precision=self.config.matmul_precision).astype(jnp.float32)
        scores = jnp.where(mask[:, None, None], scores * (d**-0.5), NEGATIVE)
        weights = softmax(scores).astype(q.dtype)
        y = jnp.einsum("bkgqt,bktd->bkgqd", weights, v, precision=self.config.matmul_precision)
        return self.o(y.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d), adapter.get("o"))


class Mlp(nnx.Module):
    """The feed-forward part: two matrices, or three where it is gated (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, declare: Declarer, out_scale: float):
        self.config = config
        width, hidden = {"embed": config.width}, {"mlp": config.hidden}
        if config.gated:
            self.gate = Linear(config, declare, "gate", width, hidden)
        self.up = Linear(config, declare, "up", width, hidden)
        self.down = Linear(config, declare, "down", hidden, width, out_scale)

    def __call__(self, x: Array, adapter: dict) -> Float[Array, "batch length width"]:
        """Apply the feed-forward part to (batch, length, width)."""
        act = jax.nn.silu if self.config.activation == "silu" else jax.nn.gelu  # gelu: the tanh form, as in GPT-2
        up = self.up(x, adapter.get("up"))
        inner = act(self.gate(x, adapter.get("gate"))) * up if self.config.gated else act(up)
        return self.down(inner, adapter.get("down"))


class Block(nnx.Module):
    """One layer (pre-norm), or, with a stacking `Declarer`, all layers along the leading axis."""

    def __init__(self, config: DecoderConfig, declare: Declarer):
        out_scale = (2 * config.layers) ** -0.5
        self.norm1 = Norm(config, declare, "norm1")
        self.attention = Attention(config, declare, out_scale)
        self.norm2 = Norm(config, declare, "norm2")
        self.mlp = Mlp(config, declare, out_scale)

    def finish(self, x: Array, attended: Array, adapter: dict) -> Float[Array, "batch length width"]:
        """Add the attention's output and the feed-forward part to the residual stream."""
        x = x + attended
        return x + self.mlp(self.norm2(x), adapter)


class Decoder(nnx.Module):
    """Embedding, a scanned stack of blocks, a final norm, and the (tied or own) output matrix."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        self.config = config
        top = Declarer(key, "top")
        embed, position, std = ("vocab", "embed"), ("position", "embed"), config.embed_std
        self.embed = top("embed", (config.vocab, config.width), embed, _normal(std), "embedding")
        if config.positions == "learned":
            self.position = top("position", (config.length, config.width), position, _normal(std / 2))
        self.blocks = Block(config, Declarer(key, "blocks", config.layers))
        self.norm = Norm(config, top, "norm")
        if not config.tied:
            self.head = top("head", (config.vocab, config.width), embed, _normal(std))

    def embedded(self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]) -> Array:
        """Token (and learned position) embeddings in the compute dtype, (batch, length, width)."""
        x = self.embed[...][tokens]
        if self.config.positions == "learned":
            x = x + self.position[...][positions]
        return x.astype(self.config.dtype)

    def rotation(self, positions: Int[Array, "batch length"]) -> Rotation | None:
        """How queries and keys at these positions are turned; None where the family's positions are learned."""
        if self.config.positions != "rotary":
            return None
        return rotation(positions, self.config.head_dim, self.config.rope_theta)

    def logits(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length vocab"]:
        """Final norm and output matrix; logits in float32."""
        table = (self.embed if self.config.tied else self.head)[...].astype(x.dtype)
        y = jnp.einsum("bsd,vd->bsv", self.norm(x), table, precision=self.config.matmul_precision)
        return y.astype(jnp.float32)
