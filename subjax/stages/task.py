"""What a stage is given and gives back."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import Mesh

from subjax.errors import SubjaxError
from subjax.models import checkpoints
from subjax.parallel.mesh import local_mesh, make_mesh
from subjax.parallel.processes import group
from subjax.store import Build, Card, Store, digest_arrays
from subjax.train.trainer import Run

if TYPE_CHECKING:
    from subjax.stages.attempt import Follower

ARRAYS = "arrays"  # the checkpoint's folder inside a payload


@dataclasses.dataclass(frozen=True)
class Task:
    """One node to be made: what it reads, where its payload goes, and whom to tell.

    `inputs` maps a role to (kind, id) of a committed node. `progress(done, total, unit)` may be called often. `mesh` is
    where it is trained, and does not change its result.
    """

    kind: str
    id: str
    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[str, str]]
    store: Store
    build: "Build | Follower"
    progress: Callable[[int, int, str], None]
    should_stop: Callable[[], bool]
    hints: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh = dataclasses.field(default_factory=make_mesh)

    @property
    def local(self) -> Mesh:
        """Where a model is asked: this process's own part of the mesh, so that each may ask for what it needs."""
        return local_mesh(self.mesh)

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

    def save(self, arrays: Mapping[str, jax.Array]) -> str:
        """Save a node's arrays in its payload, every process the shards it has, and give their canonical digest.

        Where shards are spread over processes, process 0 reads what was saved, piece by piece; to the others it is "".
        """
        folder = self.build.payload / ARRAYS
        checkpoints.save(folder, arrays)
        together = group()
        if together.count == 1:
            return digest_arrays(arrays)
        together.barrier("saved")
        return checkpoints.digest(folder) if together.first else ""


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
