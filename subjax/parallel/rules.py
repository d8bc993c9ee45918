"""Sharding rules: a table from logical axes to mesh axes, one for training and one for sampling."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from subjax.errors import SubjaxError

log = logging.getLogger(__name__)

MeshAxes = tuple[str, ...]


def mesh_axes(part: str | MeshAxes | None) -> MeshAxes:
    """The mesh axes of one entry of a `PartitionSpec`, which JAX gives as a name, several or none."""
    return (part,) if isinstance(part, str) else part or ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis; an empty tuple means replicated."""

    name: str
    table: tuple[tuple[str, MeshAxes], ...]

    def spec(self, axes: tuple[str, ...], where: str = "array") -> PartitionSpec:
        """The partition of an array with these logical axes.

        Raises:
            SubjaxError: a logical axis without a rule, or two dimensions on one mesh axis.
        """
        table = dict(self.table)
        used: dict[str, str] = {}
        parts: list[MeshAxes | None] = []
        for axis in axes:
            if axis not in table:
                raise SubjaxError(f"{where}: the {self.name} rules have no entry for logical axis {axis!r}; add one")
            for mesh_axis in table[axis]:
                if mesh_axis in used:
                    raise SubjaxError(
                        f"{where}: the {self.name} rules put both {used[mesh_axis]!r} and {axis!r} on mesh axis"
                        f" {mesh_axis!r}; a mesh axis can shard one dimension only"
                    )
                used[mesh_axis] = axis
            parts.append(table[axis] or None)
        return PartitionSpec(*parts)

    def sharding(
        self, mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...], where: str = "array"
    ) -> NamedSharding:
        """The sharding of an array of `shape`; dimensions that mesh axes do not divide are kept whole, and logged."""
        sharding, whole = self.fitted(mesh, shape, axes, where)
        for size, ways, part in whole:
            _tell(where, size, ways, part)
        return sharding

    def fitted(
        self, mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...], where: str = "array"
    ) -> tuple[NamedSharding, list[tuple[int, int, MeshAxes]]]:
        """The sharding of an array, and what is kept whole: (size, ways, mesh axes) of each such dimension."""
        parts: list[MeshAxes | None] = []
        whole = []
        for size, part in zip(shape, self.spec(axes, where), strict=True):
            names = mesh_axes(part)
            ways = math.prod(mesh.shape[a] for a in names)
            if ways > 1 and size % ways:
                whole.append((size, ways, names))
                part = None
            parts.append(part)
        return NamedSharding(mesh, PartitionSpec(*parts)), whole


@functools.lru_cache(maxsize=1024)
def _tell(where: str, size: int, ways: int, over: MeshAxes) -> None:
    """Log, once, that a dimension is kept whole."""
    names = ", ".join(over)
    log.warning("%s: dimension of %d cannot be split %d ways over %s; kept whole", where, size, ways, names)


BATCH = ("replica", "fsdp")

TRAIN = Rules(
    "training",
    (
        ("batch", BATCH), ("length", ()), ("layers", ()), ("embed", ("fsdp",)), ("vocab", ("tensor",)),
        ("position", ()), ("heads", ("tensor",)), ("kv_heads", ("tensor",)), ("head_dim", ()), ("mlp", ("tensor",)),
        ("rank", ()), ("step", ()), ("turn", ()), ("question", ()), ("candidate", ()), ("member", ("replica",)),
    ),
)  # fmt: skip

# The sampler keeps whole rows of each matrix (no gather a token), and splits heads and vocabulary over `tensor`.
SAMPLE = Rules("sampling", tuple((axis, () if axis == "embed" else parts) for axis, parts in TRAIN.table))


# A cohort's members lie on `replica`, and the rows of each on `fsdp` alone.
COHORT = Rules("cohort", tuple((axis, ("fsdp",) if axis == "batch" else parts) for axis, parts in TRAIN.table))


def shardings(
    rules: Rules, mesh: Mesh, declared: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> dict[str, NamedSharding]:
    """Shardings of a flat dict of declared arrays, name -> (shape, logical axes)."""
    return {name: rules.sharding(mesh, shape, axes, name) for name, (shape, axes) in declared.items()}
