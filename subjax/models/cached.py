"""Decoding with a cache: a prompt's keys and values are kept, and each further token attends to them.

Functions of a `Network` and its plain parameters, as its methods are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subjax.models.network import Adapter, Network, positions_of


class Cache(NamedTuple):
    """Keys and values of every layer, (layers, batch, slots, kv_heads, head_dim), and which slots hold a token."""

    k: jax.Array
    v: jax.Array
    valid: jax.Array


def prefill(
    net: Network,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
    *,
    slots: int,
    cache_dtype: str = "float32",
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Logits after the last position, and a cache of `slots` ≥ length slots whose first `length` are filled."""
    decoder, graphdef, blocks = net._decoder(params)
    positions = positions_of(valid)
    x = decoder.embedded(tokens, positions)
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & valid[:, None]
    view = net._view(decoder, positions, positions, causal)

    def body(x: Array, layer: tuple) -> tuple[Array, tuple[Array, Array]]:
        block, local, lora = layer
        x, k, v = net._attend(nnx.merge(graphdef, block), x, view, local, lora)
        return x, (k.astype(cache_dtype), v.astype(cache_dtype))

    x, (k, v) = jax.lax.scan(body, x, (blocks, net._local, adapter or {}))
    room = slots - tokens.shape[1]
    grow = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))  # noqa: E731
    cache = Cache(grow(k), grow(v), jnp.pad(valid, ((0, 0), (0, room))))
    return decoder.logits(x[:, -1:])[:, 0], cache


def step(
    net: Network,
    params: Mapping[str, jax.Array],
    token: Int[Array, " batch"],
    slot: Int[Array, ""],
    cache: Cache,
    *,
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Write `token` into `slot` of the cache (the same slot for every row) and return the logits after it."""
    decoder, graphdef, blocks = net._decoder(params)
    valid = jax.lax.dynamic_update_slice(cache.valid, jnp.ones((token.shape[0], 1), bool), (0, slot))
    positions = jnp.maximum(valid.sum(1, keepdims=True) - 1, 0)
    x = decoder.embedded(token[:, None], positions)
    view = net._view(decoder, positions_of(valid), positions, valid[:, None])

    def body(carry: tuple[Array, Array, Array], layer: tuple) -> tuple[tuple[Array, Array, Array], None]:
        x, k_all, v_all = carry
        index, block_params, local, lora = layer
        block = nnx.merge(graphdef, block_params)
        turn, mask = view.of(local)
        y = block.enter(x)
        k, v = block.attention.keys_values(y, turn, lora)
        # Carried whole and updated in place: stacking each layer's cache anew would copy it every step.
        k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), (index, 0, slot, 0, 0))
        v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), (index, 0, slot, 0, 0))
        q = block.attention.queries(y, turn, lora)
        attended = block.attention.mix(q, k_all[index], v_all[index], mask, lora)
        return (block.finish(x, attended, lora), k_all, v_all), None

    indices = jnp.arange(net.config.layers)
    layers = (indices, blocks, net._local, adapter or {})
    (x, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), layers)
    return decoder.logits(x)[:, 0], Cache(k, v, valid)
