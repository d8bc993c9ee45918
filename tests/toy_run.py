"""A toy kind of node for the tests of the executor, and a command: python toy_run.py PLAN WORKDIR [WORKERS]."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from subjax import cli, run
from subjax.errors import Preempted, SubjaxError
from subjax.store import Card, Store, digest_json, node_id


@dataclasses.dataclass(frozen=True)
class Node:
    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    label: str
    group: str = "g"
    version: int = 1
    tokens: int = 0
    flops: float = 0.0
    hints: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        return node_id(self.kind, self.version, self.config, self.inputs)


@dataclasses.dataclass(frozen=True)
class Plan:
    nodes: dict[str, Node]


class Graph:
    """Builds a plan, node by node; `of["name"]` is its id."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.of: dict[str, str] = {}

    def add(self, name: str, *inputs: str, kind: str = "toy", group: str = "g", flops: float = 0.0, **config) -> str:
        given = {f"in{place}": self.of[needed] for place, needed in enumerate(inputs)}
        node = Node(kind, {"name": name, **config}, given, name, group, flops=flops)
        self.nodes[node.id] = node
        self.of[name] = node.id
        return node.id

    @property
    def plan(self) -> Plan:
        return Plan(self.nodes)

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps([dataclasses.asdict(node) for node in self.nodes.values()]))
        return path


def load(path: str) -> Plan:
    nodes = [Node(**fields) for fields in json.loads(Path(path).read_text())]
    return Plan({node.id: node for node in nodes})


def execute(record: dict[str, Any], store: Store, progress, should_stop) -> Card:
    """Make a toy, a hash of its name and its inputs' digests, once the file `gate` exists."""
    config, kind, id = record["config"], record["kind"], record["id"]
    with store.build(kind, id) as build:
        note(store, "begin", config["name"])
        inputs = {}
        for role, given in record["inputs"].items():
            card = store.card(*given)
            inputs[role] = {"kind": card.kind, "id": card.id, "digest": card.digest}
        misbehave(config, store)
        saved = Path(build.partial) / "step"
        first = int(saved.read_text()) if saved.exists() else 0
        steps = config.get("steps", 1)
        for step in range(first, steps):
            progress(step, steps, "steps")
            while True:
                if should_stop() and not config.get("deaf"):
                    saved.write_text(str(step))
                    note(store, "saved", config["name"])
                    raise Preempted("asked to stop")
                if "gate" not in config or os.path.exists(config["gate"]):
                    break
                time.sleep(0.02)
        (build.folder / "value.txt").write_text(config["name"])
        digest = digest_json({"name": config["name"], "inputs": {role: g["digest"] for role, g in inputs.items()}})
        profile = {"cores": len(os.sched_getaffinity(0)), "NPROC": os.environ.get("NPROC")}
        card = Card(
            format=1, kind=kind, id=id, version=record["version"], config=config, inputs=inputs, seeds={}, packages={},
            profile=profile, wall_s=0.0, tokens=0, metrics={"first": first}, files={}, digest=digest, payload="",
            made_at="2000-01-01", extra={},
        )  # fmt: skip
        build.commit(card)
        note(store, "made", config["name"])
        return card


def misbehave(config: dict[str, Any], store: Store) -> None:
    if "fail" in config:
        raise SubjaxError(config["fail"])
    if "bug" in config:
        raise ValueError(config["bug"])
    deaths = len([line for line in notes(store) if line[:2] == ["begin", config["name"]]])
    if deaths <= config.get("deaths", 0):
        os.kill(os.getpid(), signal.SIGKILL)


def note(store: Store, what: str, name: str) -> None:
    """Append to the run's log: one write of one line, so that processes do not mix."""
    with open(os.path.join(str(store.root), "log.txt"), "a") as file:
        file.write(f"{what} {name} {os.getpid()} {'jax' in sys.modules}\n")


def notes(store: Store) -> list[list[str]]:
    path = Path(str(store.root)) / "log.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def drive() -> int:
    plan, workdir, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 2
    outcome = run.execute_plan(load(plan), Store(workdir), workers=workers, execute="toy_run:execute")
    print(json.dumps({"made": len(outcome.made), "reused": len(outcome.reused), "failed": outcome.failed}))
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(cli.guarded(drive))
