"""Executes the nodes of a plan: in this process, or in workers side by side (contract 12).

A job of several processes walks the plan in lock-step: each makes its part of every node, and process 0 alone looks at
the store, decides and commits. Several runs may work on one workdir at once: the store's lock keeps two of them off one
node, and each takes what the other has made. A failed node costs what is below it and nothing else.
"""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TextIO

from subjax import accelerator
from subjax.cpu import visible_cores
from subjax.errors import UsageError
from subjax.files import StoreError
from subjax.parallel.processes import group
from subjax.pool import TICK_S, Pool
from subjax.progress import Progress
from subjax.run_state import Interrupted, RunState
from subjax.signals import handled
from subjax.store import Store
from subjax.workers import Event, batches_of, make_nodes, resolve

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from subjax.graph import Plan

EXECUTE = "subjax.stages.execution:make"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run: ids made here, ids that were there or came from another run, and why others are not."""

    made: tuple[str, ...]
    reused: tuple[str, ...]
    failed: dict[str, str]
    skipped: dict[str, str]
    seconds: float


def worker_count(asked: int | None, cores: int = 1) -> int:
    """Settle the number of worker processes, 0 for this process alone; UsageError: several on an accelerator."""
    if accelerator.visible():
        if asked:
            raise UsageError(
                f"--workers={asked}: on a GPU or TPU one process owns the devices; leave --workers out, or set "
                "JAX_PLATFORMS=cpu to run on CPU workers"
            )
        return 0
    return max(1, visible_cores() // cores) if asked is None else asked


def _run_here(run: RunState, execute_path: str, begin: "Callable[[], Mesh] | None") -> None:
    """Make the nodes one after another in this process; in a job of several, in step with the others."""
    together = group()

    def on_signal(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and (together.count == 1 or run.stop_signal is not None):
            raise KeyboardInterrupt
        run.stop_signal = run.stop_signal or signal.Signals(number)

    def emit(event: Event) -> None:
        run.on(0, event)
        run.progress.tick()

    compiled: set[tuple[str, str]] = set()
    try:
        with handled({signal.SIGTERM: on_signal, signal.SIGINT: on_signal}):
            execute = resolve(execute_path)
            if begin is not None:
                execute = functools.partial(execute, mesh=begin())  # type: ignore[call-arg]
            while run.schedule.open and not together.either(run.ending)[0]:
                run.poll_foreign()
                batch = run.schedule.take(compiled, (), 1)
                for records in batches_of([run.record(id) for id in batch]):
                    compiled.update((record["kind"], record["group"]) for record in records)
                    if not together.either(run.ending)[0]:
                        make_nodes(records, run.store, execute, emit, lambda: run.stop_signal is not None)
                if not batch:
                    run.progress.tick()
                    time.sleep(TICK_S)
    except KeyboardInterrupt:
        together.fail("stopped by Ctrl-C; the same command goes on from there", Interrupted.exit_status)
        run.stop_signal = signal.SIGINT
    told = [number for number in together.agree("signal", int(run.stop_signal or 0)) if number]
    run.stop_signal = signal.Signals(told[0]) if told else None


def execute_plan(
    plan: "Plan",
    store: Store,
    *,
    workers: int | None = None,
    cores: int = 1,
    quiet: bool = False,
    only: Collection[str] | None = None,
    execute: str = EXECUTE,
    stream: TextIO | None = None,
    begin: "Callable[[], Mesh] | None" = None,
) -> Outcome:
    """Make every node of `plan` (or of `only`) that the store has not, and what came of it.

    Args:
        plan: the graph; nodes in topological order.
        store: the workdir's store; workers open their own on the same root.
        workers: processes with `cores` cores each; None is as many as there are cores (none on a GPU or TPU), 0 makes
            the nodes in this process, which is not pinned then.
        cores: cores of a worker; it changes bits on CPU, and so is fixed.
        quiet: no bars; errors are still written.
        only: ids to make; what they need must be there.
        execute: "module:function" that makes one node, as `subjax.stages.execute` does.
        stream: where progress and errors go; stderr by default.
        begin: gives the mesh that nodes are made on, in this process; it is asked if there is a node to be made. None:
            one device, or workers with one each.

    Raises:
        UsageError: workers asked for on an accelerator, or with a mesh; a node of `only` lacks an input.
        Interrupted: Ctrl-C. Preempted: SIGTERM. Both after what ran could save its state.
        SubjaxError: workers do not start, or the disk is full.
    """
    begun = time.monotonic()
    count = worker_count(workers, cores)
    if begin is not None and workers:
        raise UsageError(
            f"--workers={workers}: a mesh of several devices, or a job of several processes, is made by this process"
            " alone; leave --workers out"
        )
    count = 0 if begin is not None else count
    run = RunState(plan, store, only, lambda todo: Progress(todo, min(count, len(todo)), quiet=quiet, stream=stream))
    try:
        if run.schedule.open and count:
            Pool(run, count, cores, execute).go()
        elif run.schedule.open:
            _run_here(run, execute, begin)
    finally:
        run.progress.close()
    if run.stop_signal is not None and run.schedule.open:
        raise run.stopped()
    if run.full:
        raise StoreError(run.full)
    seconds = time.monotonic() - begun
    return Outcome(tuple(run.made), tuple(run.reused), run.failed, run.skipped, seconds)
