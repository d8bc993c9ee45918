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
from subjax.models.decoder import Block, Decoder
from subjax.models.packed import Packing, Views
from subjax.models.remat import Remat, rematerialized
from subjax.models.rotary import Rotation

Params = dict[str, jax.Array]
# What is added to the stacked layers: LoRA pairs, matrix name -> {"a", "b", "scale"}, and "steer" -> {"vector"}.
Adapter = dict[str, dict[str, jax.Array]]


class View(NamedTuple):
    """What layers see: how queries and keys are turned, and which keys each query attends to.

    Global and local layers differ in both, and the scan runs over layers of either kind: `of` picks one layer's.
    """

    turn: Rotation | None
    mask: Bool[Array, "batch queries keys"]
    local_turn: Rotation | None
    local_mask: Bool[Array, "batch queries keys"]

    def of(self, local: Bool[Array, ""] | None) -> tuple[Rotation | None, Array]:
        """Rotation and mask of a layer; None where the network has no local layers."""
        if local is None:
            return self.turn, self.mask
        pick = lambda mine, other: jnp.where(local, mine, other)  # noqa: E731
        return jax.tree.map(pick, self.local_turn, self.turn), pick(self.local_mask, self.mask)

    def last(self, tail: int) -> "View":
        """The view of the last queries."""
        cut = lambda turn: turn and turn.last(tail)  # noqa: E731
        return View(cut(self.turn), self.mask[:, -tail:], cut(self.local_turn), self.local_mask[:, -tail:])


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

    @property
    def _local(self) -> jax.Array | None:
        """Which layers are local, (layers,); None where none is."""
        return jnp.array(self.config.local) if any(self.config.local) else None

    def _view(self, decoder: Decoder, positions: Array, at: Array, mask: Array) -> View:
        """What queries at `at` (batch, queries) see of keys at `positions` (batch, keys), where `mask` allows it."""
        turn, local_turn = decoder.rotations(at)
        if self._local is None:
            return View(turn, mask, turn, mask)
        near = at[:, :, None] - positions[:, None, :] < self.config.window
        return View(turn, mask, local_turn, mask & near)

    @staticmethod
    def _attend(block: Block, x: Array, view: View, local: Array | None, adapter: dict) -> tuple[Array, Array, Array]:
        """One layer: the residual stream in and out, and the layer's keys and values."""
        turn, mask = view.of(local)
        y = block.enter(x)
        k, v = block.attention.keys_values(y, turn, adapter)
        attended = block.attention.mix(block.attention.queries(y, turn, adapter), k, v, mask, adapter)
        return block.finish(x, attended, adapter), k, v

    def forward(
        self,
        params: Mapping[str, jax.Array],
        tokens: Int[Array, "batch length"],
        valid: Bool[Array, "batch length"],
        *,
        tail: int | None = None,
        adapter: Adapter | None = None,
        rows: jax.sharding.Sharding | None = None,
        tree: tuple[Int[Array, "batch length"], Bool[Array, "batch length length"]] | None = None,
    ) -> Float[Array, "batch tail vocab"]:
        """Logits at the last `tail` positions (all where None), in float32.

        `valid` is false at padding, which no token attends to. With a `tail` the last layer's queries, its
        feed-forward part and the output matrix are computed there alone: most of a prompt's work is not needed.
        `rows` is the sharding of the residual stream. On a mesh it must be said: where parameters and rows are split
        over one axis, the compiler may otherwise keep the parameters' split and give every device all rows.
        `tree` says the tokens' positions and who attends to whom, where a row is no sequence: several continuations of
        one prompt stand in it side by side.
        """
        decoder, graphdef, blocks = self._decoder(params)
        if tree is None:
            positions, order = positions_of(valid), jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
        else:
            positions, order = tree
        x = _held(decoder.embedded(tokens, positions), rows)
        view = self._view(decoder, positions, positions, order & valid[:, None])

        def body(x: Array, layer: tuple) -> tuple[Array, None]:
            block, local, lora = layer
            x, _, _ = self._attend(nnx.merge(graphdef, block), x, view, local, lora)
            return _held(x, rows), None

        layers = (blocks, self._local, adapter or {})
        if tail is None or tail == tokens.shape[1]:
            x, _ = jax.lax.scan(body, x, layers)
            return decoder.logits(x)
        x, _ = jax.lax.scan(body, x, jax.tree.map(lambda a: a[:-1], layers))
        last, local, lora = jax.tree.map(lambda a: a[-1], layers)
        block = nnx.merge(graphdef, last)
        turn, _ = view.of(local)
        late_turn, late_mask = view.last(tail).of(local)
        y = block.enter(x)
        k, v = block.attention.keys_values(y, turn, lora)
        q = block.attention.queries(y[:, -tail:], late_turn, lora)
        attended = block.attention.mix(q, k, v, late_mask, lora)
        return decoder.logits(_held(block.finish(x[:, -tail:], attended, lora), rows))

    def packed(
        self,
        params: Mapping[str, jax.Array],
        tokens: Int[Array, "rows length"],
        packing: Packing,
        at: Int[Array, "rows targets"],
        *,
        adapter: Adapter | None = None,
        rows: jax.sharding.NamedSharding | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "rows targets width"]:
        """States at some tokens of packed rows, as the output matrix takes them, in the compute dtype.

        `rows` is the sharding of the residual stream, as in `forward`. `remat` says what the backward pass computes
        again rather than keeps.
        """
        decoder, graphdef, blocks = self._decoder(params)
        x = _held(decoder.embedded(tokens, packing.positions), rows)
        turns = decoder.rotations(packing.positions)
        views = Views.of(packing, self.config.window if self._local is not None else None)

        def body(x: Array, layer: tuple) -> tuple[Array, None]:
            block_params, local, lora = layer
            block = nnx.merge(graphdef, block_params)
            pick = lambda mine, other: jnp.where(local, mine, other)  # noqa: E731
            turn = turns[0] if local is None else jax.tree.map(pick, turns[1], turns[0])
            y = block.enter(x)
            k, v = block.attention.keys_values(y, turn, lora)
            q = block.attention.queries(y, turn, lora)
            attended = block.attention.mix_packed(q, k, v, packing, views.layer(local), lora, rows)
            return _held(block.finish(x, attended, lora), rows), None

        x, _ = jax.lax.scan(rematerialized(body, remat), x, (blocks, self._local, adapter or {}))
        asked = _held(jnp.take_along_axis(x, at[:, :, None], axis=1), rows)
        return _held(decoder.norm(asked), rows)

    def output_matrix(self, params: Mapping[str, jax.Array]) -> Float[Array, "vocab width"]:
        """The matrix that turns states into logits: the embedding where the two are tied."""
        return params["embed" if self.config.tied else "head"]

    def residuals(
        self,
        params: Mapping[str, jax.Array],
        tokens: Int[Array, "batch length"],
        valid: Bool[Array, "batch length"],
        *,
        adapter: Adapter | None = None,
    ) -> Float[Array, "layers batch width"]:
        """The residual stream behind each layer at the last position, float32."""
        decoder, graphdef, blocks = self._decoder(params)
        positions = positions_of(valid)
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & valid[:, None]
        view = self._view(decoder, positions, positions, causal)

        def body(x: Array, layer: tuple) -> tuple[Array, Array]:
            block, local, lora = layer
            x, _, _ = self._attend(nnx.merge(graphdef, block), x, view, local, lora)
            return x, x[:, -1].astype(jnp.float32)

        x = decoder.embedded(tokens, positions)
        return jax.lax.scan(body, x, (blocks, self._local, adapter or {}))[1]
