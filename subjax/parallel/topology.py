"""Hardware that is not here, described: "v5p:4x4x4" or "h100:4x8" to devices and a mesh that programs compile for.

TPUs are described by libtpu (`pip install 'subjax[plan-tpu]'`) and GPUs by JAX's CUDA plug-in
(`pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin` of JAX's own version); neither needs a device. What is found
out for a described mesh is compiled by the same compiler as the real program.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from subjax.errors import SubjaxError, UsageError, one_line
from subjax.parallel import gpu_targets
from subjax.parallel.axes import shown
from subjax.parallel.chips import CHIPS, CPU, Chip

_EXAMPLES = "v5e:4x4, v5p:4x4x4, v5e:16x16x2slices, h100:4x8 (hosts x GPUs of a host), cpu:8"
# What keeps libtpu from asking a network or a device for what it is told by the topology's name.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described topology: the kind of device, the shape of one slice (of GPUs: hosts, GPUs of a host), and slices."""

    text: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape) * self.slices * self.chip.per_chip

    @property
    def islands(self) -> int:
        """Groups of devices that fast links join: slices of TPUs, hosts of GPUs."""
        return self.shape[0] if self.chip.platform == "cuda" else self.slices

    @property
    def fast(self) -> float:
        """Bytes a second, one way, that every device can have from its island at once.

        The least of any device's links bounds a collective: where the torus is not closed, that is a corner's.
        """
        if self.chip.platform != "tpu":
            return self.chip.link
        closed = [n % self.chip.wraps_at == 0 for n in self.shape]
        if len(closed) == 3:  # built of cubes, whose faces optical switches join: all of it, or none
            closed = [all(closed)] * 3
        links = sum(0 if n == 1 else 2 if ring else 1 for n, ring in zip(self.shape, closed, strict=True))
        return self.chip.link * links

    def __str__(self) -> str:
        return self.text


def parse_topology(text: str) -> Topology:
    """A topology from its name: KIND:AxB or KIND:AxBxC of TPUs (with xNslices), KIND:HOSTSxGPUS, or cpu:N.

    Raises:
        UsageError: an unknown kind (the nearest is named), or a shape that the kind does not have.
    """
    kind, colon, rest = text.partition(":")
    if kind not in CHIPS and kind != "cpu":
        near = difflib.get_close_matches(kind.lower(), [*CHIPS, "cpu"], 1, 0.0)
        known = ", ".join([*CHIPS, "cpu"])
        raise UsageError(f"topology {text!r}: unknown kind {kind!r}; did you mean {near[0]!r}? (known: {known})")
    found = re.fullmatch(r"(\d+(?:x\d+)*?)(?:x(\d+)slices?)?", rest)
    if not colon or not found:
        raise UsageError(f"topology {text!r}: want a kind and a shape, as in {_EXAMPLES}")
    shape, slices = tuple(map(int, found[1].split("x"))), int(found[2] or 1)
    chip = CHIPS.get(kind, CPU)
    if chip.platform == "cuda" and len(shape) == 3 and shape[0] == 1:  # as XLA writes it: partitions, hosts, GPUs
        shape = shape[1:]
    wanted = {"cuda": 2, "cpu": 1}.get(chip.platform, chip.dimensions)
    if len(shape) != wanted or min(shape) < 1 or slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UsageError(f"topology {text!r}: {kind} has a shape of {_form(chip)}; examples: {_EXAMPLES}")
    if chip.platform == "tpu" and math.prod(shape) > 1 and any(n % 2 for n in shape[:2]):
        even = "x".join(str(n + n % 2 if at < 2 else n) for at, n in enumerate(shape))
        raise UsageError(
            f"topology {text!r}: a host holds 2x2 TPUs, so the first two numbers are even; the nearest is {kind}:{even}"
        )
    return Topology(text, chip, shape, slices)


def _form(chip: Chip) -> str:
    numbers = {1: "one number", 2: "two numbers", 3: "three numbers"}
    if chip.platform == "cuda":
        return "two numbers, hosts and GPUs of a host"
    return numbers[chip.dimensions] + (" and, if there are several, slices" if chip.platform == "tpu" else "")


def larger(topology: Topology) -> Topology:
    """The next larger topology of the same kind: its shortest dimension doubled (of equal ones the last, as the makers
    name slices), of GPUs its hosts, and its slices where one is as large as they are.

    A single TPU's next is a host of four.
    """
    shape, slices = list(topology.shape), topology.slices
    if topology.chip.platform == "cuda":
        shape[0] *= 2
    elif topology.chip.platform == "tpu" and math.prod(shape) == 1:
        shape[:2] = 2, 2
    elif topology.chip.platform == "tpu" and 2 * math.prod(shape) > topology.chip.most:
        slices *= 2
    else:
        shape[min(range(len(shape)), key=lambda i: (shape[i], -i))] *= 2
    ending = f"x{slices}slices" if slices > 1 else ""
    return parse_topology(f"{topology.chip.name}:{'x'.join(map(str, shape))}{ending}")


def compiler_version(topology: Topology) -> str:
    """Name and version of what compiles for the topology, for the record: "libtpu 0.0.42.1"."""
    package = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt", "cpu": "jaxlib"}[topology.chip.platform]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} {importlib.metadata.version(package)}"
    return f"{package} (version unknown)"


def _has_cuda_plugin() -> bool:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    except ModuleNotFoundError:  # there is no plug-in at all
        return False


def missing(topology: Topology) -> str | None:
    """What must be installed before programs can be compiled for the topology; None where nothing is missing."""
    import jax

    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return f"pip install 'jax[tpu]=={jax.__version__}'"
    if topology.chip.platform == "cuda" and not _has_cuda_plugin():
        return f"pip install --no-deps jax-cuda12-pjrt=={jax.__version__} jax-cuda12-plugin=={jax.__version__}"
    return None


@functools.lru_cache(maxsize=16)
def described_devices(topology: Topology) -> tuple[Any, ...]:
    """Devices that programs can be compiled for and nothing can be put on.

    Raises:
        UsageError: what describes the hardware is not installed, or it knows no such shape.
        SubjaxError: cpu:N after JAX has started with fewer devices.
    """
    from jax.experimental import topologies

    if topology.chip.platform == "cpu":
        return tuple(_cpu_devices(topology))
    if (install := missing(topology)) is not None:
        raise UsageError(f"topology {topology}: what describes it is not installed; {install}")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.shape))
    try:
        with _quiet_stderr():
            if topology.chip.platform == "cuda":
                named = f"1x{shape}"
                target = gpu_targets.target_config(topology.chip.name)
                found = topologies.get_topology_desc(
                    platform="cuda", topology_name=named, topology=named, target_config=target
                )
            else:
                extra: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
                if math.prod(topology.shape) == 1:
                    extra["chips_per_host_bounds"] = (1, 1, 1)
                found = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **extra
                )
    except RuntimeError as error:  # JAX's own is one, and so is NotImplementedError
        raise UsageError(f"topology {topology}: it cannot be described ({one_line(error)[:200]})") from None
    return tuple(found.devices)


def _cpu_devices(topology: Topology) -> Sequence[Any]:
    import jax

    with contextlib.suppress(RuntimeError):  # JAX has started, and counts what it has
        jax.config.update("jax_num_cpu_devices", topology.size)
    devices = jax.devices("cpu")
    if len(devices) < topology.size:
        raise SubjaxError(
            f"topology {topology}: JAX has started with {len(devices)} CPU devices; set"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}"
        )
    return devices[: topology.size]


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """What compilers' libraries write to the process's stderr while they are loaded is no news of a plan's."""
    with open(os.devnull, "w", encoding="utf8") as nowhere:
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def described_mesh(topology: Topology, sizes: tuple[int, int, int]) -> Any:
    """The mesh that a run on a topology lays out, over all of its devices.

    Args:
        sizes: of (replica, fsdp, tensor).

    Raises:
        UsageError: the sizes do not multiply to the number of devices, or no axis can go over the slices.
    """
    from subjax.parallel.mesh import global_mesh

    if math.prod(sizes) != topology.size:
        raise UsageError(
            f"--mesh={shown(sizes)} has {math.prod(sizes)} devices and {topology} has {topology.size}; a whole topology"
            f" is rented, so let the sizes multiply to {topology.size}, as in --mesh=fsdp:{topology.size}"
        )
    return global_mesh(sizes, described_devices(topology))


def islands_of(topology: Topology, mesh: Any) -> list[int]:
    """The island of each device in the mesh's order: slices of TPUs, hosts of GPUs."""
    kind = "process_index" if topology.chip.platform == "cuda" else "slice_index"
    return [getattr(device, kind, 0) or 0 for device in mesh.devices.flat]
