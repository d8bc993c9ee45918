"""Decoding with a cache: tokens are read once, and each further token attends to their keys and values.

A row's keys and values stand in two parts. A prefix is what all rows begin with, a system prompt and a template: it is
read once and held once. The rest is each row's own: its prompt, which ends in the last of the columns for prompts, and
behind it what is drawn, in a ring of columns of which all rows write the same one at a time. So rows that begin at
different times are decoded together, a new row takes the place of one that has ended, and a step writes one slice.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subjax.models import quantized
from subjax.models.decoder import NEGATIVE, Attention, _capped, softmax
from subjax.models.network import Adapter, Network, positions_of
from subjax.models.quantized import Kept

KeyValue = tuple[jax.Array, jax.Array]
Apart = tuple[Any, ...]  # of each layer its own array


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
    """Keys and values of each row's own tokens: columns for its prompt, then a ring for what is drawn.

    Attributes:
        k, v: (layers, rows, kv_heads, columns, head_dim); or, where layers stand apart, of each layer (rows, kv_heads,
            head_dim, columns) and (rows, kv_heads, columns, head_dim), as the products with queries and weights read
            them. Kept as `subjax.models.quantized` has it.
        prompt: how many tokens each row's prompt has.
        drawn: which columns of the ring hold a token of the row.
        column: the one of the ring that is written next.
    """

    k: Kept | Apart
    v: Kept | Apart
    prompt: Int[Array, " rows"]
    drawn: Bool[Array, "rows ring"]
    column: Int[Array, ""]

    @property
    def prompts(self) -> int:
        """Columns for prompts."""
        values = self.v[0] if isinstance(self.v, tuple) else self.v
        return values.shape[-2] - self.drawn.shape[1]


def empty(net: Network, rows: int, prompts: int, ring: int, dtype: str, apart: bool = False) -> Cache:
    """A cache whose rows have no token yet, with columns for prompts and for what is drawn.

    `dtype`: of keys and values, or "int8", which keeps them as codes (`subjax.models.quantized`). `apart`: each layer's
    is an array of its own.
    """
    layers, heads, dim, columns = net.config.layers, net.config.kv_heads, net.config.head_dim, prompts + ring
    begun = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, ring), bool), jnp.int32(0)
    if apart:
        each = lambda shape, axis: tuple(quantized.zeros((rows, heads, *shape), dtype, axis) for _ in range(layers))  # noqa: E731
        return Cache(each((dim, columns), -2), each((columns, dim), -1), *begun)
    shape = (layers, rows, heads, columns, dim)
    return Cache(quantized.zeros(shape, dtype, -1), quantized.zeros(shape, dtype, -1), *begun)


def set_apart(net: Network, params: Mapping[str, jax.Array]) -> dict[str, jax.Array | Apart]:
    """Parameters with each layer's an array of its own, for `step` with a cache of layers apart.

    A loop over a stack copies each layer's slice out of it before a product reads it, on CPU and on GPU: at one token a
    row that is as much memory traffic again as the product's own. The price is a program that grows with depth.
    """
    names, layers = stacked(net), net.config.layers
    return {n: tuple(a[i] for i in range(layers)) if n in names else a for n, a in params.items()}


def stacked(net: Network) -> set[str]:
    """The parameters of which each layer has its own, in a stack."""
    return {name for name, declared in net.declarations.items() if declared.axes[0] == "layers"}


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
    """Put left-padded prompts that were read, of `count` tokens each, into `rows` of the cache, for what they held.

    A row beyond the cache's is left out. The cache must have as many columns for prompts as `kv`.
    """
    end = cache.prompts
    columns = slice(end - kv[0].shape[3], end)

    def put(held: Array, new: Array | bool, *where: Any) -> Array:
        return held.at[where].set(jnp.asarray(new, held.dtype), mode="drop", unique_indices=True)

    def put_kept(held: Any, new: Array, axis: int, *where: Any) -> Any:
        return jax.tree.map(lambda held, new: put(held, new, *where), held, quantized.as_in(new, held, axis))

    prompt, drawn = put(cache.prompt, count, rows), put(cache.drawn, False, rows)
    if isinstance(cache.k, tuple) and isinstance(cache.v, tuple):
        k: Any = tuple(
            put_kept(a, b.swapaxes(2, 3), -2, rows, ..., columns) for a, b in zip(cache.k, kv[0], strict=True)
        )
        v: Any = tuple(put_kept(a, b, -1, rows, slice(None), columns) for a, b in zip(cache.v, kv[1], strict=True))
    else:
        where = slice(None), rows, slice(None), columns
        k, v = put_kept(cache.k, kv[0], -1, *where), put_kept(cache.v, kv[1], -1, *where)
    return Cache(k, v, prompt, drawn, cache.column)


def step(
    net: Network,
    params: Mapping[str, jax.Array | Apart],
    token: Int[Array, " rows"],
    cache: Cache,
    *,
    prefix: Prefix | None = None,
    adapter: Adapter | None = None,
) -> tuple[Float[Array, "rows vocab"], Cache]:
    """Write a token into the next column of every row, and return the logits after it.

    Where the cache's layers stand apart, the parameters do too (`set_apart`).
    """
    decoder, graphdef, blocks = net._decoder(params)  # type: ignore[arg-type]
    ring = cache.drawn.shape[1]
    drawn = cache.drawn.at[:, cache.column].set(True)
    here = (cache.prompt + drawn.sum(1, dtype=jnp.int32) - 1)[:, None]
    ago = (cache.column - jnp.arange(ring)) % ring  # 0 in the column that is written now
    asked = jnp.arange(cache.prompts)[None] - cache.prompts + cache.prompt[:, None]
    own, seen = jnp.concatenate([asked, here - ago[None]], 1), jnp.concatenate([asked >= 0, drawn], 1)
    at, positions, seen = _behind(prefix, own, seen[:, None], here)
    view = net._view(decoder, positions, at, seen)
    x = decoder.embedded(token[:, None], at)
    parts = (blocks, net._local, adapter or {}, prefix and (prefix.k, prefix.v))

    def layer(x: Array, parts: tuple, write: Callable[[Array, Array], tuple[Kept, Kept]], axes: str) -> Array:
        block_params, local, lora, held = parts
        block = nnx.merge(graphdef, block_params)
        turn, mask = view.of(local)
        y = block.enter(x)
        k, v = write(*block.attention.keys_values(y, turn, lora))
        q = block.attention.queries(y, turn, lora)
        # A prefix is rounded as the rows' own part is, so that it is the same whether or not it is shared.
        held = held and tuple(quantized.as_in(a, k, -1) for a in held)
        return block.finish(x, _mix(block.attention, q, held, (k, v), mask, lora, axes), lora)

    over = _apart if isinstance(cache.k, tuple) else _stacked
    x, k, v = over(x, parts, cache, layer)
    return decoder.logits(x)[:, 0], Cache(k, v, cache.prompt, drawn, (cache.column + 1) % ring)


def _stacked(x: Array, parts: tuple, cache: Cache, layer: Callable[..., Array]) -> tuple[Array, Any, Any]:
    """A step's layers in a loop: the residual stream, and the cache's keys and values, behind them."""

    def body(carry: tuple[Array, Any, Any], of: tuple) -> tuple[tuple[Array, Any, Any], None]:
        x, k_all, v_all = carry
        index, *own = of
        held: list[Kept] = []

        def write(k: Array, v: Array) -> tuple[Kept, Kept]:
            # Carried whole and updated in place: stacking each layer's cache anew would copy it every step.
            for whole, own in ((k_all, k), (v_all, v)):
                new = quantized.as_in(own.transpose(0, 2, 1, 3)[None], whole, -1)
                to = lambda a, new: jax.lax.dynamic_update_slice(a, new, (index, 0, 0, at, 0))  # noqa: E731
                held.append(jax.tree.map(to, whole, new))
            k, v = (jax.tree.map(lambda a: a[index], whole) for whole in held)
            return k, v

        x = layer(x, tuple(own), write, "bktd")
        return (x, held[0], held[1]), None

    at, count = cache.prompts + cache.column, jax.tree.leaves(parts)[0].shape[0]
    return jax.lax.scan(body, (x, cache.k, cache.v), (jnp.arange(count), *parts))[0]


def _apart(x: Array, parts: tuple, cache: Cache, layer: Callable[..., Array]) -> tuple[Array, Any, Any]:
    """`_stacked`, one layer written behind the other."""
    k_all, v_all, at = [*cast(Apart, cache.k)], [*cast(Apart, cache.v)], cache.prompts + cache.column
    for index in range(len(k_all)):

        def write(k: Array, v: Array, index: int = index) -> tuple[Kept, Kept]:
            for held, own, dim, to in ((k_all, k.transpose(0, 2, 3, 1), 2, 3), (v_all, v.transpose(0, 2, 1, 3), 3, 2)):
                new = quantized.as_in(own, held[index], dim)
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=to)
                held[index] = jax.tree.map(put, held[index], new)
            return k_all[index], v_all[index]

        of = functools.partial(jax.tree.map, lambda a, index=index: a[index])
        own = (of(parts[0], is_leaf=lambda a: isinstance(a, tuple)), *of(parts[1:]))
        x = layer(x, own, write, "bkdt")
    return x, tuple(k_all), tuple(v_all)


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
    held: tuple[Any, Any] | None,
    own: tuple[Any, Any],
    mask: Bool[Array, "batch queries keys"],
    adapter: dict,
    axes: str = "bktd",
) -> Float[Array, "batch queries width"]:
    """`Attention.mix` over a prefix, (kv_heads, columns, dim), and each row's own part, (batch, kv_heads, keys, dim).

    One softmax, in float32, over the scores of both. `axes` are those of the own keys: "bkdt" has them turned over.
    """
    b, s, h, d = q.shape
    config = attention.config
    if held is not None and s > 1:
        # With many queries a prefix is best read as the own part is: its product with the rows' queries in one wants
        # them laid out anew. With one it is not copied for each row.
        own = tuple(  # type: ignore[assignment]
            jnp.concatenate([jnp.broadcast_to(first[None], (b, *first.shape)).astype(a.dtype), a], axis=2)
            for first, a in zip(held, own, strict=True)
        )
        held = None
    q = q.reshape(b, s, config.kv_heads, h // config.kv_heads, d).transpose(0, 2, 3, 1, 4)
    values = [(held, "ktd"), (own, "bktd")] if held is not None else [(own, "bktd")]
    keys = [*values[:-1], (own, axes)]

    def score(kv: tuple[Kept, Kept], axes: str) -> Array:
        k, scales = quantized.factors(kv[0], axes, q.dtype)
        y = jnp.einsum(f"bkgqd,{axes}->bkgqt", q, k, precision=config.matmul_precision).astype(jnp.float32)
        return y if scales is None else y * scales

    scores = jnp.concatenate([score(*part) for part in keys], axis=-1)
    scores = _capped(scores * (config.query_scale or d**-0.5), config.attention_cap)
    weights = softmax(jnp.where(mask[:, None, None], scores, NEGATIVE)).astype(q.dtype)
    columns = 0 if held is None else held[0].shape[-2]
    shares = (weights[..., :columns], weights[..., columns:]) if held is not None else (weights,)

    def gather(share: Array, kv: tuple[Kept, Kept], axes: str) -> Array:
        v, scales = quantized.factors(kv[1], axes, q.dtype)
        share = share if scales is None else (share * scales).astype(q.dtype)
        return jnp.einsum(f"bkgqt,{axes}->bkgqd", share, v, precision=config.matmul_precision)

    sums = [gather(share, *part) for share, part in zip(shares, values, strict=True)]
    y = sums[0] if held is None else sums[0] + sums[1]
    return attention.o(y.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d), adapter.get("o"))
