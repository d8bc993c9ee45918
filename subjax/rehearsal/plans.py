"""A plan rehearsed: every distinct program compiled for described hardware, and what the sweep would take there."""

import dataclasses
from collections.abc import Callable

from subjax.graph import Plan
from subjax.parallel.topology import Topology, described_mesh
from subjax.rehearsal.figures import Figures, figures, laid_for, total_time
from subjax.rehearsal.fit import Remedy, what_would_fit
from subjax.rehearsal.jobs import Job, jobs
from subjax.rehearsal.programs import Training

# A well-tuned program reaches about so much of its roofline; what lies under it is called a bound, not a forecast.
REALISTIC = 0.5


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """One job on described hardware: its programs' figures, least seconds of one call, and what would fit if it does
    not.
    """

    job: Job
    programs: tuple[Figures, ...]
    seconds: float | None
    remedy: Remedy | None

    @property
    def fits(self) -> bool:
        """Whether each of its programs does."""
        return all(one.fits for one in self.programs)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """A plan on described hardware. `read` are FLOPs of nodes that are not compiled: evaluations, by hand."""

    topology: Topology
    mesh: tuple[int, int, int]
    jobs: tuple[Rehearsed, ...]
    read: float

    @property
    def fits(self) -> bool:
        """Whether all of it does."""
        return all(one.fits for one in self.jobs)


def default_mesh(topology: Topology) -> tuple[int, int, int]:
    """Everything over `fsdp`, but slices (or hosts' islands, of which there may be many, not) over `replica`."""
    return topology.slices, topology.size // topology.slices, 1


def rehearse(
    plan: Plan, topology: Topology, sizes: tuple[int, int, int], tell: Callable[[str], None] = lambda line: None
) -> Rehearsal:
    """Compile what a plan runs, for a mesh over a described topology.

    Args:
        plan: from `study.plan`, with or without weights. sizes: of (replica, fsdp, tensor), their product the devices.
        tell: is given a line before each compilation, which may take a minute.

    Raises:
        UsageError: the mesh does not fit the topology, or what describes it is not installed.
    """
    mesh = described_mesh(topology, sizes)
    found = []
    for job in jobs(plan, cohorts=topology.chip.platform != "cpu"):
        tell(f"compiling {job.kind}: {job.label}")
        programs = figures(job.spec, topology, mesh)
        fits = all(one.fits for one in programs)
        remedy = None
        if not fits:
            tell(f"it does not fit; looking for what would: {job.label}")
            remedy = what_would_fit(job.spec, topology, sizes, programs)
        seconds = total_time({one.name: one for one in programs}) if fits else None
        if isinstance(job.spec, Training):  # its packed rows, for the table
            job = dataclasses.replace(job, spec=laid_for(job.spec, topology, mesh)[0])
        found.append(Rehearsed(job, tuple(programs), seconds, remedy))
    read = sum(node.flops for node in plan.nodes.values() if node.kind == "evaluation")
    return Rehearsal(topology, sizes, tuple(found), read)
