"""The roofline: the least time that a step can take on given hardware, and what bounds it. Needs no JAX.

Source: Williams, Waterman and Patterson 2009, with the network as a third roof. Products, memory traffic and messages
are taken to overlap without loss, so a step takes at least as long as the longest of the three.
"""

import dataclasses

from subjax.parallel.topology import Topology


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one call: FLOPs in matrix products (`useful` without what is made twice or on several
    devices alike), bytes that it must read or write in its memory, and that it must receive: from its island over fast
    links, and from others over the network.
    """

    flops: float
    useful: float
    memory: float
    fast: float
    slow: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of each kind for one call; the longest is the call's `time` and its name the `bound`."""

    compute: float
    memory: float
    network: float
    useful: float

    @property
    def time(self) -> float:
        """Seconds of one call, at least."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max((("compute", self.compute), ("memory", self.memory), ("network", self.network)), key=lambda p: p[1])[
            0
        ]

    @property
    def mfu(self) -> float:
        """The model FLOPs utilization that the bound allows (Chowdhery et al. 2022, appendix B): useful FLOPs over what
        the peak would make in the same time.
        """
        return self.useful / self.time if self.time else 0.0


def roofline(work: Work, topology: Topology, dtype: str, matmul_precision: str) -> Roofline | None:
    """The roofline of a call on a topology; None where its peaks are not known (a CPU)."""
    chip = topology.chip
    if not chip.bf16:
        return None
    peak = chip.peak(dtype, matmul_precision)
    network = work.fast / topology.fast if work.fast else 0.0
    network = max(network, work.slow / chip.network if work.slow else 0.0)
    return Roofline(work.flops / peak, work.memory / chip.hbm_bandwidth, network, work.useful / peak)
