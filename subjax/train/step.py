"""The compiled step: losses, gradient and update of one training, or of a cohort's members in one program.

A cohort's members share the frozen weights, which are read once for all of their tokens; what is tuned, its optimizer's
state, the learning rate and the batch are each member's own, stacked along a first axis.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from subjax.data.packing import Batch
from subjax.models import adapters
from subjax.models.network import Adapter, Network, Params
from subjax.models.packed import Packing
from subjax.models.remat import Remat
from subjax.parallel.mesh import put, replicated
from subjax.parallel.processes import group
from subjax.parallel.rules import COHORT, TRAIN, Rules, shardings
from subjax.schema import Optimizer, Tuning
from subjax.train.cross_entropy import CPU_CHUNK, Head, cross_entropy, logits_at_a_time
from subjax.train.losses import Loss
from subjax.train.optimizers import make_optimizer


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a fit, shared by every run with the same static settings.

    `take` takes as many steps as its batches hold: (tuned, state, frozen, batches as `place` gives them) to (tuned,
    state, metrics, each of shape (steps,)). It donates tuned and state. A cohort's takes the members' learning rates,
    (members,), last, and its metrics have shape (steps, members).
    """

    start: Callable[[Params], Any]
    take: Callable[..., tuple[Params, Any, dict[str, jax.Array]]]
    tuned_shardings: Mapping[str, Any]
    state_shardings: Any
    frozen_shardings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The model in training, as losses see it.

    `rows` is the sharding of its residual stream, `chunk` how many logits of a packed row are there at a time.
    """

    net: Network
    params: Params
    adapter: Adapter
    rows: NamedSharding | None
    remat: Remat
    chunk: int = CPU_CHUNK

    def __call__(self, tokens: jax.Array, valid: jax.Array, tail: int) -> jax.Array:
        """Logits at the last `tail` positions, (batch, tail, vocab)."""
        return self.net.forward(self.params, tokens, valid, tail=tail, adapter=self.adapter, rows=self.rows)

    def next_token(
        self, tokens: jax.Array, packing: Packing, at: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """The weighted loss of packed rows, whose logits are never whole."""
        states = self.net.packed(
            self.params, tokens, packing, at, adapter=self.adapter, rows=self.rows, remat=self.remat
        )
        config = self.net.config
        head = Head(config.logit_cap, config.matmul_precision, self.rows, self.chunk)
        return cross_entropy(states, self.net.output_matrix(self.params), targets, weights, head)


@functools.lru_cache(maxsize=64)
def program(
    net: Network,
    tuning: Tuning,
    optimizer: Optimizer,
    steps: int,
    parts: tuple[tuple[str, float, Loss], ...],
    mesh: Mesh,
    remat: Remat = "none",
    members: int | None = None,
) -> Program:
    """Build (once) the jitted steps for static settings.

    Args:
        parts: (name, weight, loss) of the objective. remat: what backward passes over packed rows compute again.
        members: of a cohort: everything but the frozen weights has an axis of so many in front (in batches behind the
            step and the turn), which lies on the mesh's `replica` axis; None for one training alone.
    """
    rules = TRAIN if members is None else COHORT
    tuned_declared = adapters.tuned_axes(net, tuning)
    frozen = {n: (d.shape, d.axes) for n, d in net.declarations.items() if n not in tuned_declared}
    frozen_sh = shardings(rules, mesh, frozen)
    if members is not None:
        tuned_declared = {n: ((members, *shape), ("member", *axes)) for n, (shape, axes) in tuned_declared.items()}
    tuned_sh = shardings(rules, mesh, tuned_declared)
    rule = make_optimizer(optimizer, steps, adapters.matrix_axes(net, tuning))
    each = functools.partial(jax.vmap, spmd_axis_name="replica") if members is not None else lambda f, in_axes: f
    start = each(rule.init, in_axes=0)
    abstract = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (shape, _) in tuned_declared.items()}
    state_sh = _state_shardings(jax.eval_shape(start, abstract), abstract, tuned_sh, replicated(mesh))
    chunk = logits_at_a_time(mesh.devices.flat[0].platform, members or 1)
    descent = each(_descent(net, tuning, parts, mesh, rules, remat, chunk), in_axes=(0, None, 0))
    in_turns = frozenset(name for name, _, loss in parts if loss.axes[0] == "turn")

    def advance(tuned: Params, state: Any, gradient: Params, rate: jax.Array | None):
        own = make_optimizer(optimizer, steps, adapters.matrix_axes(net, tuning), rate)
        updates, state = own.update(gradient, state, tuned)
        return optax.apply_updates(tuned, updates), state, optax.tree.norm(gradient)

    advance_each = each(advance, in_axes=0)

    def take(tuned: Params, state: Any, frozen: Params, batches: Mapping[str, Batch], rates: jax.Array | None = None):
        def step(carry: tuple[Params, Any], batch: Mapping[str, Batch]):
            (total, losses), gradient = _over_turns(descent, in_turns, carry[0], frozen, batch)
            tuned, state, norm = advance_each(*carry, gradient, rates)
            return (tuned, state), {"loss": total, **losses, "gradient_norm": norm}

        (tuned, state), metrics = jax.lax.scan(step, (tuned, state), batches)
        return tuned, state, metrics

    jitted = jax.jit(take, donate_argnums=(0, 1), out_shardings=(tuned_sh, state_sh, replicated(mesh)))
    return Program(jax.jit(start, out_shardings=state_sh), jitted, tuned_sh, state_sh, frozen_sh)


def _descent(
    net: Network, tuning: Tuning, parts: Sequence[tuple[str, float, Loss]], mesh: Mesh, rules: Rules, remat: Remat,
    chunk: int,
) -> Callable[..., Any]:  # fmt: skip
    """(tuned, frozen, batches) to ((the weighted sum, each loss that there is a batch for), gradient)."""
    # One device has nothing to split, and a constraint there would only stand in the way of fusion.
    axes = {"batch", "question"} if mesh.size > 1 else set()
    held = {axis: NamedSharding(mesh, rules.spec((axis, "length", "length"))) for axis in axes}

    def objective(tuned: Params, frozen: Params, batches: Mapping[str, Batch]):
        params, adapter = adapters.join(tuning, tuned, frozen)
        losses = {}
        for name, _, loss in parts:
            if name in batches:
                rows = held.get(loss.axes[-1])
                losses[name] = loss(Bound(net, params, adapter, rows, remat, chunk), batches[name])
        total = sum((weight * losses[name] for name, weight, _ in parts if name in losses), jnp.zeros(()))
        return total, losses

    return jax.value_and_grad(objective, has_aux=True)


def _over_turns(
    descent: Callable[..., Any], in_turns: frozenset[str], tuned: Params, frozen: Params, batches: Mapping[str, Batch]
) -> Any:
    """Losses and gradient of a step; what comes in turns is added up in float32, one turn after another."""
    turns = {name: batches[name] for name in in_turns}
    rest = {name: batch for name, batch in batches.items() if name not in turns}
    first = jax.tree.map(lambda a: a[0], turns)
    if not turns or len(jax.tree.leaves(turns)[0]) == 1:
        return descent(tuned, frozen, rest | first)
    nothing = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))
    ((total, losses), gradient) = nothing(jax.eval_shape(descent, tuned, frozen, first))
    if rest:
        (total, others), gradient = descent(tuned, frozen, rest)
        losses = losses | others

    def add(so_far: Any, turn: Mapping[str, Batch]):
        (total, losses), gradient = so_far
        (part, parts_of), by_turn = descent(tuned, frozen, turn)
        losses = losses | {name: losses[name] + value for name, value in parts_of.items()}
        return ((total + part, losses), jax.tree.map(jnp.add, gradient, by_turn)), None

    return jax.lax.scan(add, ((total, losses), gradient), turns)[0]


def _state_shardings(
    state: Any, abstract: Mapping[str, jax.ShapeDtypeStruct], tuned: Mapping[str, Any], whole: NamedSharding
) -> Any:
    """Moments are sharded as their parameters are; counters and the like stand whole on every device.

    Told by the parameter's name in a leaf's path: optax's own map over moments does not know rules that look at names.
    """

    def pick(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in tuned]
        return tuned[names[-1]] if names and leaf.shape == abstract[names[-1]].shape else whole

    return jax.tree_util.tree_map_with_path(pick, state)


def place(
    block: Sequence[Mapping[str, Batch]], axes: Mapping[str, tuple[str, ...]], mesh: Mesh, rules: Rules = TRAIN
) -> dict[str, dict[str, jax.Array]]:
    """Put the host batches of successive steps on the mesh in one transfer.

    Args:
        block: for each step the batch of each term. axes: each term's logical axes of a batch's first dimensions.

    Returns:
        For each term its arrays, (steps, *a batch's shape).
    """
    stacked = {t: {name: np.stack([step[t][name] for step in block]) for name in b} for t, b in block[0].items()}
    layout = {
        term: {name: _layout(mesh, rules, axes[term], value.shape, name) for name, value in batch.items()}
        for term, batch in stacked.items()
    }
    if group().count > 1:  # every process has the whole batch, and puts its own devices' part of it
        return jax.tree.map(put, stacked, layout)
    return jax.device_put(stacked, layout)


@functools.lru_cache(maxsize=256)
def _layout(mesh: Mesh, rules: Rules, axes: tuple[str, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
    return rules.sharding(mesh, shape, ("step", *axes, *("length",) * (len(shape) - 1 - len(axes))), name)
