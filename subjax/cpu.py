"""A CPU worker's surroundings, settled before JAX is imported: its cores, its thread counts, its compiler's settings.

All of them change the last bits of a result, so every worker gets the same; a card's profile records them.
"""

import contextlib
import os
import socket

THREAD_COUNTS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Programs of small models run no slower than at XLA's own level, and are compiled in two thirds of the time.
COMPILER = "--xla_backend_optimization_level=1"


def visible_cores() -> int:
    """Count the cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))  # "max" is no quota, and no number
    return cores


def pin(index: int, cores: int) -> None:
    """Give this process `cores` cores for good, as the `index`-th of its run; call it before JAX is imported.

    On CPU the number of visible cores changes bits, so it is fixed: by NPROC, which XLA reads for its thread pools, and
    by affinity. Which cores does not matter for bits, so free ones are preferred: each is claimed by a name in Linux's
    abstract socket namespace, which the kernel gives back however this process ends.
    """
    os.environ.update({name: str(cores) for name in THREAD_COUNTS})
    # The user's own flags come last, where they win.
    os.environ["XLA_FLAGS"] = f"{COMPILER} {os.environ.get('XLA_FLAGS', '')}".strip()
    if not hasattr(os, "sched_setaffinity"):
        return
    visible = sorted(os.sched_getaffinity(0))
    if len(visible) <= cores:
        return
    first = index * cores % len(visible)
    order = visible[first:] + visible[:first]
    free: list[int] = []
    for core in order:
        if len(free) < cores and _claim(core):
            free.append(core)
    os.sched_setaffinity(0, free if len(free) == cores else order[:cores])


_claims: list[socket.socket] = []  # held open as long as this process lives


def _claim(core: int) -> bool:
    """Claim a core, unless another worker on this machine holds it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0subjax-core-{core}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True
