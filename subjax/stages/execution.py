"""How a node is made and committed, whatever its kind."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from etils import epath
from jax.sharding import Mesh

from subjax import files
from subjax.errors import SubjaxError, UsageError
from subjax.parallel.mesh import make_mesh
from subjax.parallel.processes import group
from subjax.stages import VERSIONS, version_of
from subjax.stages.attempt import Follower, attempt, following, in_step
from subjax.stages.task import Made, Task
from subjax.store import Build, Busy, Card, Store, digest_json, digest_rows
from subjax.train.cohort import Dropped

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


def make(
    records: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    store: Store,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
    mesh: Mesh | None = None,
) -> Card | dict[str, Card | SubjaxError]:
    """What the executor calls: `execute` for one node, `execute_cohort` for a list of them."""
    if isinstance(records, Mapping):
        return execute(records, store, progress, should_stop, mesh)
    return execute_cohort(records, store, progress, should_stop, mesh)


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
    return in_step(lambda: _execute(record, store, progress, lambda: group().either(should_stop())[0], mesh))


def execute_cohort(
    records: Sequence[Mapping[str, Any]],
    store: Store,
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    should_stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> dict[str, Card | SubjaxError]:
    """`execute` for nodes that train together in one program: of each its card, or why there is none.

    Members that are committed already, or that another process is making, are left out; the rest goes on.

    Raises:
        Preempted: asked to stop; the members' state was saved. SubjaxError: what no member survived.
    """
    mesh = mesh or make_mesh()
    if group().count == 1:
        return _execute_cohort(records, store, progress, should_stop, mesh)
    stop = lambda: group().either(should_stop())[0]  # noqa: E731
    return in_step(lambda: _execute_cohort(records, store, progress, stop, mesh))


def _execute_cohort(
    records: Sequence[Mapping[str, Any]],
    store: Store,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
    mesh: Mesh,
) -> dict[str, Card | SubjaxError]:
    """Members that an earlier attempt had begun go on as they were together then; the others are their own program."""
    hint = records[0].get("hints", {}).get("cohort")
    name = hint["id"] if hint else digest_json(sorted(record["id"] for record in records))[:12]
    folder = store.root / "partial" / f"cohort-{name}"
    begun = _begun(folder)
    outcomes: dict[str, Card | SubjaxError] = {}
    wanted = {record["id"] for record in records}
    if wanted & {record["id"] for record in begun}:
        outcomes |= _train_together(begun, wanted, folder, store, progress, should_stop, mesh)
    rest = [record for record in records if record["id"] not in outcomes]
    if len(rest) > 1:
        outcomes |= _train_together(rest, set(), folder, store, progress, should_stop, mesh)
    elif rest:
        try:
            outcomes[rest[0]["id"]] = _execute(rest[0], store, progress, should_stop, mesh)
        except SubjaxError as error:
            outcomes[rest[0]["id"]] = error
    return outcomes


_MEMBERS = "members.json"


def _begun(folder: epath.Path) -> list[Any]:
    """Records of the members that an attempt began to train, in their order; process 0 looks for all."""
    text = "[]"
    if group().first:
        with contextlib.suppress(OSError):
            text = (folder / _MEMBERS).read_text()
    with contextlib.suppress(ValueError):
        return list(json.loads(group().share("members of a cohort", text)))
    return []


def _attempted(
    stack: contextlib.ExitStack, records: Sequence[Mapping[str, Any]], store: Store
) -> tuple[dict[str, Build | Follower], dict[str, Card | SubjaxError]]:
    """Attempts at the nodes that can be made here, held on `stack`; of the others the card, or who has them."""
    own: dict[str, Build | Follower] = {}
    outcomes: dict[str, Card | SubjaxError] = {}
    for record in records:
        _require_planned_here(record)
        try:
            build = stack.enter_context(attempt(store, record["kind"], record["id"]))
        except Busy as busy:
            outcomes[record["id"]] = busy
            continue
        if build.committed is None:
            own[record["id"]] = build
        else:
            outcomes[record["id"]] = build.committed
    return own, outcomes


def _train_together(
    records: Sequence[Mapping[str, Any]],
    wanted: Collection[str],
    folder: epath.Path,
    store: Store,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
    mesh: Mesh,
) -> dict[str, Card | SubjaxError]:
    """Train members in one program and commit them.

    Args:
        records: the members. wanted: of a training that had begun, those that are still to be committed; the others
            train along once more, so that the result is that of an uninterrupted run. Empty: one that begins, with
            those of `records` that nobody else has.
        folder: for checkpoints of all members together; it goes when they are committed.
    """
    with contextlib.ExitStack() as stack:
        own, outcomes = _attempted(stack, [r for r in records if not wanted or r["id"] in wanted], store)
        if not own:
            return outcomes
        tasks: list[Task] = []
        for record in records:
            build = own.get(record["id"])
            if build is None and wanted:
                along = folder / f"aside-{record['id']}"
                build = stack.enter_context(following(along, along / "partial"))
            if build is not None:
                tasks.append(_task(record, store, build, progress, should_stop, mesh))
        by_id = {record["id"]: record for record in records}
        if group().first and not wanted:
            with files.writing(folder):
                if folder.exists():  # of a cohort that none of these was in
                    folder.rmtree()
                folder.mkdir(parents=True)
                files.write_over(folder / _MEMBERS, json.dumps([by_id[task.id] for task in tasks]))
        group().barrier("cohort begins")
        started = time.monotonic()
        stage = _stage(tasks[0].kind, tasks[0].config)
        found: list[Made | Dropped] = stage.make_cohort(tasks, folder)
        for task, made in zip(tasks, found, strict=True):
            if task.id not in own:
                continue
            record = by_id[task.id]
            if isinstance(made, Dropped):
                outcomes[task.id] = SubjaxError(made.reason).within(_name(record))
                continue
            card = _card(record, task, made, time.monotonic() - started, cohort=[other.id for other in tasks])
            task.build.commit(card)
            assert task.build.committed is not None
            outcomes[task.id] = task.build.committed
        if group().first:
            folder.rmtree()
    return outcomes


def _require_planned_here(record: Mapping[str, Any]) -> None:
    kind, node = record["kind"], record["id"]
    if record["version"] != version_of(kind, record["config"]):
        raise UsageError(f"{kind} {node} was planned by another version of subjax; run `subjax plan` again")


def _name(record: Mapping[str, Any]) -> str:
    return f"{record.get('label') or record['kind']} ({record['kind']} {record['id']})"


def _task(
    record: Mapping[str, Any], store: Store, build: Build | Follower, progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool], mesh: Mesh,
) -> Task:  # fmt: skip
    inputs = {role: (k, i) for role, (k, i) in record["inputs"].items()}
    return Task(
        record["kind"],
        record["id"],
        record["config"],
        inputs,
        store,
        build,
        progress,
        should_stop,
        record.get("hints", {}),
        mesh,
    )


def _card(record: Mapping[str, Any], task: Task, made: Made, seconds: float, cohort: Sequence[str] = ()) -> Card:
    cards = {role: task.input_card(role) for role in task.inputs}
    return Card(
        format=1,
        kind=task.kind,
        id=task.id,
        version=record["version"],
        config=dict(record["config"]),
        inputs={r: {"kind": c.kind, "id": c.id, "digest": c.digest} for r, c in cards.items()},
        seeds=made.seeds,
        packages={p: importlib.metadata.version(p) for p in _PACKAGES},
        profile=profile(task.mesh),
        wall_s=round(seconds, 3),
        tokens=made.tokens,
        metrics=made.metrics,
        files={},
        digest=made.digest,
        payload="",
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        extra={**made.extra, "label": record.get("label", ""), **({"cohort": list(cohort)} if cohort else {})},
    )


def _execute(
    record: Mapping[str, Any],
    store: Store,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
    mesh: Mesh,
) -> Card:
    _require_planned_here(record)
    with attempt(store, record["kind"], record["id"]) as build:
        if build.committed is not None:
            return build.committed
        task = _task(record, store, build, progress, should_stop, mesh)
        started = time.monotonic()
        try:
            for role in task.inputs:
                task.input_card(role)
            made: Made = _stage(task.kind, task.config).make(task)
        except SubjaxError as error:
            raise error.within(_name(record)) from error
        build.commit(_card(record, task, made, time.monotonic() - started))
        assert build.committed is not None
        return build.committed


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
