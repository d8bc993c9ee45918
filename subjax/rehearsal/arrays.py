"""Arrays that are only described: shapes, dtypes and where they lie."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from subjax.parallel.rules import mesh_axes
from subjax.train.cohort import Cohort
from subjax.train.losses import Loss, PackedNextToken

Array = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Rows:
    """One term of an objective: its loss, and the batch of one step, array name -> (shape, dtype).

    `rows`, `length` and `tail` are what goes through the model: rows of all turns and members, tokens that go in, and
    those of them whose logits come out.
    """

    name: str
    weight: float
    loss: Loss
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    rows: int
    length: int
    tail: int

    @property
    def packing(self) -> PackedNextToken | None:
        """The loss of packed rows; None where each row is one chat."""
        own = self.loss.loss if isinstance(self.loss, Cohort) else self.loss
        return own if isinstance(own, PackedNextToken) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array of the batch."""
        return next(shape for known, shape, _ in self.arrays if known == name)

    @property
    def turns(self) -> int:
        """The parts of a step that go through the model one after another."""
        return self.shape("tokens")[0] if self.loss.axes[0] == "turn" else 1


def described(shapes: Mapping[str, Any], dtype: Any, placed: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays of one dtype by name."""
    return {name: Array(shape, dtype, sharding=placed[name]) for name, shape in shapes.items()}


def put(shapes: Any, placed: Any) -> Any:
    """A tree of shapes with shardings, of which each may stand for a subtree."""
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda a: Array(a.shape, a.dtype, sharding=sharding), part), placed, shapes
    )


def bytes_of(arrays: Iterable[Array]) -> int:
    """Bytes of described arrays on one device, the device with most."""
    return sum(math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * _width(a.dtype) for a in arrays)


def _width(dtype: Any) -> int:
    return dtype.itemsize if hasattr(dtype, "itemsize") else jnp.dtype(dtype).itemsize


def ways(sharding: NamedSharding, only: str | None = None) -> int:
    """Devices over which an array is split, those along the mesh axis `only` where it is given."""
    names = [name for part in sharding.spec for name in mesh_axes(part)]
    return math.prod(sharding.mesh.shape[n] for n in names if only in (None, n))
