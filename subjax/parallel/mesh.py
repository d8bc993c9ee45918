"""The device mesh: three named axes, always all three, so that one device and a pod run the same program."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from subjax.errors import UsageError
from subjax.parallel.axes import AXES, Shape, parse_mesh, shown

__all__ = [
    "AXES", "Shape", "global_mesh", "local_mesh", "lone_cpu", "make_mesh", "memory_of", "parse_mesh", "put",
    "replicated", "settle",
]  # fmt: skip

# Auto is written out, as jax.make_mesh's default is Explicit: another programming model.
_AUTO = (AxisType.Auto,) * 3


def make_mesh(shape: Shape = (1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `shape` over (replica, fsdp, tensor), over the first devices there are.

    Raises:
        UsageError: the shape wants more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(shape)
    if wanted > len(devices):
        named = ",".join(f"{a}:{s}" for a, s in zip(AXES, shape, strict=True))
        raise UsageError(f"mesh {named} wants {wanted} devices and there are {len(devices)}; make an axis smaller")
    # Not jax.make_mesh, which on most TPUs refuses an axis that is a part of a side of the slice (fsdp:8 of 4x4).
    placed = mesh_utils.create_device_mesh(shape, devices[:wanted], allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=_AUTO)


def global_mesh(shape: Shape | None, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh over all of `devices`; where no shape is asked for, they are all on `fsdp`, slices on `replica`.

    TPU slices are joined by a network much slower than what joins the chips of one: they lie on `replica`, the
    outermost axis, over which a step sends gradients alone, or on `fsdp` where `replica` cannot hold them.

    Raises:
        UsageError: the shape's product is not the number of devices, or neither axis can hold the slices.
    """
    slices = _slices(devices)
    default = (slices, len(devices) // slices, 1)
    shape = shape or default
    if math.prod(shape) != len(devices):
        raise UsageError(
            f"--mesh={shown(shape)} is of {math.prod(shape)} devices and there are {len(devices)}: give axes whose"
            f" product is {len(devices)}, or leave --mesh out for {shown(default)}"
        )
    if slices == 1:
        return make_mesh(shape, devices)
    outer = [1, 1, 1]
    at = next((axis for axis in (0, 1) if shape[axis] % slices == 0), None)
    if at is None:
        raise UsageError(
            f"--mesh={shown(shape)}: neither replica:{shape[0]} nor fsdp:{shape[1]} can go over the {slices} slices"
            f" that the devices are in; make one a multiple of {slices}, as in --mesh={shown(default)}"
        )
    outer[at] = slices
    inner = [size // over for size, over in zip(shape, outer, strict=True)]
    placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=_AUTO)


def _slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices are in. (A GPU's `slice_index` tells hosts apart, which one axis may span.)"""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def local_mesh(mesh: Mesh) -> Mesh:
    """The mesh of this process's own devices in `mesh`: what is asked of a model one process may answer alone.

    As much of `tensor` as fits is kept, and the rest is `fsdp`, over which the sampling rules spread rows. With one
    process it is `mesh` itself.
    """
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return mesh
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    tensor = math.gcd(mesh.shape["tensor"], len(own))
    return make_mesh((1, len(own) // tensor, tensor), own)


def lone_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is one CPU device: then all cores are its, and nothing is split."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def memory_of(mesh: Mesh) -> float | None:
    """Bytes of memory of a device; None on CPU, whose memory is not a device's own."""
    device = mesh.devices.flat[0]
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def settle(value: Any, mesh: Mesh) -> None:
    """Wait for the arrays of `value` where `mesh` is of several CPU devices.

    Call it between programs that are dispatched without reading what they give. XLA's CPU client runs 32 of them a
    device at most, and for one more it holds a thread of its pool, which has as many as there are devices: those under
    way may need that thread to meet in a collective, and then nothing goes on.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(value)


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(value: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """A host array, which every process has, onto a sharding: each process puts its own devices' parts alone."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
