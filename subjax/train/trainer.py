"""The trainer: one loop and one compiled step, in the roles of base, teacher and student.

A role is a weighted list of (loss, batch stream) and a `Tuning` that says which parameters move. Step `i` is a function
of (state, i) alone, so a run that was stopped and resumed takes the same steps as one that was not. Steps of a small
model are dispatched several at a time, scanned over in one program: alone, a tenth of each would be the host's.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from subjax.data.packing import Batch, Stream
from subjax.errors import Preempted, SubjaxError
from subjax.models import adapters, checkpoints
from subjax.models.network import Network, Params
from subjax.parallel.mesh import replicated
from subjax.parallel.rules import TRAIN, shardings
from subjax.schema import Optimizer, Tuning
from subjax.train.losses import Loss
from subjax.train.optimizers import make_optimizer

# One dispatch holds steps of up to so many FLOPs, a fraction of a second on one core, and up to so many steps.
DISPATCH_FLOPS, DISPATCH_STEPS = 2e10, 20


@dataclasses.dataclass(frozen=True)
class Term:
    """One part of the objective: weight x loss over the stream's batches."""

    name: str
    weight: float
    loss: Loss
    stream: Stream


@dataclasses.dataclass(frozen=True)
class Run:
    """How a fit is run, none of which changes its result: where it saves, whom it tells, when it stops."""

    mesh: Mesh
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None
    should_stop: Callable[[], bool] = lambda: False
    partial: epath.Path | None = None
    checkpoint_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A finished fit: the tuned arrays, a loss curve of about a hundred points, and the tokens that were seen."""

    tuned: Params
    curve: list[dict[str, float]]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a fit, shared by every run with the same static settings.

    `take` takes as many steps as its batches hold: (tuned, state, frozen, batches as `place` gives them) to (tuned,
    state, metrics, each of shape (steps,)). It donates tuned and state.
    """

    start: Callable[[Params], Any]
    take: Callable[..., tuple[Params, Any, dict[str, jax.Array]]]
    tuned_shardings: Mapping[str, Any]
    state_shardings: Any
    frozen_shardings: Mapping[str, Any]


@functools.lru_cache(maxsize=64)
def program(
    net: Network,
    tuning: Tuning,
    optimizer: Optimizer,
    steps: int,
    parts: tuple[tuple[str, float, Loss], ...],
    mesh: Mesh,
) -> Program:
    """Build (once) the jitted steps for static settings; `parts` are (name, weight, loss) of the objective."""
    rule = make_optimizer(optimizer, steps, adapters.matrix_axes(net, tuning))
    tuned_declared = adapters.tuned_axes(net, tuning)
    tuned_sh = shardings(TRAIN, mesh, tuned_declared)
    frozen_sh = shardings(
        TRAIN, mesh, {n: (d.shape, d.axes) for n, d in net.declarations.items() if n not in tuned_declared}
    )
    abstract = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (shape, _) in tuned_declared.items()}
    state_sh = _state_shardings(jax.eval_shape(rule.init, abstract), abstract, tuned_sh, replicated(mesh))

    # One device has nothing to split, and a constraint there would only stand in the way of fusion.
    held = {
        loss.axis: NamedSharding(mesh, TRAIN.spec((loss.axis, "length", "length"))) if mesh.size > 1 else None
        for _, _, loss in parts
    }

    def objective(tuned: Params, frozen: Params, batches: Mapping[str, Batch]):
        params, adapter = adapters.join(tuning, tuned, frozen)

        def model(rows: NamedSharding | None, tokens: jax.Array, valid: jax.Array, tail: int) -> jax.Array:
            return net.forward(params, tokens, valid, tail=tail, adapter=adapter, rows=rows)

        losses = {name: loss(functools.partial(model, held[loss.axis]), batches[name]) for name, _, loss in parts}
        total = sum((weight * losses[name] for name, weight, _ in parts), jnp.zeros(()))
        return total, losses

    def take(tuned: Params, state: Any, frozen: Params, batches: Mapping[str, Batch]):
        def step(carry: tuple[Params, Any], batch: Mapping[str, Batch]):
            tuned, state = carry
            (total, losses), gradient = jax.value_and_grad(objective, has_aux=True)(tuned, frozen, batch)
            updates, state = rule.update(gradient, state, tuned)
            metrics = {"loss": total, **losses, "gradient_norm": optax.tree.norm(gradient)}
            return (optax.apply_updates(tuned, updates), state), metrics

        (tuned, state), metrics = jax.lax.scan(step, (tuned, state), batches)
        return tuned, state, metrics

    jitted = jax.jit(take, donate_argnums=(0, 1), out_shardings=(tuned_sh, state_sh, replicated(mesh)))
    return Program(jax.jit(rule.init, out_shardings=state_sh), jitted, tuned_sh, state_sh, frozen_sh)


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


def place(block: Sequence[Mapping[str, Batch]], axes: Mapping[str, str], mesh: Mesh) -> dict[str, dict[str, jax.Array]]:
    """Put the host batches of successive steps on the mesh in one transfer.

    Args:
        block: for each step the batch of each term. axes: each term's logical axis of a batch's first dimension.

    Returns:
        For each term its arrays, (steps, *a batch's shape).
    """
    stacked = {t: {name: np.stack([step[t][name] for step in block]) for name in b} for t, b in block[0].items()}
    layout = {
        term: {name: _layout(mesh, axes[term], value.shape, name) for name, value in batch.items()}
        for term, batch in stacked.items()
    }
    return jax.device_put(stacked, layout)


@functools.lru_cache(maxsize=256)
def _layout(mesh: Mesh, axis: str, shape: tuple[int, ...], name: str) -> NamedSharding:
    return TRAIN.sharding(mesh, shape, ("step", axis, *("length",) * (len(shape) - 2)), name)


def dispatched(parameters: int, tokens: int, first: int, steps: int) -> int:
    """How many steps, of `tokens` tokens each, one dispatch holds in a run over `steps` steps from `first` on."""
    most = int(max(1, min(DISPATCH_STEPS, DISPATCH_FLOPS // (6 * parameters * tokens))))
    return max(n for n in range(1, most + 1) if steps % n == 0 and first % n == 0)


def _blocks(terms: Sequence[Term], parameters: int, first: int, steps: int) -> Iterator[list[dict[str, Batch]]]:
    """The batches of the steps from `first` on, in the blocks that are dispatched whole.

    A block's size follows from the node's settings alone, so that a resumed run goes through the same programs.
    """
    ahead = {t.name: t.stream(first) for t in terms}
    size = dispatched(parameters, sum(b["valid"].size for b in ahead.values()), first, steps)
    for start in range(first, steps, size):
        later = range(max(start, first + 1), start + size)
        yield [ahead] * (start == first) + [{t.name: t.stream(i) for t in terms} for i in later]


def fit(
    net: Network,
    base: Mapping[str, jax.Array],
    *,
    tuning: Tuning,
    optimizer: Optimizer,
    terms: Sequence[Term],
    steps: int,
    key: jax.Array,
    run: Run,
) -> Fitted:
    """Train for `steps` steps from `base` and return the tuned arrays.

    Args:
        net: the network; `base`: its parameters by name, which are not changed.
        tuning: what is trained; `key` draws the A matrices where it is LoRA.
        terms: the objective. Batches are placed on `run.mesh` by the training rules.
        run: mesh, checkpoints, progress.

    Raises:
        SubjaxError: a loss that is not a number: the step, and what to try.
        Preempted: `run.should_stop` came true; the state was saved under `run.partial`.
    """
    parts = tuple((t.name, t.weight, t.loss) for t in terms)
    compiled = program(net, tuning, optimizer, steps, parts, run.mesh)
    frozen = jax.device_put(adapters.frozen_part(net, tuning, base), dict(compiled.frozen_shardings))
    # A copy, because the step donates its input and the caller keeps its base.
    tuned = jax.tree.map(jnp.copy, adapters.init_tuned(net, tuning, base, key))
    tuned = jax.device_put(tuned, dict(compiled.tuned_shardings))
    state = compiled.start(tuned)
    axes = {t.name: t.loss.axis for t in terms}
    first, curve, tokens = 0, [], 0
    if run.partial is not None and (saved := _restore(run.partial, compiled, tuned, state)):
        first, tuned, state, curve, tokens = saved
    pending: tuple[int, dict[str, jax.Array]] | None = None
    last_save = time.monotonic()

    done = first
    for block in _blocks(terms, net.parameters, first, steps):
        tokens += sum(int(b["valid"].sum()) for batches in block for b in batches.values())
        tuned, state, metrics = compiled.take(tuned, state, frozen, place(block, axes, run.mesh))
        # The last block's numbers are read only after this one is under way, so the device never waits for the host.
        if pending is not None:
            _settle(*pending, steps, curve)
        pending = (done, metrics)
        done += len(block)
        run.progress(done, steps, "step")
        stop = run.should_stop()
        if run.partial is not None and (stop or time.monotonic() - last_save >= run.checkpoint_s) and done < steps:
            _settle(*pending, steps, curve)
            pending = None
            _save(run.partial, done, tuned, state, curve, tokens)
            last_save = time.monotonic()
        if stop and done < steps:
            raise Preempted(f"stopped at step {done} of {steps}; the same command goes on from there")
    if pending is not None:
        _settle(*pending, steps, curve)
    return Fitted(tuned, curve, tokens)


def _settle(first: int, metrics: Mapping[str, jax.Array], steps: int, curve: list[dict[str, float]]) -> None:
    """Read a block's metrics, add them to the curve (about a hundred points), and refuse what is not a number."""
    columns = jax.device_get(metrics)
    for index, row in enumerate(zip(*columns.values(), strict=True), start=first):
        values = {name: float(value) for name, value in zip(columns, row, strict=True)}
        # The gradient too: where it alone is not a number, the next loss would be, and the last step has no next one.
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                what = f"{name.replace('_', ' ')} is {values[name]} at step {index} of {steps}"
                raise SubjaxError(f"{what}; try a lower learning rate or clip")
        if index % max(1, steps // 100) == 0 or index == steps - 1:
            curve.append({"step": index, **values})


def _leaves(tuned: Params, state: Any) -> dict[str, jax.Array]:
    return {f"tuned/{n}": v for n, v in tuned.items()} | {f"state/{i}": v for i, v in enumerate(jax.tree.leaves(state))}


def _save(folder: epath.Path, step: int, tuned: Params, state: Any, curve: list, tokens: int) -> None:
    """Save the whole state after `step` steps, then drop older ones: there is always one whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    if target.exists():
        target.rmtree()
    checkpoints.save(target / "arrays", _leaves(tuned, state))
    (target / "progress.json").write_text(json.dumps({"step": step, "curve": curve, "tokens": tokens}))
    for old in folder.glob("step-*"):
        if old.name < target.name:
            old.rmtree()


def _restore(folder: epath.Path, compiled: Program, tuned: Params, state: Any) -> tuple | None:
    """The newest whole checkpoint under `folder`, onto the run's own shardings; None where there is none."""
    wanted = {f"tuned/{n}": s for n, s in compiled.tuned_shardings.items()}
    wanted |= {f"state/{i}": s for i, s in enumerate(jax.tree.leaves(compiled.state_shardings))}
    for path in sorted(folder.glob("step-*") if folder.exists() else [], reverse=True):
        # A checkpoint cut off by a crash is passed over: an older one, or the start, gives the same result.
        with contextlib.suppress(SubjaxError, OSError, ValueError, KeyError):
            progress = json.loads((path / "progress.json").read_text())
            arrays = checkpoints.load(path / "arrays", wanted)
            restored = {n: arrays[f"tuned/{n}"] for n in tuned}
            leaves = [arrays[f"state/{i}"] for i in range(len(jax.tree.leaves(state)))]
            rebuilt = jax.tree.unflatten(jax.tree.structure(state), leaves)
            return progress["step"], restored, rebuilt, progress["curve"], progress["tokens"]
    return None
