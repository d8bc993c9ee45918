"""Whether there is a GPU or TPU, without asking JAX, which would take it."""

import glob
import importlib.metadata
import importlib.util
import os


def visible() -> bool:
    """Say whether JAX would find a GPU or TPU here, without asking JAX, since that would take the device."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    gpu = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
    tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    if gpu and importlib.metadata.entry_points(group="jax_plugins"):  # a driver alone is no use to a CPU-only JAX
        return True
    return tpu and importlib.util.find_spec("libtpu") is not None


def without_tpu() -> None:
    """Keep JAX from looking for a TPU where libtpu is there to plan with and no TPU is: it would complain at length."""
    if importlib.util.find_spec("libtpu") is not None:
        if not visible():
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
