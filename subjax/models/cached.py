"""Decoding with a cache: tokens are read once, and each further token attends to their keys and values.

A row's keys and values stand in two parts. A prefix is what all rows begin with, a system prompt and a template: it is
read once and held once. The rest is each row's own, in a ring of columns of which all rows write the same one at a
time; a row's tokens end in the last column that was written, however many it has. So rows that begin at different times
are decoded together, a new row takes the place of one that has ended, and a step writes one slice.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subjax.models.decoder import NEGATIVE, Attention, _capped, softmax
from subjax.models.network import Adapter, Network, positions_of

KeyValue = tuple[jax.Array, jax.Array]


class Prefix(NamedTuple):
    """Keys and values of the tokens that all rows begin with, in the compute dtype.

    Attributes:
        k, v: (layers, kv_heads, columns, head_dim).
        length: how many of the columns hold a token, the first ones.
    """

    k: jax.Array
    v: jax.Array
    length: Int[Array, ""]


class Cache(NamedTuple):
    """Keys and values of each row's own tokens, in a ring of columns.

    Attributes:
        k, v: (layers, rows, kv_heads, columns, head_dim).
        filled: (rows,) how many of the last columns hold a token of the row.
        column: the column that is written next.
    """

    k: jax.Array
    v: jax.Array
    filled: Int[Array, " rows"]
    column: Int[Array, ""]


def empty(net: Network, rows: int, columns: int, dtype: str) -> Cache:
    """A cache whose rows have no token yet."""
    shape = (net.config.layers, rows, net.config.kv_heads, columns, net.config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32), jnp.int32(0))


def read(
    net: Network,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
    *,
    prefix: Prefix | None = None,
    adapter: Adapter | None = None,
    tree: tuple[Int[Array, "batch length"], Bool[Array, "batch length length"]] | None = None,
) -> tuple[Float[Array, "batch length width"], KeyValue]:
    """The residual stream of tokens behind the prefix, and their keys and values.

    `valid` is false at padding. `tree` says positions behind the prefix and who attends to whom, where a row is no
    sequence (`Network.forward`). Keys and values are (layers, batch, kv_heads, length, head_dim), in the compute dtype.
    """
    decoder, graphdef, blocks = net._decoder(params)
    if tree is None:
        own, order = positions_of(valid), jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    else:
        own, order = tree
    at, positions, seen = _behind(prefix, own, order & valid[:, None])
    view = net._view(decoder, positions, at, seen)

    def body(x: Array, layer: tuple) -> tuple[Array, KeyValue]:
        block_params, local, lora, held = layer
        block = nnx.merge(graphdef, block_params)
        turn, mask = view.of(local)
        y = block.enter(x)
        k, v = (a.transpose(0, 2, 1, 3) for a in block.attention.keys_values(y, turn, lora))
        q = block.attention.queries(y, turn, lora)
        return block.finish(x, _mix(block.attention, q, held, (k, v), mask, lora), lora), (k, v)

    layers = (blocks, net._local, adapter or {}, prefix and (prefix.k, prefix.v))
    return jax.lax.scan(body, decoder.embedded(tokens, at), layers)


def logits(net: Network, params: Mapping[str, jax.Array], x: Float[Array, "batch length width"]) -> Array:
    """Logits (batch, length, vocab) of a residual stream, float32."""
    return net._decoder(params)[0].logits(x)


def prefix_of(
    net: Network,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, " columns"],
    length: Int[Array, ""],
    *,
    adapter: Adapter | None = None,
) -> Prefix:
    """The first `length` tokens, read as a prefix; what follows them is padding."""
    _, (k, v) = read(net, params, tokens[None], (jnp.arange(tokens.shape[0]) < length)[None], adapter=adapter)
    return Prefix(k[:, 0], v[:, 0], jnp.asarray(length, jnp.int32))


def prefill(
    net: Network,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
    *,
    prefix: Prefix | None = None,
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "batch vocab"], KeyValue]:
    """Logits after the last position of left-padded rows, and their keys and values, for `place`."""
    x, kv = read(net, params, tokens, valid, prefix=prefix, adapter=adapter)
    return logits(net, params, x[:, -1:])[:, 0], kv


def place(cache: Cache, kv: KeyValue, count: Int[Array, " batch"], rows: Int[Array, " batch"]) -> Cache:
    """Put left-padded rows that were read, of `count` tokens each, into `rows` of the cache, for what they held.

    They end in the last column that was written. A row beyond the cache's is left out. The cache must have as many
    columns as a row and all that will be written behind it.
    """
    room = cache.k.shape[3] - kv[0].shape[3]

    def put(held: Array, new: Array) -> Array:
        new = jnp.pad(new.astype(held.dtype), ((0, 0), (0, 0), (0, 0), (room, 0), (0, 0)))
        new = jnp.roll(new, cache.column, axis=3)
        return held.at[:, rows].set(new, mode="drop", unique_indices=True)

    counts = cache.filled.at[rows].set(count, mode="drop", unique_indices=True)
    return Cache(put(cache.k, kv[0]), put(cache.v, kv[1]), counts, cache.column)


def step(
    net: Network,
    params: Mapping[str, jax.Array],
    token: Int[Array, " rows"],
    cache: Cache,
    *,
    prefix: Prefix | None = None,
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "rows vocab"], Cache]:
    """Write a token into the next column of every row, and return the logits after it."""
    decoder, graphdef, blocks = net._decoder(params)
    columns = cache.k.shape[3]
    slot, count = cache.column, jnp.minimum(cache.filled + 1, columns)
    ago = (slot - jnp.arange(columns)) % columns  # 0 in the column that is written now
    own, here = count[:, None] - 1 - ago[None], count[:, None] - 1
    at, positions, seen = _behind(prefix, own, (own >= 0)[:, None], here)
    view = net._view(decoder, positions, at, seen)

    def body(carry: tuple[Array, Array, Array], layer: tuple) -> tuple[tuple[Array, Array, Array], None]:
        x, k_all, v_all = carry
        index, block_params, local, lora, held = layer
        block = nnx.merge(graphdef, block_params)
        turn, mask = view.of(local)
        y = block.enter(x)
        k, v = (a.transpose(0, 2, 1, 3)[None] for a in block.attention.keys_values(y, turn, lora))
        # Carried whole and updated in place: stacking each layer's cache anew would copy it every step.
        k_all = jax.lax.dynamic_update_slice(k_all, k.astype(k_all.dtype), (index, 0, 0, slot, 0))
        v_all = jax.lax.dynamic_update_slice(v_all, v.astype(v_all.dtype), (index, 0, 0, slot, 0))
        q = block.attention.queries(y, turn, lora)
        # A prefix is rounded as the rows' own part is, so that it is the same whether or not it is shared.
        held = held and tuple(a.astype(k_all.dtype) for a in held)
        attended = _mix(block.attention, q, held, (k_all[index], v_all[index]), mask, lora)
        return (block.finish(x, attended, lora), k_all, v_all), None

    layers = (
        jnp.arange(net.config.layers),
        blocks,
        net._local,
        adapter or {},
        prefix and (prefix.k, prefix.v),
    )
    x = decoder.embedded(token[:, None], at)
    (x, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), layers)
    return decoder.logits(x)[:, 0], Cache(k, v, count, (slot + 1) % columns)


def _behind(
    prefix: Prefix | None, own: Array, seen: Array, here: Array | None = None
) -> tuple[Int[Array, "batch queries"], Int[Array, "batch keys"], Bool[Array, "batch queries keys"]]:
    """Positions of queries and of keys, the prefix's before the rows' own, and which keys each query may attend to.

    `own` are positions behind the prefix of the own keys, `here` those of the queries (the same where None).
    """
    here = own if here is None else here
    if prefix is None:
        return here, own, seen
    first = jnp.arange(prefix.k.shape[2])
    positions = jnp.concatenate([jnp.broadcast_to(first, (own.shape[0], len(first))), own + prefix.length], axis=1)
    known = jnp.broadcast_to(first < prefix.length, (*seen.shape[:2], len(first)))
    return here + prefix.length, positions, jnp.concatenate([known, seen], axis=2)


def _mix(
    attention: Attention,
    q: Float[Array, "batch queries heads dim"],
    held: KeyValue | None,
    own: KeyValue,
    mask: Bool[Array, "batch queries keys"],
    adapter: dict,
) -> Float[Array, "batch queries width"]:
    """`Attention.mix` over a prefix, (kv_heads, columns, dim), and each row's own part, (batch, kv_heads, keys, dim).

    One softmax, in float32, over the scores of both.
    """
    b, s, h, d = q.shape
    config = attention.config
    q = q.reshape(b, s, config.kv_heads, h // config.kv_heads, d).transpose(0, 2, 3, 1, 4)
    parts = [(held, "ktd"), (own, "bktd")] if held is not None else [(own, "bktd")]

    def score(kv: KeyValue, axes: str) -> Array:
        k = kv[0].astype(q.dtype)
        return jnp.einsum(f"bkgqd,{axes}->bkgqt", q, k, precision=config.matmul_precision).astype(jnp.float32)

    scores = jnp.concatenate([score(*part) for part in parts], axis=-1)
    scores = _capped(scores * (config.query_scale or d**-0.5), config.attention_cap)
    weights = softmax(jnp.where(mask[:, None, None], scores, NEGATIVE)).astype(q.dtype)
    columns = 0 if held is None else held[0].shape[-2]
    shares = (weights[..., :columns], weights[..., columns:]) if held is not None else (weights,)

    def gather(share: Array, kv: KeyValue, axes: str) -> Array:
        return jnp.einsum(f"bkgqt,{axes}->bkgqd", share, kv[1].astype(q.dtype), precision=config.matmul_precision)

    sums = [gather(share, *part) for share, part in zip(shares, parts, strict=True)]
    y = sums[0] if held is None else sums[0] + sums[1]
    return attention.o(y.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d), adapter.get("o"))
