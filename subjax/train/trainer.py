"""The trainer: one loop and one compiled step, in the roles of base, teacher and student.

A role is a weighted list of (loss, batch stream) and a `Tuning` that says which parameters move. Step `i` is a function
of (state, i) alone, so a run that was stopped and resumed takes the same steps as one that was not. Steps of a small
model are dispatched several at a time, scanned over in one program: alone, a tenth of each would be the host's.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from subjax.data import packing
from subjax.data.packing import Batch, Stream, together
from subjax.errors import Preempted
from subjax.models import adapters
from subjax.models.network import Network, Params
from subjax.models.remat import Remat
from subjax.parallel.processes import group
from subjax.parallel.rules import TRAIN, Rules
from subjax.schema import Optimizer, Tuning
from subjax.train.ledger import Ledger
from subjax.train.losses import Loss
from subjax.train.resume import Saves, restore
from subjax.train.step import Program, place, program

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
    """How a fit is run, none of which changes its result beyond rounding: on what, what it keeps of packed rows for
    their gradients, where it saves, whom it tells, when it stops.
    """

    mesh: Mesh
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None
    should_stop: Callable[[], bool] = lambda: False
    partial: epath.Path | None = None
    checkpoint_s: float = 60.0
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A finished fit: the tuned arrays, a loss curve of about a hundred points, and the tokens that were seen."""

    tuned: Params
    curve: list[dict[str, float]]
    tokens: int


def dispatched(parameters: int, tokens: int, first: int, steps: int) -> int:
    """Steps of one dispatch, each of about `tokens` tokens (of all members), in a run over `steps` from `first` on."""
    most = int(max(1, min(DISPATCH_STEPS, DISPATCH_FLOPS // (6 * parameters * tokens))))
    return max(n for n in range(1, most + 1) if steps % n == 0 and first % n == 0)


def _blocks(terms: Sequence[Term], parameters: int, first: int, steps: int) -> Iterator[list[dict[str, Batch]]]:
    """The batches of the steps from `first` on, in the blocks that are dispatched whole.

    A block's size follows from the node's settings and its first batch, so that a resumed run, which begins where a
    block ended, goes through the same programs. (One that was saved on another mesh may have ended elsewhere.)
    """
    ahead = {t.name: t.stream(0) for t in terms}
    size = dispatched(parameters, sum(batch["tokens"].size for batch in ahead.values()), first, steps)
    for start in range(first, steps, size):
        known = ahead if start == 0 else {}
        block = {t.name: together(t.stream, range(start, start + size), known.get(t.name)) for t in terms}
        yield [{name: batches[i] for name, batches in block.items()} for i in range(size)]


def descend(
    compiled: Program,
    start: tuple[Params, Any],
    frozen: Params,
    *,
    terms: Sequence[Term],
    steps: int,
    parameters: int,
    run: Run,
    ledger: Ledger,
    rules: Rules = TRAIN,
    rates: jax.Array | None = None,
) -> Params:
    """Take the steps that are left, from `start` or from a checkpoint under `run.partial`, and give the tuned arrays.

    Args:
        compiled: the program; `start`: tuned arrays and optimizer state; `frozen`: what stays.
        parameters: of the network, for how many steps are dispatched at once.
        ledger: takes the readings of steps. rules: place the batches. rates: a cohort's learning rates.

    Raises:
        As `fit`.
    """
    (tuned, state), first = start, 0
    saves = Saves(run.partial) if run.partial is not None else None
    if run.partial is not None and (saved := restore(run.partial, compiled, tuned, state)):
        tuned, state, record = saved
        first = record["step"]
        ledger.load(record)
    axes = {t.name: t.loss.axes for t in terms}
    last_save, done = time.monotonic(), first
    for block in _blocks(terms, parameters, first, steps):
        placed = place(block, axes, run.mesh, rules)
        tuned, state, metrics = compiled.take(tuned, state, frozen, placed, *(() if rates is None else (rates,)))
        # The last block's numbers are read only after this one is under way, so the device never waits for the host.
        ledger.settle()
        ledger.expect(done, metrics, sum(_tokens(batches, axes) for batches in block))
        done += len(block)
        run.progress(done, steps, "step")
        stop = run.should_stop()
        # Clocks differ between processes, and a save is made by all of them together.
        (due,) = group().either(time.monotonic() - last_save >= run.checkpoint_s)
        if saves is not None and (stop or due) and done < steps:
            ledger.settle()
            saves.save(done, tuned, state, ledger.record())
            last_save = time.monotonic()
        if stop and done < steps:
            if saves is not None:
                saves.wait()
            raise Preempted(f"stopped at step {done} of {steps}; the same command goes on from there")
    ledger.settle()
    if saves is not None:
        saves.wait()
    return tuned


def _tokens(batches: Mapping[str, Batch], axes: Mapping[str, tuple[str, ...]]) -> Any:
    """Tokens of one step's batches, (members,), or (1,) of one training alone."""
    member = {name: of.index("member") if "member" in of else None for name, of in axes.items()}
    return sum(packing.tokens_of(batch, member[name]) for name, batch in batches.items())


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
    compiled = program(net, tuning, optimizer, steps, parts, run.mesh, run.remat)
    frozen = jax.device_put(adapters.frozen_part(net, tuning, base), dict(compiled.frozen_shardings))
    tuned = _begun(net, tuning, base, key, compiled)
    ledger = Ledger(steps)
    tuned = descend(
        compiled, (tuned, compiled.start(tuned)), frozen, terms=terms, steps=steps, parameters=net.parameters, run=run,
        ledger=ledger,
    )  # fmt: skip
    return Fitted(tuned, ledger.curves[0], ledger.tokens[0])


def _begun(net: Network, tuning: Tuning, base: Mapping[str, jax.Array], key: jax.Array, compiled: Program) -> Params:
    """The tuned arrays at the start: a copy, because the step donates its input and the caller keeps its base."""
    if len(jax.tree.leaves(compiled.tuned_shardings)[0].device_set) == 1:
        tuned = jax.tree.map(jnp.copy, adapters.init_tuned(net, tuning, base, key))
        return jax.device_put(tuned, dict(compiled.tuned_shardings))
    needed = {} if tuning.kind == "lora" else {name: base[name] for name in compiled.tuned_shardings}
    begin = jax.jit(
        lambda base, key: jax.tree.map(jnp.copy, adapters.init_tuned(net, tuning, base, key)),
        out_shardings=dict(compiled.tuned_shardings),
    )
    return begin(needed, key)
