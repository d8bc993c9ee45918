"""Which job this process is a part of: from flags, or from what Slurm, a TPU pod or Kubernetes tell it.

JAX detects the same by itself, but within a call that says nothing while it waits: whom to wait for, and where, must be
known before. What is read: Slurm's step variables; a TPU pod's TPU_WORKER_HOSTNAMES, TPU_WORKER_ID and, of several
slices, MEGASCALE_*; and, where a manifest sets them (JobSet), JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, or Kubernetes' own JOB_COMPLETION_INDEX. Needs no JAX.
"""

import dataclasses
import re
from collections.abc import Mapping

from subjax.errors import UsageError

TPU_PORT = 8482  # the ports that JAX itself takes where none is said
JOB_PORT = 55527


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of several processes, and which of them this one is.

    `coordinator` is "host:port" of process 0; there JAX's service listens, and on `roll_call_port` its roll call.
    `devices`: ids of the GPUs of this host that this process may take; None: all. `hosts`: of each process, or ().
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """Where process 0 is."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def roll_call_port(self) -> int:
        """The port next to the coordinator's."""
        port = int(self.coordinator.rpartition(":")[2])
        return port + 1 if port < 65535 else port - 1


def of_flags(coordinator: str, processes: int | None, process: int | None) -> Job | None:
    """The job that `--coordinator`, `--processes` and `--process` name; None where none of the three is given.

    Raises:
        UsageError: one or two of them are given, or they do not fit together.
    """
    given = {"--coordinator": coordinator or None, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == 3:
        return None
    if missing:
        raise UsageError(
            f"{missing[0]} is missing: a job of several processes wants --coordinator=HOST:PORT --processes=N"
            " --process=I, the same first two in all"
        )
    assert processes is not None
    assert process is not None
    return _checked(Job(coordinator, processes, process), "--coordinator, --processes and --process")


def detected(environment: Mapping[str, str]) -> Job | None:
    """The job that the environment tells of; None where this process is alone.

    Raises:
        UsageError: the environment tells of a job, and not all of what is needed.
    """
    for detect, what in ((_named, "JAX_* variables"), (_slurm, "Slurm"), (_tpu, "the TPU pod")):
        try:
            job = detect(environment)
        except (IndexError, KeyError, ValueError) as error:
            raise UsageError(
                f"this looks like a job of {what}, whose variables cannot be read ({error}); give --coordinator,"
                " --processes and --process"
            ) from error
        if job is not None:
            return _checked(job, what) if job.processes > 1 else None
    return None


def _checked(job: Job, what: str) -> Job:
    host, _, port = job.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"coordinator {job.coordinator!r} of {what}: give HOST:PORT, as in node1:7000")
    if not 0 <= job.process < job.processes:
        raise UsageError(
            f"process {job.process} of {job.processes} ({what}): processes are numbered from 0 to one less than their"
            " number"
        )
    return job


def _named(environment: Mapping[str, str]) -> Job | None:
    """What a manifest says in JAX's own words."""
    if not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"} <= environment.keys():
        return None
    index = environment.get("JAX_PROCESS_ID") or environment["JOB_COMPLETION_INDEX"]
    coordinator = environment["JAX_COORDINATOR_ADDRESS"]
    if ":" not in coordinator:
        coordinator = f"{coordinator}:{JOB_PORT}"
    return Job(coordinator, int(environment["JAX_NUM_PROCESSES"]), int(index))


def _slurm(environment: Mapping[str, str]) -> Job | None:
    """A step of Slurm, as JAX reads it: the first node's name, and a port that follows from the job's number."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environment for name in needed):
        return None
    nodes = hosts_of(environment["SLURM_STEP_NODELIST"])
    port = environment.get("JAX_COORDINATOR_PORT") or str(int(environment["SLURM_JOB_ID"]) % 2**12 + 65536 - 2**12)
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS") or f"{nodes[0]}:{port}"
    counts = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", ""))
    tasks = int(environment["SLURM_NTASKS"])
    # Several processes on a node have a GPU each; one alone has all of them.
    devices = (int(environment["SLURM_LOCALID"]),) if max(counts, default=1) > 1 else None
    # Tasks are laid out in blocks unless srun is told otherwise, and then it is not known which is where.
    blocks = environment.get("SLURM_DISTRIBUTION", "block").startswith("block")
    hosts = tuple(node for node, count in zip(nodes, counts, strict=False) for _ in range(count)) if blocks else ()
    return Job(coordinator, tasks, int(environment["SLURM_PROCID"]), devices, hosts if len(hosts) == tasks else ())


def _tpu(environment: Mapping[str, str]) -> Job | None:
    """A TPU slice with several hosts, or several slices of them (as GKE's webhook and queued resources set it up)."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    workers = [name.split(":")[0] for name in names.split(",") if name]
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if len(workers) * slices <= 1:
        return None
    head = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or workers[0]
    index = int(environment["TPU_WORKER_ID"]) + int(environment.get("MEGASCALE_SLICE_ID") or 0) * len(workers)
    port = environment.get("JAX_COORDINATOR_PORT") or TPU_PORT
    hosts = tuple(workers) if slices == 1 else ()
    return Job(f"{head}:{port}", len(workers) * slices, index, None, hosts)


def _tasks(text: str) -> list[int]:
    """Slurm's tasks a node, "2(x3),1" being 2, 2, 2, 1."""
    counts: list[int] = []
    for piece in filter(None, text.split(",")):
        count, _, times = piece.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def hosts_of(nodes: str) -> list[str]:
    """Slurm's list of nodes, "gpu[1-3,07],login" being gpu1, gpu2, gpu3, gpu07, login. One bracket a name is read."""
    out: list[str] = []
    for head, ranges, tail in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        if not ranges:
            out.append(head + tail)
            continue
        for piece in ranges.split(","):
            first, _, last = piece.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            out += [f"{head}{number:0{len(first)}d}{tail}" for number in numbers]
    return out
