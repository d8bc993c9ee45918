"""The compiled parts of sampling: a fixed number of slots that decode together, and new rows put into free ones.

Everything that comes in or goes out, but for parameters, cache and state, is small and whole on every device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from subjax.models import cached
from subjax.models.cached import Cache, KeyValue, Prefix
from subjax.models.network import Network
from subjax.parallel.mesh import lone_cpu, replicated
from subjax.parallel.rules import BATCH, SAMPLE, shardings
from subjax.sample.drawing import Sampling, draw_allowed, ended

# Of a GPU's memory: so much a second copy of the weights may take.
COPY = 0.3
KV_AXES = ("layers", "batch", "kv_heads", "length", "head_dim")


class State(NamedTuple):
    """What each slot carries beside its cache. An empty slot is one that is done."""

    token: Int[Array, " slots"]  # the last one drawn
    place: Int[Array, " slots"]  # how many are drawn
    done: Bool[Array, " slots"]
    tie: Bool[Array, " slots"]
    drawn: Int[Array, "slots completion"]
    keys: Array  # each row's own
    at: Int[Array, " slots"]  # its state of the constraint, where there is one


class Seen(NamedTuple):
    """What is known of the slots outside: which are done, what they drew, and whether it met a near-tie."""

    done: Bool[Array, " slots"]
    drawn: Int[Array, "slots completion"]
    tie: Bool[Array, " slots"]


class Programs(NamedTuple):
    """Jitted functions of a network, its sampling settings and a mesh.

    Attributes:
        begin: (slots, columns for prompts) to (state, cache) of empty slots; compiled for each.
        share: (params, tokens, length, adapter) to the prefix of all rows.
        prefill: (params, prefix, tokens, valid, adapter) to logits behind prompts, and their keys and values.
        place: (state, cache, logits, key-values, lengths, source, slots, rows, key, constraint) to (state, cache): rows
            put into slots, each with the prompt `source` among those that were read, and its first token drawn.
        decode: (params, prefix, state, cache, until, adapter, constraint) to (state, cache, seen): tokens drawn until
            as many slots as `until` are done.
        layers: parameters to those that `decode` is given.
        params: shardings of the parameters. decoded: of those that `decode` is given. held: of (state, cache).
        prefix: of the prefix; None where there is none.
    """

    begin: Callable
    share: Callable
    prefill: Callable
    place: Callable
    decode: Callable
    layers: Callable
    params: Mapping[str, NamedSharding]
    decoded: Mapping[str, Any]
    held: tuple[State, Cache]
    prefix: Prefix | None


def apart(mesh: Mesh, weights: float, memory: float | None) -> bool:
    """Whether decoding has each layer's arrays apart, in a copy of the weights that takes `weights` bytes a device.

    On a CPU it has, and on a GPU where there is room, since both copy a layer's slice out of a stack before they use it
    (`subjax.models.cached.set_apart`). A TPU reads the slice where it lies. Several virtual devices of a CPU keep the
    stack: they run what does not depend on one another in any order, and sums over devices would wait for each other.
    `memory`: bytes of a device; None on CPU.
    """
    platform = mesh.devices.flat[0].platform
    return lone_cpu(mesh) or (platform not in ("cpu", "tpu") and (memory is None or weights <= COPY * memory))


@functools.lru_cache(maxsize=32)
def programs(
    net: Network, sampling: Sampling, mesh: Mesh, shared: bool = False, layers_apart: bool = False
) -> Programs:
    """The programs of a network, its sampling settings and a mesh, for rows that share a prefix or not.

    Shapes are told by what the programs are given. `layers_apart`: decoding has each layer's parameters and
    cache in arrays of their own.
    """
    rows: Any = NamedSharding(mesh, PartitionSpec(BATCH))  # Any: the typed records below hold arrays elsewhere
    whole: Any = replicated(mesh)
    params_sh = shardings(SAMPLE, mesh, {n: (d.shape, d.axes) for n, d in net.declarations.items()})
    kv: Any = SAMPLE.sharding(mesh, (net.config.layers, 0, net.config.kv_heads, 0, 0), KV_AXES, "key-value cache")
    prefix_kv: Any = NamedSharding(mesh, PartitionSpec(*(part for i, part in enumerate(kv.spec) if i != 1)))
    prefix_sh = Prefix(prefix_kv, prefix_kv, whole) if shared else None
    decoder_sh, kv_held = _apart(net, params_sh, kv) if layers_apart else (params_sh, kv)
    held = (State(*(rows,) * len(State._fields)), Cache(kv_held, kv_held, rows, rows, whole))

    def begin(slots: int, columns: int) -> tuple[State, Cache]:
        none, zeros = jnp.zeros(slots, bool), jnp.zeros(slots, jnp.int32)
        drawn = jnp.full((slots, sampling.completion), sampling.pad, jnp.int32)
        keys = jax.random.key_data(jax.random.split(jax.random.key(0), slots))
        state = State(zeros, zeros, ~none, none, drawn, keys, zeros)
        ring = max(1, sampling.completion - 1)  # the last token drawn is read by nobody
        return state, cached.empty(net, slots, columns, ring, sampling.cache_dtype, layers_apart)

    def share(params, tokens, length, adapter) -> Prefix:
        return cached.prefix_of(net, params, tokens, length, adapter=adapter)

    def prefill(params, prefix, tokens, valid, adapter) -> tuple[Array, KeyValue]:
        tokens, valid = (jax.lax.with_sharding_constraint(a, rows) for a in (tokens, valid))
        return cached.prefill(net, params, tokens, valid, prefix=prefix, adapter=adapter)

    in_blocks = lone_cpu(mesh)  # not where a row's logits are split
    place = functools.partial(_place, sampling, in_blocks)
    decode = functools.partial(_decode, net, sampling, in_blocks)
    return Programs(
        jax.jit(begin, static_argnums=(0, 1), out_shardings=held),
        jax.jit(share, in_shardings=(params_sh, whole, whole, whole), out_shardings=prefix_sh),
        jax.jit(
            prefill, in_shardings=(params_sh, prefix_sh, whole, whole, whole), out_shardings=(rows, (kv, kv))
        ),
        jax.jit(
            place, in_shardings=(*held, rows, (kv, kv), *(whole,) * 6), out_shardings=held, donate_argnums=(1,)
        ),
        jax.jit(
            decode, in_shardings=(decoder_sh, prefix_sh, *held, *(whole,) * 3), out_shardings=(*held, whole),
            donate_argnums=(3,),
        ),
        jax.jit(functools.partial(cached.set_apart, net), in_shardings=(params_sh,), out_shardings=decoder_sh)
        if layers_apart else lambda params: params,
        params_sh, decoder_sh, held, prefix_sh,
    )  # fmt: skip


def _apart(net: Network, params: Mapping[str, NamedSharding], kv: NamedSharding) -> tuple[dict[str, Any], Any]:
    """Shardings of parameters and of keys and values in a stack, as those of each layer's own arrays."""
    layers = net.config.layers
    own = lambda *axes: (NamedSharding(kv.mesh, PartitionSpec(*axes)),) * layers  # noqa: E731
    stacked = cached.stacked(net)
    apart = {name: own(*s.spec[1:]) if name in stacked else s for name, s in params.items()}
    return apart, own(*kv.spec[1:3])  # rows and heads: the rest stands otherwise in keys than in values, and whole


def _place(
    sampling, in_blocks, state, cache, logits, kv, lengths, source, slots, rows, key, constraint
) -> tuple[State, Cache]:
    root = jax.random.wrap_key_data(key)
    keys = jax.vmap(lambda row: jax.random.fold_in(root, row))(rows)
    start = jnp.full(len(rows), 0 if constraint is None else constraint.start, jnp.int32)
    first = jnp.zeros(len(rows), jnp.int32)
    token, tie, at = draw_allowed(logits[source], keys, first, sampling, constraint, start, in_blocks)
    done = ended(token, sampling) | (sampling.completion == 1)
    drawn = jnp.full((len(rows), sampling.completion), sampling.pad, jnp.int32).at[:, 0].set(token)
    new = State(token, first + 1, done, tie, drawn, jax.random.key_data(keys), start if at is None else at)
    put = lambda held, new: held.at[slots].set(new, mode="drop", unique_indices=True)  # noqa: E731
    cache = cached.place(cache, (kv[0][:, source], kv[1][:, source]), lengths[source], slots)
    return State(*map(put, state, new)), cache


def _decode(
    net, sampling, in_blocks, params, prefix, state, cache, until, adapter, constraint
) -> tuple[State, Cache, Seen]:
    places = jnp.arange(sampling.completion)[None]

    def going(carry: tuple[State, Cache]):
        return carry[0].done.sum() < until

    def once(carry: tuple[State, Cache]):
        state, cache = carry
        logits, cache = cached.step(net, params, state.token, cache, prefix=prefix, adapter=adapter)
        keys = jax.random.wrap_key_data(state.keys)
        token, tie, at = draw_allowed(logits, keys, state.place, sampling, constraint, state.at, in_blocks)
        token = jnp.where(state.done, sampling.pad, token)
        here = (places == state.place[:, None]) & ~state.done[:, None]
        drawn = jnp.where(here, token[:, None], state.drawn)
        place = state.place + ~state.done
        done = state.done | ended(token, sampling) | (place == sampling.completion)
        tie = state.tie | (tie & ~state.done)
        return State(token, place, done, tie, drawn, state.keys, state.at if at is None else at), cache

    state, cache = jax.lax.while_loop(going, once, (state, cache))
    return state, cache, Seen(state.done, state.drawn, state.tie)
