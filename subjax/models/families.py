"""Families by name: an architecture is a mapping from a name and a size to a `DecoderConfig`, and nothing else.

To add a family, add one entry to `FAMILIES`; to add a size, one entry to `SIZES`.
"""

import dataclasses
import difflib

from subjax.errors import UsageError
from subjax.models.architecture import DecoderConfig
from subjax.schema import Numerics


@dataclasses.dataclass(frozen=True)
class Size:
    """A named size: width of the residual stream, layers, heads, and the feed-forward widths by gating."""

    width: int
    layers: int
    heads: int
    hidden: int  # of a family with two feed-forward matrices
    hidden_gated: int  # of a family with three, so that both have about as many parameters


SIZES = {
    "nano": Size(16, 2, 2, 32, 24),  # for tests
    "tiny": Size(32, 2, 2, 128, 96),
    "small": Size(64, 4, 4, 256, 176),
}

FAMILIES: dict[str, dict] = {
    "gpt": dict(
        family="gpt2",
        norm="layernorm",
        norm_eps=1e-5,
        positions="learned",
        activation="gelu",
        gated=False,
        attention_biases="all",
        mlp_biases=True,
        tied=True,
    ),
    "llama": dict(
        family="llama", norm="rmsnorm", norm_eps=1e-5, positions="rotary", activation="silu", gated=True, tied=False
    ),
    # Llama with biases in its linear layers, and tied: so that both toy families have a like tunable part.
    "llama-bias": dict(
        family="llama",
        norm="rmsnorm",
        norm_eps=1e-5,
        positions="rotary",
        activation="silu",
        gated=True,
        attention_biases="all",
        mlp_biases=True,
        tied=True,
    ),
}


def _pick(table: dict, name: str, what: str):
    if name not in table:
        near = difflib.get_close_matches(name, table, 1, 0.0)
        raise UsageError(f"unknown {what} {name!r}; did you mean {near[0]!r}? (known: {', '.join(table)})")
    return table[name]


def decoder_config(family: str, size: str, *, vocab: int, length: int, numerics: Numerics) -> DecoderConfig:
    """The config of a family at a named size.

    Raises:
        UsageError: the family or the size is unknown; the nearest one is named.
    """
    shape, style = _pick(SIZES, size, "size"), _pick(FAMILIES, family, "model family")
    return DecoderConfig(
        vocab=vocab,
        length=length,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        hidden=shape.hidden_gated if style["gated"] else shape.hidden,
        dtype=numerics.dtype,
        matmul_precision=numerics.matmul_precision,
        attention=numerics.attention,
        **style,
    )
