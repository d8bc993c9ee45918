"""An attempt at a node in a job of several processes: one look, one lock, one answer, and one end for all."""

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

from etils import epath

from subjax import files
from subjax.errors import Preempted, SubjaxError, UsageError, bug, one_line
from subjax.files import DiskFull
from subjax.parallel.processes import PATIENCE_S, group
from subjax.store import Build, Busy, Card, Owner, Store

T = TypeVar("T")


@dataclasses.dataclass
class Follower:
    """What another process than 0 has of an attempt that process 0 made: its payload, and the checkpoints under way.

    `folder` is a scratch folder: what a stage writes there of its own is process 0's to write.
    """

    folder: epath.Path
    payload: epath.Path
    partial: epath.Path
    committed: Card | None = None

    def commit(self, card: Card) -> None:
        """Leave it to process 0."""
        self.committed = card


@contextlib.contextmanager
def attempt(store: Store, kind: str, node: str) -> Iterator[Build | Follower]:
    """`store.build`, in a job of several processes by process 0 for all: there is one look, one lock, one answer."""
    together = group()
    if not together.first:
        what, found = together.share("attempt")
        if what == "busy":
            raise Busy(f"{kind}/{node}", Owner(**found))
        if what == "failed":
            raise SubjaxError(found)
        committed = store.card(kind, node) if what == "there" else None
        partial = store.root / "partial" / f"{kind}-{node}"
        with files.full_told(store.root), following(epath.Path(found), partial, committed) as follower:
            yield follower
        return
    with contextlib.ExitStack() as stack:
        try:
            build = stack.enter_context(store.build(kind, node))
        except Busy as busy:
            together.share("attempt", ["busy", dataclasses.asdict(busy.owner)])
            raise
        except SubjaxError as error:
            together.share("attempt", ["failed", str(error)])
            raise
        there = build.committed is not None
        together.share("attempt", ["there" if there else "make", os.fspath(build.folder)])
        yield build


@contextlib.contextmanager
def following(payload: epath.Path, partial: epath.Path, committed: Card | None = None) -> Iterator[Follower]:
    """A `Follower` with a scratch folder, which goes at the end; also for a node that trains along, uncommitted."""
    scratch = epath.Path(tempfile.mkdtemp(prefix="subjax-"))
    try:
        yield Follower(scratch, payload, partial, committed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_KINDS: dict[str, type[SubjaxError]] = {kind.__name__: kind for kind in (Preempted, DiskFull, UsageError)}


def _told(error: Exception) -> dict[str, str]:
    """A failure as the other processes hear of it: in one line, its kind, and the traceback of a bug."""
    kind = type(error).__name__
    if isinstance(error, SubjaxError):
        return {"failed": one_line(error), "kind": kind}
    return {"failed": bug(error), "kind": kind, "trace": "".join(traceback.format_exception(error))}


def in_step(make: Callable[[], T]) -> T:
    """Do what all processes do, and end it alike in all: with process 0's card, or with one and the same failure.

    One that fails while the others are in the middle of a computation that needs it ends the job, after a while.
    """
    together = group()
    failure: Exception | None = None
    outcome: dict[str, str] = {}
    try:
        made = make()
    except Exception as error:
        failure = error
        outcome = _told(error)

    def lose_patience() -> None:
        print(outcome.get("trace", ""), end="", file=sys.stderr, flush=True)
        together.fail(outcome["failed"], 1)

    patience = threading.Timer(PATIENCE_S, lose_patience)
    patience.daemon = True
    if failure is not None:
        patience.start()
    outcomes = together.agree("outcome", outcome)
    patience.cancel()
    failed = [(index, found) for index, found in enumerate(outcomes) if found]
    if not failed:
        return made
    index, first = failed[0]
    if failure is not None and outcome["kind"] == first["kind"]:
        raise failure
    where = f"process {index}: " if len(failed) < together.count else ""
    if failure is None and together.first and "trace" in first:
        print(first["trace"], end="", file=sys.stderr, flush=True)
    raise _KINDS.get(first["kind"], SubjaxError)(f"{where}{first['failed']}") from failure
