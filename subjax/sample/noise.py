"""Gumbel noise as `jax.random.gumbel` makes it, bit for bit, in one pass over the vocabulary.

On CPU JAX's own threefry runs its rounds as a loop, with an array of the vocabulary's size written and read in each:
for 64 rows of 49,152 tokens it took a fifth of a decoding step. Written out the rounds fuse with what follows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def gumbel(keys: Array, index: Int[Array, "..."], size: int) -> Float[Array, "batch size"]:
    """For each key jax.random.gumbel(fold_in(key, index), (size,)); `index` is one for all keys, or one for each."""
    folded = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(index, keys.shape))
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if str(jax.random.key_impl(keys)) != "threefry2x32" or not partitionable:
        return jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(folded)
    words = jax.random.key_data(folded)
    places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.uint32), (len(words), size))
    first, second = _threefry(words[:, :1], words[:, 1:], jnp.zeros_like(places), places)
    bits = first ^ second
    # A float in [1, 2) by its mantissa, less 1; and never 0, of which there is no logarithm.
    unit = jax.lax.bitcast_convert_type((bits >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(unit, np.finfo(np.float32).tiny)))


def _threefry(
    a: UInt32[Array, "batch 1"], b: UInt32[Array, "batch 1"], x: UInt32[Array, "batch n"], y: UInt32[Array, "batch n"]
) -> tuple[UInt32[Array, "batch n"], UInt32[Array, "batch n"]]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.2) of the counters (x, y) under the key (a, b)."""
    keys = (a, b, a ^ b ^ np.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y
