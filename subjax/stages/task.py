"""What a stage is given and gives back."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from subjax.errors import SubjaxError
from subjax.parallel.mesh import make_mesh
from subjax.store import Build, Card, Store
from subjax.train.trainer import Run


@dataclasses.dataclass(frozen=True)
class Task:
    """One node to be made: what it reads, where its payload goes, and whom to tell.

    `inputs` maps a role to (kind, id) of a committed node. `progress(done, total, unit)` may be called often.
    """

    kind: str
    id: str
    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[str, str]]
    store: Store
    build: Build
    progress: Callable[[int, int, str], None]
    should_stop: Callable[[], bool]
    hints: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh that the node is computed on: one device, until a run says otherwise."""
        return make_mesh()

    def input_card(self, role: str) -> Card:
        """The card of an input.

        Raises:
            SubjaxError: the input is not committed.
        """
        kind, node = self.inputs[role]
        card = self.store.card(kind, node)
        if card is None:
            raise SubjaxError(f"its {role}, {kind} {node}, is not made yet; make it first, or run the whole study")
        return card

    def run(self) -> Run:
        """The trainer's settings for this node."""
        return Run(self.mesh, self.progress, self.should_stop, self.build.partial)


@dataclasses.dataclass(frozen=True)
class Made:
    """What a stage made in `task.build.folder`: the canonical digest, and what its card should say."""

    digest: str
    metrics: dict[str, Any]
    tokens: int
    seeds: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def write_lines(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
