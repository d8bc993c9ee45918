"""How a node is made and committed, whatever its kind."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from etils import epath
from jax.sharding import Mesh

from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.files import DiskFull
from subjax.parallel.mesh import make_mesh
from subjax.parallel.processes import PATIENCE_S, group
from subjax.stages import VERSIONS, version_of
from subjax.stages.task import Made, Task
from subjax.store import Build, Busy, Card, Owner, Store, digest_json, digest_rows

_PACKAGES = ("subjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets")


def profile(mesh: Mesh) -> dict[str, Any]:
    """The numerics profile: what decides the last bits of a result beside the node's own settings."""
    devices = mesh.devices.flatten().tolist()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "processes": len({device.process_index for device in devices}),
        "order": [d.id for d in devices],
        "mesh": dict(mesh.shape),
        "cores": cores,
        "machine": platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
    }


def _stage(kind: str, config: Mapping[str, Any]) -> Any:
    if kind not in VERSIONS:
        raise UsageError(f"unknown kind of node {kind!r}; known: {', '.join(VERSIONS)}")
    # The synthetic world's nodes say nothing of a language: its models know no other.
    return importlib.import_module(f"subjax.stages.{'text_' if config.get('language') == 'text' else ''}{kind}")


def execute(
    record: Mapping[str, Any],
    store: Store,
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> Card:
    """Make and commit one planned node, and return its card; a node that is committed already is left as it is.

    In a job of several processes all of them call this, for the same node: all compute, process 0 commits, and what one
    of them raises all raise.

    Args:
        record: the node as a plan holds it: kind, id, version, config, inputs (role -> [kind, id]), label.
        store: where its inputs are and it goes.
        progress: told (done, total, unit). should_stop: true, in any process, asks for a checkpoint and an end.
        mesh: the devices that it is made on; one, where None.

    Raises:
        Busy: another live process is making it. SubjaxError: it could not be made; the node is named.
    """
    mesh = mesh or make_mesh()
    if group().count == 1:
        return _execute(record, store, progress, should_stop, mesh)
    return _in_step(lambda: _execute(record, store, progress, lambda: group().either(should_stop())[0], mesh))


def _execute(
    record: Mapping[str, Any],
    store: Store,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
    mesh: Mesh,
) -> Card:
    kind, node = record["kind"], record["id"]
    inputs = {role: (k, i) for role, (k, i) in record["inputs"].items()}
    if record["version"] != version_of(kind, record["config"]):
        raise UsageError(f"{kind} {node} was planned by another version of subjax; run `subjax plan` again")
    with _attempt(store, kind, node) as build:
        if build.committed is not None:
            return build.committed
        hints = record.get("hints", {})
        task = Task(kind, node, record["config"], inputs, store, build, progress, should_stop, hints, mesh)
        started = time.monotonic()
        try:
            cards = {role: task.input_card(role) for role in inputs}
            made: Made = _stage(kind, record["config"]).make(task)
        except SubjaxError as error:
            raise error.within(f"{record.get('label') or kind} ({kind} {node})") from error
        card = Card(
            format=1,
            kind=kind,
            id=node,
            version=record["version"],
            config=dict(record["config"]),
            inputs={r: {"kind": c.kind, "id": c.id, "digest": c.digest} for r, c in cards.items()},
            seeds=made.seeds,
            packages={p: importlib.metadata.version(p) for p in _PACKAGES},
            profile=profile(task.mesh),
            wall_s=round(time.monotonic() - started, 3),
            tokens=made.tokens,
            metrics=made.metrics,
            files={},
            digest=made.digest,
            payload="",
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            extra={**made.extra, "label": record.get("label", "")},
        )
        build.commit(card)
        assert build.committed is not None
        return build.committed


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
def _attempt(store: Store, kind: str, node: str) -> Iterator[Build | Follower]:
    """`store.build`, in a job of several processes by process 0 for all: there is one look, one lock, one answer."""
    together = group()
    if not together.first:
        what, found = together.share("attempt")
        if what == "busy":
            raise Busy(f"{kind}/{node}", Owner(**found))
        if what == "failed":
            raise SubjaxError(found)
        scratch = epath.Path(tempfile.mkdtemp(prefix="subjax-"))
        committed = store.card(kind, node) if what == "there" else None
        try:
            yield Follower(scratch, epath.Path(found), store.root / "partial" / f"{kind}-{node}", committed)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
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


_KINDS: dict[str, type[SubjaxError]] = {kind.__name__: kind for kind in (Preempted, DiskFull, UsageError)}


def _in_step(make: Callable[[], Card]) -> Card:
    """Do what all processes do, and end it alike in all: with process 0's card, or with one and the same failure.

    One that fails while the others are in the middle of a computation that needs it ends the job, after a while.
    """
    together = group()
    failure: Exception | None = None
    outcome: dict[str, Any] = {}
    try:
        card = make()
    except Exception as error:
        failure = error
        outcome = {"failed": " ".join(str(error).split()) or type(error).__name__, "kind": type(error).__name__}
    patience = threading.Timer(PATIENCE_S, lambda: together.fail(outcome["failed"], 1))
    patience.daemon = True
    if failure is not None:
        patience.start()
    outcomes = together.agree("outcome", outcome)
    patience.cancel()
    failed = [(index, found) for index, found in enumerate(outcomes) if found]
    if not failed:
        return card
    index, first = failed[0]
    if failure is not None and outcome["kind"] == first["kind"]:
        raise failure
    where = f"process {index}: " if len(failed) < together.count else ""
    raise _KINDS.get(first["kind"], SubjaxError)(f"{where}{first['failed']}") from failure


def digest(card: Card, folder: epath.Path) -> str:
    """The canonical digest of a payload as it is on disk now, by the card's kind.

    Raises:
        SubjaxError: the payload cannot be read.
    """
    from subjax.models import checkpoints
    from subjax.stages import corpus, models, text_base, text_corpus

    if (folder / models.ARRAYS).exists():
        return checkpoints.digest(folder / models.ARRAYS)
    if card.kind == "corpus":
        rows = text_corpus if card.config.get("language") == "text" else corpus
        return rows.digest(*rows.read(folder))
    if card.kind == "ensemble":
        return digest_rows(json.loads((folder / "results.json").read_text())["rows"])
    # Readings, or what stands for weights: a checkpoint's record, a system prompt.
    [path] = [path for path in folder.iterdir() if path.suffix == ".json"]
    record = json.loads(path.read_text())
    return text_base.digest(record) if card.kind == "base" else digest_json(record)
