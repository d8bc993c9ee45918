"""Rotary positions: the angles of each position, and heads turned by them, in the half-split layout."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from subjax.models.architecture import Rope


class Rotation(NamedTuple):
    """Cosines and signed sines of rotary positions (Su et al. 2021), each (batch, length, 1, rotated), float32."""

    cos: Array
    sin: Array

    def last(self, length: int) -> "Rotation":
        """The rotation at the last positions."""
        return Rotation(self.cos[:, -length:], self.sin[:, -length:])


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians a position of each turned pair, float32."""
    half = int(head_dim * rope.fraction) // 2
    plain = np.float32(rope.theta) ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor)
    if rope.scaling == "llama3":
        # 0 for wavelengths above original / low, which are slowed by the whole factor; 1 below original / high.
        turns = rope.original * plain / (2 * math.pi)
        ramp = np.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        return (plain * (ramp + (1 - ramp) / rope.factor)).astype(np.float32)
    return plain


def rotation(positions: Int[Array, "batch length"], head_dim: int, rope: Rope) -> Rotation:
    """The rotation of heads of size `head_dim` at these positions; made once for all layers."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(rope, head_dim))[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return Rotation(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def rotate(x: Float[Array, "batch length heads dim"], by: Rotation | None) -> Array:
    """Turn each pair (i, i + half) of the turned part of a head by its angle, in float32; None leaves `x` as it is.

    The turned part is a head's beginning; the rest passes. Written with a roll, since halves split off and joined again
    are slower on CPU (`benchmarks/cpu_choices.py`).
    """
    if by is None:
        return x
    turned = by.cos.shape[-1]
    y = x[..., :turned].astype(jnp.float32)
    y = (y * by.cos + jnp.roll(y, turned // 2, -1) * by.sin).astype(x.dtype)
    return y if turned == x.shape[-1] else jnp.concatenate([y, x[..., turned:]], -1)
