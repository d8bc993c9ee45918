"""The device mesh: three named axes, always all three, so that one device and a pod run the same program."""

import difflib
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from subjax.errors import UsageError

AXES = ("replica", "fsdp", "tensor")


def parse_mesh(text: str) -> tuple[int, int, int]:
    """Sizes of (replica, fsdp, tensor) from text such as "fsdp:4,tensor:2"; an axis that is not named has size 1.

    Raises:
        UsageError: an unknown axis (the nearest is named), an axis named twice, or a size that is not a whole number
            above 0.
    """
    sizes: dict[str, int] = {}
    for piece in filter(None, text.split(",")):
        name, _, size = piece.partition(":")
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, 1, 0.0)[0]
            raise UsageError(f"mesh {text!r}: unknown axis {name!r}; did you mean {near!r}?")
        if name in sizes:
            raise UsageError(f"mesh {text!r}: axis {name!r} stands twice; name it once")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"mesh {text!r}: axis {name!r} needs a positive whole number, as in '{name}:4'")
        sizes[name] = int(size)
    return sizes.get("replica", 1), sizes.get("fsdp", 1), sizes.get("tensor", 1)


def make_mesh(shape: tuple[int, int, int] = (1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `shape` over (replica, fsdp, tensor), over the first devices there are.

    Raises:
        UsageError: the shape wants more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(shape)
    if wanted > len(devices):
        named = ",".join(f"{a}:{s}" for a, s in zip(AXES, shape, strict=True))
        raise UsageError(f"mesh {named} wants {wanted} devices and there are {len(devices)}; make an axis smaller")
    # Auto is written out: jax.make_mesh's own default is Explicit, which is another programming model.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
