"""From what the command line says to the mesh that the work is done on: devices counted, processes joined, before
anything else uses JAX.
"""

import math
import os

import jax
from jax.sharding import Mesh

from subjax.errors import SubjaxError, UsageError, one_line
from subjax.parallel.axes import Shape, shown
from subjax.parallel.cluster import Job
from subjax.parallel.mesh import global_mesh
from subjax.parallel.processes import SILENCE_S, Group

# JAX ends a process by an abort when another is silent for so long; ours comes first, and says which.
_HEARTBEAT_S = int(3 * SILENCE_S)
_SHUTDOWN_S = 60


def mesh_of(shape: Shape | None, processes: Group, *, accelerator: bool, timeout_s: float) -> Mesh:
    """The mesh over every device of every process.

    On CPU each process makes as many virtual devices as its share of the mesh; accelerators are counted.

    Args:
        shape: what is asked for; None: all on `fsdp`. processes: of this job, all there. accelerator: whether there is
            a GPU or TPU. timeout_s: how long JAX may take to join the processes.

    Raises:
        UsageError: the shape does not fit the devices there are, or JAX_PLATFORMS names none.
        SubjaxError: JAX could not join the processes.
    """
    if not accelerator:
        _make_devices(shape, processes.count)
    if processes.job is not None:
        _join(processes.job, timeout_s, accelerator)
    return global_mesh(shape, _devices())


def _devices() -> list[jax.Device]:
    """The devices of all processes, of the platform that is asked for."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # JAX's own, of a platform that it does not know or cannot open
        asked = os.environ.get("JAX_PLATFORMS", "")
        cause = one_line(error)[:200] or f"{asked} is not there"
        mend = "unset it, or install JAX for it" if asked else "see whether another process has the device"
        said = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        raise UsageError(f"{said} gives no device ({cause}); {mend}, or set JAX_PLATFORMS=cpu") from error


def _make_devices(shape: Shape | None, processes: int) -> None:
    """Have the CPU stand for several devices; where the backend is there already, counting them tells."""
    wanted = math.prod(shape) if shape else processes
    if wanted % processes:
        raise UsageError(
            f"--mesh={shown(shape or (1, 1, 1))} is of {wanted} devices, which {processes} processes cannot share"
            f" evenly; give axes whose product is a multiple of {processes}"
        )
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not forced and wanted > processes:
        try:
            jax.config.update("jax_num_cpu_devices", wanted // processes)
        except RuntimeError:
            return


def _join(job: Job, timeout_s: float, accelerator: bool) -> None:
    """Let JAX join the processes, all of which have been heard of."""
    if not accelerator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its service would take SIGTERM from us: here a stop is agreed on at a step's end, by `Group.either`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            job.process,
            local_device_ids=job.devices,
            cluster_detection_method="deactivate",  # `cluster.detected` has done it
            initialization_timeout=max(1, round(timeout_s)),
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except Exception as error:  # JAX raises its own errors, Python's and XLA's
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SubjaxError(
            f"JAX could not join process {job.process} of {job.processes} at {job.coordinator} ({cause}); see whether"
            " that port can be reached from every process"
        ) from error


def leave() -> None:
    """End JAX's part of a job of several processes, when all of them are done."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
