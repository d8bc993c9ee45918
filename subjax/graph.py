"""Nodes with their identities, the graph that they are planned into, and the plan that comes of it.

A node's id is a hash of its kind, its version, the settings that its stage reads and the ids that it is made from.
Nothing here knows a protocol: what a study asks for is planned by `study`, `study_pretrained` and `study_images`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from subjax.cohorts import Joining
from subjax.stages import version_of
from subjax.store import digest_json, node_id


@dataclasses.dataclass(frozen=True)
class Node:
    """One artifact to be made.

    `config` is the part of the settings that its stage reads, `inputs` maps roles to ids; with kind and version they
    make `id`. `label` is for people and `group` for the executor (nodes with one group share compiled programs);
    `tokens` and `flops` are what making it is expected to take. `hints` say what its stage must know and its result
    does not depend on: where a checkpoint lies, how many rows go through the model at once.
    """

    kind: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    id: str
    label: str
    group: str
    tokens: int
    flops: float
    hints: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study's nodes by id, inputs before users, and what its results are made from (`study`)."""

    nodes: dict[str, Node]
    study: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the plan again."""
        return {"nodes": {id: dataclasses.asdict(node) for id, node in self.nodes.items()}, "study": self.study}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` wrote."""
        return cls({id: Node(**node) for id, node in data["nodes"].items()}, dict(data["study"]))


class Graph:
    """Nodes as they are asked for, each once."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.joining: dict[str, Joining] = {}  # students that may train in cohorts

    def add(
        self, kind: str, config: dict[str, Any], inputs: dict[str, str], label: str, group: Any, tokens: int,
        flops: float, hints: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The id of the node with this config and these inputs, planned if it is new."""
        version = version_of(kind, config)
        assert version is not None, kind
        id = node_id(kind, version, config, inputs)
        if id not in self.nodes:
            group = digest_json([kind, group])[:12]
            self.nodes[id] = Node(kind, version, config, inputs, id, label, group, tokens, flops, dict(hints or {}))
        return id


def needed(nodes: Mapping[str, Node], cells: list[dict[str, Any]]) -> dict[str, Node]:
    """The nodes that some cell names, and what those are made from: a study without an arm does not pay for it."""
    found: set[str] = set()
    pending = [id for cell in cells for id in cell["nodes"].values() if id is not None]
    while pending:
        id = pending.pop()
        if id not in found:
            found.add(id)
            pending += nodes[id].inputs.values()
    return {id: node for id, node in nodes.items() if id in found}
