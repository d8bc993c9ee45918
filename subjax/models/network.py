"""The functional front of the decoder: plain arrays by name in, logits out.

A `Network` is made once for a config and is the only way that trainers, samplers and measurements see a model.
Parameters travel as a flat dict from name ("blocks/attention/q/kernel") to array.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subjax.models.architecture import DecoderConfig
from subjax.models.decoder import Decoder

Params = dict[str, jax.Array]
Adapter = dict[str, dict[str, jax.Array]]  # LoRA pairs of the stacked layers: matrix name -> {"a", "b", "scale"}


class Cache(NamedTuple):
    """Keys and values of every layer, (layers, batch, slots, kv_heads, head_dim), and which slots hold a token."""

    k: jax.Array
    v: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is known of a parameter before it exists."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    role: str  # "weight", "embedding", "gain", "bias", "key-bias"


def positions_of(valid: Bool[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Position of each token among the valid ones of its row, 0 at left padding."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)


def _held(x: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


@functools.lru_cache(maxsize=32)
def network(config: DecoderConfig) -> "Network":
    """The network of a config; the same object each time, so compiled programs are found again."""
    return Network(config)


class Network:
    """Pure functions of (params, tokens) for one `DecoderConfig`. Hashable by identity: make it with `network()`."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
        self._graphdef, state = nnx.split(abstract)
        self._paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
        self.declarations: dict[str, Declaration] = {
            name: Declaration(tuple(v.shape), str(v.dtype), v.get_metadata("axes"), v.get_metadata("role"))
            for name, v in _flatten(state).items()
        }

    @property
    def parameters(self) -> int:
        """Number of scalars in the parameters."""
        return sum(math.prod(d.shape) for d in self.declarations.values())

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, each drawn from (key, its name): the values do not depend on the mesh. Jittable."""
        _, state = nnx.split(Decoder(self.config, key))
        return {name: leaf[...] for name, leaf in _flatten(state).items()}

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters."""
        return {n: jax.ShapeDtypeStruct(d.shape, jnp.dtype(d.dtype)) for n, d in self.declarations.items()}

    def _decoder(self, params: Mapping[str, jax.Array]) -> tuple[Decoder, nnx.GraphDef, nnx.State]:
        """The module over `params`, and its stacked blocks split for a scan."""
        state = nnx.from_flat_state({self._paths[name]: nnx.Param(value) for name, value in params.items()})
        decoder = nnx.merge(self._graphdef, state)
        graphdef, blocks = nnx.split(decoder.blocks)
        return decoder, graphdef, nnx.as_pure(blocks)

    def forward(
        self,
        params: Mapping[str, jax.Array],
        tokens: Int[Array, "batch length"],
        valid: Bool[Array, "batch length"],
        *,
        tail: int | None = None,
        adapter: Adapter | None = None,
        rows: jax.sharding.Sharding | None = None,
    ) -> Float[Array, "batch tail vocab"]:
        """Logits at the last `tail` positions (all where None), in float32.

        `valid` is false at padding, which no token attends to. With a `tail` the last layer's queries, its
        feed-forward part and the output matrix are computed there alone: most of a prompt's work is not needed.
        `rows` is the sharding of the residual stream. On a mesh it must be said: where parameters and rows are split
        over one axis, the compiler may otherwise keep the parameters' split and give every device all rows.
        """
        decoder, graphdef, blocks = self._decoder(params)
        adapter = adapter or {}
        positions = positions_of(valid)
        x = _held(decoder.embedded(tokens, positions), rows)
        turn = decoder.rotation(positions)
        mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & valid[:, None]
        body = functools.partial(self._layer, graphdef, turn=turn, mask=mask, rows=rows)
        if tail is None or tail == tokens.shape[1]:
            x, _ = jax.lax.scan(body, x, (blocks, adapter))
            return decoder.logits(x)
        first = jax.tree.map(lambda a: a[:-1], (blocks, adapter))
        last, last_adapter = jax.tree.map(lambda a: a[-1], (blocks, adapter))
        x, _ = jax.lax.scan(body, x, first)
        block = nnx.merge(graphdef, last)
        y = block.norm1(x)
        k, v = block.attention.keys_values(y, turn, last_adapter)
        q = block.attention.queries(y[:, -tail:], turn and turn.last(tail), last_adapter)
        attended = block.attention.mix(q, k, v, mask[:, -tail:], last_adapter)
        return decoder.logits(_held(block.finish(x[:, -tail:], attended, last_adapter), rows))

    @staticmethod
    def _layer(graphdef, x, layer, *, turn, mask, rows=None):
        """One layer of the scan: the residual stream in and out, and the layer's keys and values."""
        params, adapter = layer
        block = nnx.merge(graphdef, params)
        y = block.norm1(x)
        k, v = block.attention.keys_values(y, turn, adapter)
        attended = block.attention.mix(block.attention.queries(y, turn, adapter), k, v, mask, adapter)
        return _held(block.finish(x, attended, adapter), rows), (k, v)

    def prefill(
        self,
        params: Mapping[str, jax.Array],
        tokens: Int[Array, "batch length"],
        valid: Bool[Array, "batch length"],
        *,
        slots: int,
        cache_dtype: str = "float32",
        adapter: Adapter | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after the last position, and a cache of `slots` ≥ length slots whose first `length` are filled."""
        decoder, graphdef, blocks = self._decoder(params)
        positions = positions_of(valid)
        x, turn = decoder.embedded(tokens, positions), decoder.rotation(positions)
        mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & valid[:, None]
        body = functools.partial(self._layer, graphdef, turn=turn, mask=mask)
        x, (k, v) = jax.lax.scan(body, x, (blocks, adapter or {}))
        room = slots - tokens.shape[1]
        grow = lambda a: jnp.pad(a.astype(cache_dtype), ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))  # noqa: E731
        cache = Cache(grow(k), grow(v), jnp.pad(valid, ((0, 0), (0, room))))
        return decoder.logits(x[:, -1:])[:, 0], cache

    def step(
        self,
        params: Mapping[str, jax.Array],
        token: Int[Array, " batch"],
        slot: Int[Array, ""],
        cache: Cache,
        *,
        adapter: Adapter | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Write `token` into `slot` of the cache (the same slot for every row) and return the logits after it."""
        decoder, graphdef, blocks = self._decoder(params)
        valid = jax.lax.dynamic_update_slice(cache.valid, jnp.ones((token.shape[0], 1), bool), (0, slot))
        positions = jnp.maximum(valid.sum(1, keepdims=True) - 1, 0)
        x, turn = decoder.embedded(token[:, None], positions), decoder.rotation(positions)

        def body(carry, layer):
            x, k_all, v_all = carry
            index, (block_params, lora) = layer
            block = nnx.merge(graphdef, block_params)
            y = block.norm1(x)
            k, v = block.attention.keys_values(y, turn, lora)
            # Carried whole and updated in place: stacking each layer's cache anew would copy it every step.
            k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), (index, 0, slot, 0, 0))
            v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), (index, 0, slot, 0, 0))
            q = block.attention.queries(y, turn, lora)
            attended = block.attention.mix(q, k_all[index], v_all[index], valid[:, None], lora)
            return (block.finish(x, attended, lora), k_all, v_all), None

        indices = jnp.arange(self.config.layers)
        (x, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), (indices, (blocks, adapter or {})))
        return decoder.logits(x)[:, 0], Cache(k, v, valid)
