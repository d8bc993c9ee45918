"""How a node is made and committed, whatever its kind."""

import importlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from etils import epath
from jax.sharding import Mesh

from subjax.errors import SubjaxError, UsageError
from subjax.stages import VERSIONS, version_of
from subjax.stages.task import Made, Task
from subjax.store import Card, Store, digest_arrays, digest_json, digest_rows

_PACKAGES = ("subjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets")


def profile(mesh: Mesh) -> dict[str, Any]:
    """The numerics profile: what decides the last bits of a result beside the node's own settings."""
    devices = mesh.devices.flatten().tolist()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
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
) -> Card:
    """Make and commit one planned node, and return its card; a node that is committed already is left as it is.

    Args:
        record: the node as a plan holds it: kind, id, version, config, inputs (role -> [kind, id]), label.
        store: where its inputs are and it goes.
        progress: told (done, total, unit). should_stop: true asks for a checkpoint and an end.

    Raises:
        Busy: another live process is making it. SubjaxError: it could not be made; the node is named.
    """
    kind, node = record["kind"], record["id"]
    inputs = {role: (k, i) for role, (k, i) in record["inputs"].items()}
    if record["version"] != version_of(kind, record["config"]):
        raise UsageError(f"{kind} {node} was planned by another version of subjax; run `subjax plan` again")
    with store.build(kind, node) as build:
        if build.committed is not None:
            return build.committed
        task = Task(kind, node, record["config"], inputs, store, build, progress, should_stop, record.get("hints", {}))
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


def digest(card: Card, folder: epath.Path) -> str:
    """The canonical digest of a payload as it is on disk now, by the card's kind.

    Raises:
        SubjaxError: the payload cannot be read.
    """
    from subjax.models import checkpoints
    from subjax.stages import corpus, models, text_base, text_corpus

    if (folder / models.ARRAYS).exists():
        return digest_arrays(checkpoints.load(folder / models.ARRAYS))
    if card.kind == "corpus":
        rows = text_corpus if card.config.get("language") == "text" else corpus
        return rows.digest(*rows.read(folder))
    if card.kind == "ensemble":
        return digest_rows(json.loads((folder / "results.json").read_text())["rows"])
    # Readings, or what stands for weights: a checkpoint's record, a system prompt.
    [path] = [path for path in folder.iterdir() if path.suffix == ".json"]
    record = json.loads(path.read_text())
    return text_base.digest(record) if card.kind == "base" else digest_json(record)
