"""Executes the nodes of a plan: in this process, or in workers side by side (contract 12).

A job of several processes walks the plan in lock-step: each makes its part of every node, and process 0 alone looks at
the store, decides and commits. Several runs may work on one workdir at once: the store's lock keeps two of them off one
node, and each takes what the other has made. A failed node costs what is below it and nothing else.
"""

import contextlib
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TextIO

from subjax.cpu import visible_cores
from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.files import StoreError
from subjax.parallel.processes import group
from subjax.progress import Progress, title
from subjax.schedule import Schedule
from subjax.store import Store
from subjax.workers import Event, Orders, Worker, batches_of, make_nodes, one_line, resolve

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from subjax.study import Plan

EXECUTE = "subjax.stages.execution:make"
TICK_S = 0.2
BUSY_POLL_S = 1.0
PATIENCE_S = {signal.SIGINT: 10.0, signal.SIGTERM: 25.0}  # a cluster kills about 30 s after its SIGTERM


class Interrupted(SubjaxError):
    """The run was stopped by Ctrl-C; the same command goes on from there."""

    exit_status = 130


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run: ids made here, ids that were there or came from another run, and why others are not."""

    made: tuple[str, ...]
    reused: tuple[str, ...]
    failed: dict[str, str]
    skipped: dict[str, str]
    seconds: float


def accelerator_visible() -> bool:
    """Say whether JAX would find a GPU or TPU here, without asking JAX, since that would take the device."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    gpu = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
    tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    if gpu and importlib.metadata.entry_points(group="jax_plugins"):  # a driver alone is no use to a CPU-only JAX
        return True
    return tpu and importlib.util.find_spec("libtpu") is not None


def worker_count(asked: int | None, cores: int = 1) -> int:
    """Settle the number of worker processes, 0 for this process alone; UsageError: several on an accelerator."""
    if accelerator_visible():
        if asked:
            raise UsageError(
                f"--workers={asked}: on a GPU or TPU one process owns the devices; leave --workers out, or set "
                "JAX_PLATFORMS=cpu to run on CPU workers"
            )
        return 0
    return max(1, visible_cores() // cores) if asked is None else asked


def node_record(plan: "Plan", id: str) -> dict[str, Any]:
    """Write a node as a stage reads it: JSON, each input with its kind."""
    node = plan.nodes[id]
    inputs = {role: [plan.nodes[needed].kind, needed] for role, needed in node.inputs.items()}
    return {
        "kind": node.kind, "version": node.version, "config": node.config, "inputs": inputs, "id": id,
        "label": node.label, "group": node.group, "tokens": node.tokens, "flops": node.flops, "hints": node.hints,
    }  # fmt: skip


def _cohort(node: Any) -> str:
    """The cohort that a node trains in here, or "": on CPU the cores are used as well by workers side by side."""
    cohort = node.hints.get("cohort")
    return cohort["id"] if cohort and (cohort["always"] or accelerator_visible()) else ""


class _Run:
    """The state of one call of `execute_plan`."""

    def __init__(
        self,
        plan: "Plan",
        store: Store,
        only: Collection[str] | None,
        progress_of: Callable[[list[Any]], Progress],
    ):
        self.plan, self.store = plan, store
        self.nodes = {id: node for id, node in plan.nodes.items() if only is None or id in only}
        self.made: list[str] = []
        there = [id for id, node in self.nodes.items() if group().first and store.card(node.kind, id) is not None]
        self.reused: list[str] = group().share("nodes that are there", there)
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.cohorts = {id: name for id, node in self.nodes.items() if (name := _cohort(node))}
        self.schedule = Schedule(self.nodes, set(self.reused), self.cohorts)
        self._check_inputs()
        self.progress = progress_of([self.nodes[id] for id in self.nodes if id in self.schedule.open])
        self.deaths: dict[str, int] = {}
        self.stop_signal: signal.Signals | None = None
        self.full = ""  # which disk is, when one is: no other node would fare better, so that ends the run
        self.next_poll = 0.0

    def _check_inputs(self) -> None:
        for id in self.schedule.open if group().first else ():
            for role, needed in self.nodes[id].inputs.items():
                if needed in self.nodes:
                    continue
                node = self.plan.nodes[needed]
                if self.store.card(node.kind, needed) is None:
                    raise UsageError(
                        f"{title(self.nodes[id])} ({id}): its {role}, {title(node)} ({needed}), is not made yet; "
                        f"make it first: subjax stage {needed}"
                    )

    def record(self, id: str) -> dict[str, Any]:
        """Write a node as a stage reads it, with its cohort if it trains in one here."""
        record = node_record(self.plan, id)
        if id not in self.cohorts:
            record["hints"] = {name: hint for name, hint in record["hints"].items() if name != "cohort"}
        return record

    def on(self, worker: int, event: Event) -> None:
        """Take in what a worker said of a node."""
        id = event.id
        if event.what == "started":
            self.progress.start(worker, self.plan.nodes[id])
        elif event.what == "progress":
            self.progress.tell(worker, event.done, event.total, event.text)
        else:
            self.progress.end(worker)
        if event.what in ("made", "found"):
            (self.made if event.what == "made" else self.reused).append(id)
            self.schedule.there(id)
            self.progress.count_out(id)
        elif event.what == "failed":
            if event.trace:
                self.progress.write(event.trace.rstrip())
            self.fail(id, event.text)
        elif event.what == "full":
            self.full = self.full or event.text
            self.schedule.again(id)
        elif event.what == "busy":
            self.schedule.foreign.add(id)
        elif event.what == "stopped":
            self.schedule.again(id)

    def fail(self, id: str, message: str) -> None:
        """Record a failure, and skip what needs the node."""
        node = self.plan.nodes[id]
        self.failed[id] = message
        self.progress.count_out(id)
        for user in self.schedule.give_up(id):
            self.skipped[user] = f"needs {title(node)} ({id}), which failed"
            self.progress.count_out(user)
        try:
            if group().first:
                self.store.record_failure(node.kind, id, message)
        except (SubjaxError, OSError) as error:  # a full disk must not hide the failure itself
            self.progress.write(f"subjax: the failure of {id} could not be recorded: {one_line(error)}")

    def lost(self, id: str, death: str) -> None:
        """Note that a worker died at a node: tried once more, then failed."""
        self.deaths[id] = self.deaths.get(id, 0) + 1
        if self.deaths[id] > 1:
            self.fail(id, f"{death}, twice; give it more memory, or fewer --workers")
            return
        self.progress.write(f"subjax: {title(self.plan.nodes[id])} ({id}): {death}; tried once more on a fresh worker")
        self.schedule.again(id)

    @property
    def ending(self) -> bool:
        """Whether nothing more is begun."""
        return self.stop_signal is not None or bool(self.full)

    def poll_foreign(self) -> None:
        """Look after the nodes that another run has: made, or free again because their owner is gone."""
        if not self.schedule.foreign or not group().share("time to look", time.monotonic() >= self.next_poll):
            return
        self.next_poll = time.monotonic() + BUSY_POLL_S
        found, free = group().share("foreign nodes", self._look() if group().first else None)
        for id in found:
            self.on(-1, Event("found", id))
        for id in free:
            self.schedule.again(id)

    def _look(self) -> tuple[list[str], list[str]]:
        """Of the nodes that another run has: those that are made, and those that nobody is at any more."""
        foreign = [(id, self.plan.nodes[id].kind) for id in sorted(self.schedule.foreign)]
        found = [id for id, kind in foreign if self.store.card(kind, id) is not None]
        return found, [id for id, kind in foreign if id not in found and self.store.owner(kind, id) is None]

    def stopped(self) -> SubjaxError:
        """Give the error that ends a run which was told to stop."""
        done, whole = len(self.made) + len(self.reused), len(self.nodes)
        how, error = ("SIGTERM", Preempted) if self.stop_signal == signal.SIGTERM else ("Ctrl-C", Interrupted)
        return error(f"stopped by {how}: {done} of {whole} nodes are made; the same command goes on from there")


@contextlib.contextmanager
def _signals(handlers: dict[signal.Signals, Callable[..., Any]]) -> Iterator[None]:
    """Handle signals for a while; an ignored one stays so, and only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    taken = {number for number in handlers if before[number] is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _run_here(run: _Run, execute_path: str, begin: "Callable[[], Mesh] | None") -> None:
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
        with _signals({signal.SIGTERM: on_signal, signal.SIGINT: on_signal}):
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


class _Pool:
    """The workers of a run: hands out batches, takes in events, replaces the dead."""

    def __init__(self, run: _Run, workers: int, cores: int, execute: str):
        self.run, self.cores, self.execute = run, cores, execute
        self.stillborn = 0
        self.hurry = False
        self.workers: dict[int, Worker] = {}
        self.size = min(workers, len(run.schedule.open))

    def go(self) -> None:
        """Run until all is made, failed or skipped, or a signal says stop."""
        with _signals({signal.SIGINT: self.on_signal, signal.SIGTERM: self.on_signal}):
            try:
                for index in range(self.size):
                    self.hire(index)
                while self.run.schedule.open and not self.run.ending:
                    self.run.poll_foreign()
                    self.hand_out()
                    self.take_in()
                if self.run.ending:
                    self.wind_down()
                for worker in self.workers.values():
                    worker.end()
            finally:
                for worker in self.workers.values():
                    worker.kill()

    def hire(self, index: int) -> None:
        """Start the worker with this index, in place of a dead one if there was one."""
        self.workers[index] = Worker(Orders(index, self.cores, str(self.run.store.root), self.execute, os.getpid()))

    def on_signal(self, number: int, _frame: Any) -> None:
        """Note the signal; the loop sees it within a tick. A second Ctrl-C means at once."""
        self.hurry = number == signal.SIGINT and self.run.stop_signal is not None
        self.run.stop_signal = self.run.stop_signal or signal.Signals(number)

    def wind_down(self) -> None:
        """Let the workers save what they are at, for a while; what is not begun they give back."""
        for worker in self.workers.values():
            worker.stop()
        deadline = time.monotonic() + PATIENCE_S[self.run.stop_signal or signal.SIGINT]
        while any(worker.batch for worker in self.workers.values()):
            if self.hurry or time.monotonic() > deadline:
                for worker in self.workers.values():
                    worker.kill()
                return
            self.take_in()

    def hand_out(self) -> None:
        """Give every idle worker a batch."""
        for worker in self.workers.values():
            if worker.ready and not worker.batch:
                others = {pair for other in self.workers.values() if other is not worker for pair in other.compiled}
                batch = self.run.schedule.take(worker.compiled, others, len(self.workers))
                if batch:
                    worker.hand([self.run.record(id) for id in batch])

    def take_in(self) -> None:
        """Wait a tick for events, and act on them."""
        wait([worker.pipe for worker in self.workers.values()], timeout=TICK_S)
        for worker in list(self.workers.values()):
            said, alive = worker.events()
            for event in said:
                if event.what == "broken":
                    self.run.progress.write(event.trace.rstrip())
                    raise SubjaxError(f"a worker could not start: {event.text}")
                worker.heard(event)
                self.run.on(worker.index, event)
            if not alive:
                self.bury(worker)
        self.run.progress.tick()

    def bury(self, worker: Worker) -> None:
        """Give back what a dead worker had, and put a fresh one in its place."""
        worker.kill()
        del self.workers[worker.index]
        self.run.progress.end(worker.index)
        for id in worker.batch:
            if id == worker.running:
                self.run.lost(id, worker.death())
            else:
                self.run.schedule.again(id)
        if not worker.ready:
            self.stillborn += 1
            if self.stillborn >= 3:
                raise SubjaxError(f"workers do not start: {worker.death()}; --workers=0 may show why")
        if not self.run.ending:
            self.hire(worker.index)


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
    run = _Run(plan, store, only, lambda todo: Progress(todo, min(count, len(todo)), quiet=quiet, stream=stream))
    try:
        if run.schedule.open and count:
            _Pool(run, count, cores, execute).go()
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
