"""The sampler: prefill, then one jitted while-loop over a donated cache, rows addressed by key.

Row `i` draws token `t` with fold_in(fold_in(key, i), t), so a corpus is the same rows for any batch size, mesh or
order; only a near-tie (two tokens whose perturbed logits differ by less than rounding) can fall otherwise. Logits are
not kept: for a real vocabulary they would be hundreds of times larger than the tokens.

A constraint (`subjax.sample.constraint`) leaves only tokens with which an answer can still end in an accepted text, and
within the room there is. Its mask comes before everything else: temperature, top-k and top-p work on what it leaves, so
a token is drawn from the model's distribution renormalized over the allowed ones, step by step (which is not the
model's distribution over whole rows given that they are accepted). The noise of such a draw is still a function of
(key, row, place), but of one value a column of the constraint and not one a token of the vocabulary: constrained rows
are another corpus than unconstrained ones, and another vocabulary or grammar changes which value falls to which token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from subjax.errors import UsageError
from subjax.models import cached
from subjax.models.cached import Cache
from subjax.models.network import Adapter, Network
from subjax.parallel.mesh import replicated
from subjax.parallel.rules import BATCH, SAMPLE, shardings
from subjax.sample.constraint import Constraint

NEAR_TIE = 1e-4  # margin of the two best perturbed logits, at temperature 1, under which rounding may choose otherwise


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Everything is explicit; nothing is inherited from a checkpoint's own defaults.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `prompt` is the padded prompt length (the bucket) and
    `completion` the most tokens an answer may have, the end token included; `end` (one id, or several) ends an answer
    and `pad` fills what follows. An `end` of -1 is no token: every answer fills its room.
    """

    prompt: int
    completion: int
    end: int | tuple[int, ...]
    pad: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cache_dtype: str = "float32"

    def __post_init__(self):
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UsageError(
                f"sampling: temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}:"
                " want temperature >= 0, 0 < top_p <= 1, top_k >= 0"
            )
        if self.prompt < 1 or self.completion < 1:
            raise UsageError(
                f"sampling: a prompt of {self.prompt} and a completion of {self.completion} tokens;"
                " want at least one of each"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.end if isinstance(self.end, tuple) else (self.end,)


class Drawn(NamedTuple):
    """Sampled rows: tokens (rows, completion), padded after the end token, and which rows met a near-tie."""

    tokens: np.ndarray
    near_tie: np.ndarray


class State(NamedTuple):
    """What the decoding loop carries beside the cache."""

    place: Int[Array, ""]  # tokens drawn so far
    token: Int[Array, " batch"]  # the last one
    done: Bool[Array, " batch"]
    tie: Bool[Array, " batch"]
    drawn: Int[Array, "batch completion"]
    at: Int[Array, " batch"] | None = None  # each row's state of the constraint, where there is one


def restrict(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """Logits at the sampling temperature, with tokens outside top-k and top-p at minus infinity.

    Top-p (Holtzman et al. 2020, section 3.1) keeps the smallest set of likeliest tokens whose mass reaches `top_p`.
    Sorts the vocabulary only where one of them is asked for.
    """
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
        least = jnp.where(before < sampling.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(
    logits: Float[Array, "batch vocab"], keys: Array, index: Int[Array, ""], sampling: Sampling
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
    """One token a row by the Gumbel-max trick with key fold_in(row key, index), and whether it was a near-tie."""
    scores = restrict(logits, sampling)
    if sampling.temperature > 0:
        noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, index), scores.shape[1:]))(keys)
        scores = scores + noise
    # Three plain reductions: on CPU top_k sorts the whole vocabulary (`benchmarks/cpu_choices.py` measures both).
    ids = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    best = scores.max(-1, keepdims=True)
    token = jnp.where(scores == best, ids, scores.shape[1] - 1).min(-1)
    second = jnp.where(ids == token[:, None], -jnp.inf, scores).max(-1)
    # Below temperature 1 the logits' rounding is scaled up with them.
    margin = NEAR_TIE / min(sampling.temperature or 1.0, 1.0)
    return token, best[:, 0] - second < margin


def draw_allowed(
    logits: Float[Array, "batch vocab"],
    keys: Array,
    index: Int[Array, ""],
    sampling: Sampling,
    constraint: Constraint | None,
    at: Int[Array, " batch"] | None,
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"], Int[Array, " batch"] | None]:
    """`draw` among the tokens that the constraint allows in the states `at`, and the states behind what was drawn.

    A token is allowed where an answer can end behind it in the places that are left. One such token there always is, if
    there was room at the start.
    """
    if constraint is None:
        return *draw(logits, keys, index, sampling), None
    behind = constraint.next[at].astype(jnp.int32)
    room = sampling.completion - 1 - index
    allowed = (behind >= 0) & (constraint.distance[behind] <= room)
    column, tie = draw(jnp.where(allowed, logits[:, constraint.tokens], -jnp.inf), keys, index, sampling)
    return constraint.tokens[column], tie, jnp.take_along_axis(behind, column[:, None], axis=1)[:, 0]


def _ended(token: Int[Array, " batch"], sampling: Sampling) -> Bool[Array, " batch"]:
    return (token[:, None] == jnp.array(sampling.ends, jnp.int32)[None]).any(1)


@functools.lru_cache(maxsize=32)
def program(net: Network, sampling: Sampling, mesh: Mesh) -> tuple[Callable, Callable, Mapping]:
    """(prefill, decode, parameter shardings) for a network and its sampling settings, jitted once.

    Both may be given an adapter and a constraint last, each None or its arrays: they are arguments, so that others of
    the same shapes find the same compiled programs.
    """
    slots = sampling.prompt + sampling.completion
    declared = {n: (d.shape, d.axes) for n, d in net.declarations.items()}
    params_sh = shardings(SAMPLE, mesh, declared)
    rows: Any = NamedSharding(mesh, PartitionSpec(BATCH))  # Any: the typed records below hold arrays elsewhere
    kv_axes = ("layers", "batch", "length", "kv_heads", "head_dim")
    kv_shape = (net.config.layers, 0, slots, net.config.kv_heads, net.config.head_dim)
    kv: Any = SAMPLE.sharding(mesh, kv_shape, kv_axes, "key-value cache")
    whole: Any = replicated(mesh)
    state_sh, cache_sh = State(whole, rows, rows, rows, rows, rows), Cache(kv, kv, rows)

    def prefill(params, tokens, valid, keys, adapter, constraint):
        logits, cache = cached.prefill(
            net, params, tokens, valid, slots=slots, cache_dtype=sampling.cache_dtype, adapter=adapter
        )
        at = None if constraint is None else jnp.full(tokens.shape[0], constraint.start, jnp.int32)
        token, tie, at = draw_allowed(logits, keys, jnp.int32(0), sampling, constraint, at)
        drawn = jnp.full((tokens.shape[0], sampling.completion), sampling.pad, jnp.int32).at[:, 0].set(token)
        return State(jnp.int32(1), token, _ended(token, sampling), tie, drawn, at), cache

    def decode(params, state, cache, keys, adapter, constraint):
        def going(carry: tuple[State, Cache]):
            return (carry[0].place < sampling.completion) & ~carry[0].done.all()

        def once(carry: tuple[State, Cache]):
            state, cache = carry
            slot = sampling.prompt + state.place - 1
            logits, cache = cached.step(net, params, state.token, slot, cache, adapter=adapter)
            token, tie, at = draw_allowed(logits, keys, state.place, sampling, constraint, state.at)
            token = jnp.where(state.done, sampling.pad, token)
            drawn = jax.lax.dynamic_update_slice(state.drawn, token[:, None], (0, state.place))
            tie = state.tie | (tie & ~state.done)
            return State(state.place + 1, token, state.done | _ended(token, sampling), tie, drawn, at), cache

        state, cache = jax.lax.while_loop(going, once, (state, cache))
        return state.drawn, state.tie, cache  # the cache goes out so that its donated memory is reused

    rest = (rows, whole, whole)  # keys; then what is small and whole on every device
    prefill = jax.jit(prefill, in_shardings=(params_sh, rows, rows, *rest), out_shardings=(state_sh, cache_sh))
    decode = jax.jit(decode, in_shardings=(params_sh, state_sh, cache_sh, *rest), donate_argnums=(2,))
    # Jitted functions with shardings take no default for an argument.
    return (
        lambda params, tokens, valid, keys, adapter=None, constraint=None: prefill(
            params, tokens, valid, keys, adapter, constraint
        ),
        lambda params, state, cache, keys, adapter=None, constraint=None: decode(
            params, state, cache, keys, adapter, constraint
        ),
        params_sh,
    )


def _check(constraint: Constraint, sampling: Sampling, net: Network) -> None:
    """Raise UsageError where a constraint and what it is used with do not belong together."""
    if constraint.ends != tuple(sorted(set(sampling.ends))):
        raise UsageError(
            f"the constraint ends answers with tokens {list(constraint.ends)} and the sampling with"
            f" {sorted(set(sampling.ends))}; give both the same"
        )
    if constraint.tokens[-1] >= net.config.vocab:
        raise UsageError(
            f"the constraint allows token {constraint.tokens[-1]} and the model's vocabulary has {net.config.vocab};"
            " make the constraint from the tokenizer of this model"
        )
    if sampling.completion < constraint.distance[constraint.start]:
        raise UsageError(
            f"a completion of {sampling.completion} tokens is too short for the constraint, whose shortest answer has"
            f" {constraint.distance[constraint.start]} with its end token; raise it"
        )


def sample(
    net: Network,
    params: Mapping[str, jax.Array],
    prompts: Int[np.ndarray, "rows prompt"],
    *,
    sampling: Sampling,
    key: jax.Array,
    mesh: Mesh,
    first: int = 0,
    batch: int = 2048,
    adapter: Adapter | None = None,
    constraint: Constraint | None = None,
) -> Drawn:
    """Answer prompts (left-padded to `sampling.prompt`), rows numbered from `first`.

    Args:
        net: the network; `params`: its plain parameters.
        prompts: token ids; `sampling.pad` marks the padding.
        sampling: how tokens are drawn. key: the node's sampling key. mesh: where it runs, rows over its batch axes.
        batch: rows at a time; it does not change the answers.
        adapter: LoRA pairs that are not merged into `params`.
        constraint: leaves only tokens with which an answer can end as the constraint wants it; it then does end, within
            `sampling.completion` tokens.

    Raises:
        UsageError: prompts of another length than the bucket, a bucket longer than the model's context, a prompt that
            ends in padding, or a constraint that does not fit the vocabulary, the end tokens or the room.
    """
    if prompts.shape[1] != sampling.prompt:
        raise UsageError(f"prompts have {prompts.shape[1]} tokens and the bucket is {sampling.prompt}; pad them to it")
    if sampling.prompt + sampling.completion > net.config.length:
        raise UsageError(
            f"a prompt of {sampling.prompt} and a completion of {sampling.completion} tokens exceed the model's"
            f" {net.config.length}; shorten one"
        )
    if (prompts[:, -1] == sampling.pad).any():
        row = first + int((prompts[:, -1] == sampling.pad).argmax())
        raise UsageError(f"prompt {row} ends in padding (token {sampling.pad}); pad prompts on the left")
    if constraint is not None:
        _check(constraint, sampling, net)
    if not len(prompts):
        return Drawn(np.zeros((0, sampling.completion), np.int32), np.zeros(0, bool))
    prefill, decode, params_sh = program(net, sampling, mesh)
    params = jax.device_put(dict(params), params_sh)
    adapter, constraint = jax.device_put((adapter, constraint), replicated(mesh))
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    batch = max(ways, min(batch, len(prompts)) // ways * ways)
    outs = []
    for start in range(0, len(prompts), batch):
        rows = np.arange(start, start + batch)
        block = prompts[np.minimum(rows, len(prompts) - 1)]  # the last block is filled up with its last row
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(first + rows))
        state, cache = prefill(params, block, block != sampling.pad, keys, adapter, constraint)
        drawn, tie, _ = decode(params, state, cache, keys, adapter, constraint)
        outs.append((start, drawn, tie))
    tokens = np.concatenate([np.asarray(drawn) for _, drawn, _ in outs])[: len(prompts)]
    near = np.concatenate([np.asarray(tie) for _, _, tie in outs])[: len(prompts)]
    return Drawn(tokens, near)
