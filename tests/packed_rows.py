"""Made-up chats and tiny models for tests of packing, and packed chats taken apart again."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from subjax.models.architecture import DecoderConfig, Rope

ROTARY = DecoderConfig(
    vocab=61, length=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24, norm="rmsnorm", norm_eps=1e-5,
    positions="rotary", activation="silu", gated=True, tied=False,
)  # fmt: skip
LEARNED = dataclasses.replace(
    ROTARY, family="gpt2", norm="layernorm", positions="learned", activation="gelu", gated=False, tied=True,
    attention_biases="all", mlp_biases=True, kv_heads=4,
)  # fmt: skip
# Local layers among global ones, capped scores and logits, norms on both sides: all that packing must tell apart.
LOCAL = dataclasses.replace(
    ROTARY, local=(True, False), window=5, local_rope=Rope(theta=100.0), attention_cap=7.0, logit_cap=5.0,
    placement="sandwich", qk_norm="head", embed_scale=4.0,
)  # fmt: skip
CONFIGS = {"rotary": ROTARY, "learned": LEARNED, "local": LOCAL}


def made_up(count: int, shared: int = 4, seed: int = 0, vocab: int = 61) -> list[tuple[list[int], list[int]]]:
    """Chats of ragged lengths that begin alike."""
    draw = np.random.default_rng(seed)
    begin = draw.integers(1, vocab, shared).tolist()
    some = lambda most: draw.integers(1, vocab, draw.integers(1, most)).tolist()  # noqa: E731
    return [(begin + some(9), some(7)) for _ in range(count)]


def parameters(net, seed: int = 0):
    draw = np.random.default_rng(seed)
    return {n: jnp.asarray(draw.normal(size=d.shape) * 0.3, jnp.float32) for n, d in net.declarations.items()}


def chats_of(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, answer) of every chat of a step's batch (turns, rows, ...); the answer is what the loss falls on."""
    for place in np.ndindex(batch["tokens"].shape[:2]):
        one = {name: array[place] for name, array in batch.items()}
        shared = one["tokens"][one["segments"] == 0].tolist()
        asked = one["at"][one["weights"] > 0] + 1
        assert (one["tokens"][asked] == one["targets"][one["weights"] > 0]).all()
        for segment in np.flatnonzero(one["lengths"]) + 1:
            (own,) = np.nonzero(one["segments"] == segment)
            assert own.tolist() == list(range(own[0], own[0] + one["lengths"][segment - 1]))
            assert own[0] == one["starts"][segment - 1]
            assert one["positions"][own].tolist() == list(range(len(shared), len(shared) + len(own)))
            answer = np.isin(own, asked)
            assert answer.tolist() == sorted(answer.tolist())  # the answer stands at the end
            tokens = one["tokens"][own]
            yield shared + tokens[~answer].tolist(), tokens[answer].tolist()
