"""Worker processes of the executor: each pinned to its cores before JAX is imported, none outliving the run.

A worker is a spawned process that is handed batches of node records, makes them one by one and says what happened.
Both directions are pipes: the parent sends `("batch", records)`, `("stop",)` and `("end",)`; a worker sends `Event`s.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import multiprocessing
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Literal

from subjax import log_lines
from subjax.cpu import pin
from subjax.errors import Preempted, SubjaxError, bug, one_line
from subjax.files import DiskFull
from subjax.parallel.processes import group
from subjax.store import Busy, Store

PROGRESS_INTERVAL_S = 0.2
# Given one record, or several of a cohort's members.
Execute = Callable[[Any, Store, Callable[[int, int, str], None], Callable[[], bool]], Any]


@dataclasses.dataclass(frozen=True)
class Event:
    """What a worker says: about itself (`ready`, `broken`), or about the node `id` (all others).

    `found`: another run had made it. `stopped`: asked to stop before it was done. `text` is the failure in one line,
    which disk is `full`, the owner of a `busy` node, or the unit of `done` and `total`; `trace` is there when the
    failure is a bug.
    """

    what: Literal["ready", "broken", "started", "progress", "made", "found", "failed", "full", "busy", "stopped"]
    id: str = ""
    text: str = ""
    trace: str = ""
    done: int = 0
    total: int = 0


@dataclasses.dataclass(frozen=True)
class Orders:
    """What a worker is started with; `execute` is "package.module:function", imported after the pinning."""

    index: int
    cores: int
    root: str
    execute: str
    parent: int


def resolve(path: str) -> Execute:
    """Import "package.module:function"."""
    module, _, name = path.partition(":")
    function: Execute = getattr(importlib.import_module(module), name)
    return function


def batches_of(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What of a batch is made at once: a cohort's members together, every other node by itself."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        cohort = record["hints"].get("cohort")
        found.setdefault(cohort["id"] if cohort else record["id"], []).append(record)
    return list(found.values())


def make_nodes(
    records: list[dict[str, Any]],
    store: Store,
    execute: Execute,
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> None:
    """Make a node, or the members of a cohort, and say by `emit` how it went; nothing but KeyboardInterrupt is raised.

    `execute` is given the records of a cohort's members as a list, and then gives what became of each.
    """
    ids = [record["id"] for record in records]
    last = -PROGRESS_INTERVAL_S

    def progress(done: int, total: int, unit: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S:
            last = now
            for id in ids:
                emit(Event("progress", id, unit, done=done, total=total))

    for id in ids:
        emit(Event("started", id))
    try:
        found = _made(store, records)
        for id in found:
            emit(Event("found", id))
        records, ids = [r for r in records if r["id"] not in found], [id for id in ids if id not in found]
        if not ids:
            return
        if "cohort" in records[0]["hints"]:
            outcomes = execute(records, store, progress, should_stop)
        else:
            execute(records[0], store, progress, should_stop)
            outcomes = {}
    except Exception as error:
        outcomes = dict.fromkeys(ids, error)
    for id in ids:
        emit(_outcome(id, outcomes.get(id)))


def _made(store: Store, records: list[dict[str, Any]]) -> set[str]:
    """Which nodes are there already; in a job of several processes, process 0 looks and all hear of it."""
    found: list[str] = []
    failure: Exception | None = None
    if group().first:
        try:
            found = [record["id"] for record in records if store.card(record["kind"], record["id"]) is not None]
        except Exception as error:  # it is shared too: the others wait for a word
            failure = error
    there, failed = group().share("there", [found, failure and one_line(failure)])
    if failure is not None:
        raise failure
    if failed:
        raise SubjaxError(f"process 0: {failed}")
    return set(there)


def _outcome(id: str, result: Any) -> Event:
    """What to say of a node, by what was raised for it; anything else means that it is made."""
    if isinstance(result, Preempted):
        return Event("stopped", id)
    if isinstance(result, Busy):
        return Event("busy", id, one_line(result))
    if isinstance(result, DiskFull):
        return Event("full", id, one_line(result))
    if isinstance(result, SubjaxError):
        return Event("failed", id, one_line(result))
    if isinstance(result, Exception):  # a bug of the stage: the run goes on, the traceback is shown
        return Event("failed", id, bug(result), "".join(traceback.format_exception(result)))
    return Event("made", id)


# ---------------------------------------------------------------------------------------------- in the worker's process


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, so that no orphan holds a lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


class _Mouth:
    """Sends events; a parent that is gone ends this process, one that does not read loses only progress."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def __call__(self, event: Event) -> None:
        try:
            if event.what == "progress" and not select.select([], [self.pipe], [], 0)[1]:
                return
            self.pipe.send(event)
        except OSError:
            os._exit(1)


def _listen(pipe: Connection, batches: "queue.SimpleQueue[list[dict[str, Any]] | None]", stop: threading.Event) -> None:
    """Read the parent's orders as they come, so that its pipe never fills; end the process when the parent is gone."""
    while True:
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        if order[0] == "batch":
            batches.put(order[1])
        elif order[0] == "stop":
            stop.set()
        else:
            batches.put(None)
            return


def serve(pipe: Connection, orders: Orders) -> None:
    """Be a worker: pin, import, then make batches until told to end. The target of `Worker`'s process."""
    _die_with(orders.parent)
    log_lines.show()
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes it on as a stop
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    pin(orders.index, orders.cores)
    emit = _Mouth(pipe)
    batches: queue.SimpleQueue[list[dict[str, Any]] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, batches, stop), daemon=True, name="orders").start()
    try:
        execute = resolve(orders.execute)
        store = Store(orders.root)
    except Exception as error:
        emit(Event("broken", text=f"{type(error).__name__}: {one_line(error)}", trace=traceback.format_exc()))
        return
    emit(Event("ready"))
    while (batch := batches.get()) is not None:
        for records in batches_of(batch):
            if not stop.is_set():
                make_nodes(records, store, execute, emit, stop.is_set)
            else:
                for record in records:
                    emit(Event("stopped", record["id"]))
        if stop.is_set():  # SIGTERM for this process alone: the parent puts another in its place
            return


# ---------------------------------------------------------------------------------------------- in the parent's process


def start_tracker() -> None:
    """Start Python's tracker of shared resources, silent: what a killed worker leaves it removes.

    It would say so (of a library's semaphores) behind a run's last line. It takes the warning options of its start.
    """
    quiet = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while a process is started: it begins with them blocked until it can take them."""
    start_tracker()  # starting it unblocks both, so before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """The parent's side of one worker process."""

    def __init__(self, orders: Orders):
        self.index = orders.index
        self.batch: list[str] = []  # ids handed over and not yet answered, in order
        self.compiled: set[tuple[str, str]] = set()  # (kind, group) of what it was handed
        self.running: set[str] = set()  # the id that it is at; of a cohort, its members
        self.ready = False
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        with _signals_held():
            self.process = spawn.Process(target=serve, args=(theirs, orders), name=f"subjax-worker-{self.index}")
            self.process.start()
        theirs.close()  # else a dead worker's end would stay open here, and its death go unnoticed

    def hand(self, records: list[dict[str, Any]]) -> None:
        """Hand over a batch; a worker that has died meanwhile is noticed by `events`."""
        self.batch.extend(record["id"] for record in records)
        self.compiled.update((record["kind"], record["group"]) for record in records)
        self._tell(("batch", records))

    def stop(self) -> None:
        """Ask for a stop: what runs may save its state, what has not begun is given back."""
        self._tell(("stop",))

    def heard(self, event: Event) -> None:
        """Keep the books on what it is at."""
        if event.what == "ready":
            self.ready = True
        elif event.what == "started":
            self.running.add(event.id)
        elif event.what != "progress":
            self.running.discard(event.id)
            self.batch.remove(event.id)

    def events(self) -> tuple[list[Event], bool]:
        """Read what it has said so far; the second value is whether it lives."""
        alive = self.process.is_alive()  # asked first: what a dead one said before is all in the pipe
        said: list[Event] = []
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                said.append(self.pipe.recv())
            return said, alive
        self.process.join(5)
        return said, False

    def death(self) -> str:
        """Say how it ended, for people."""
        code = self.process.exitcode
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = "unnamed"
            hint = " (out of memory, or kill -9)" if -code == signal.SIGKILL else ""
            return f"the worker was killed by signal {-code}, {name}{hint}"
        return f"the worker ended by itself with status {code}"

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def end(self, patience_s: float = 5.0) -> None:
        """Let an idle worker end; one that does not is killed."""
        self._tell(("end",))
        self.process.join(patience_s)
        self.kill()

    def _tell(self, order: tuple[Any, ...]) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(order)
