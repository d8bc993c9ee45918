"""How a cache keeps keys and values: as numbers of a dtype, or as int8 codes with a scale for each vector.

A code is a number over its vector's scale, rounded to the nearest of -127..127; the scale is the largest absolute value
of the vector over 127 (Dettmers et al. 2022, section 2: vector-wise quantization; here a vector is one token's key or
value of one head). A vector's codes are made of it alone, so they do not depend on what stands beside it. The scales of
keys multiply the scores, and those of values the weights: a product is never of anything but the codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

MOST = 127  # codes are symmetric


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Vectors as codes, with a scale each: `scales` is shaped as `codes`, but of size 1 along the vectors' own axis."""

    codes: Int8[Array, "..."]
    scales: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is kept."""
        return self.codes.shape


Kept = jax.Array | Quantized


def zeros(shape: tuple[int, ...], dtype: str, axis: int) -> Kept:
    """Zeros of `shape`, kept as `dtype` asks ("int8": codes of the vectors along `axis`)."""
    if dtype != "int8":
        return jnp.zeros(shape, dtype)
    one = list(shape)
    one[axis] = 1
    return Quantized(jnp.zeros(shape, "int8"), jnp.zeros(one, "float32"))


def as_in(x: Array, like: Kept, axis: int) -> Kept:
    """`x`, with its vectors along `axis`, kept in the way that `like` is."""
    if not isinstance(like, Quantized):
        return x.astype(like.dtype)
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis, keepdims=True) / MOST
    codes = jnp.rint(x / jnp.where(scales > 0, scales, 1.0)).astype("int8")
    return Quantized(codes, scales)


def factors(kept: Kept, axes: str, dtype: Any) -> tuple[Array, Array | None]:
    """What stands in a product in the dtype of the computation, and what each column of its result is multiplied with.

    `axes` names those of `kept`: "d" is a vector's own, "t" the columns, "k" heads and, where there are any, "b" rows.
    The factor is (rows or 1, heads, 1, 1, columns): the axes of one are those of queries. None where there is none.
    """
    if not isinstance(kept, Quantized):
        return kept.astype(dtype), None
    scales = jnp.squeeze(kept.scales, axes.index("d"))[..., None, None, :]
    return kept.codes.astype(dtype), scales if "b" in axes else scales[None]


def bytes_a_number(dtype: str, dim: int) -> float:
    """Bytes that a number takes of vectors of `dim` numbers, kept as `dtype` asks."""
    return 1 + 4 / dim if dtype == "int8" else jnp.dtype(dtype).itemsize
