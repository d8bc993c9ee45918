"""What one device of each described kind can do: the peaks that a roofline divides by. Needs no JAX.

A device is what JAX calls one: a chip, and of TPU7x half a chip. Figures are the makers' own, for dense products:
  TPU: the "System architecture" tables of Google Cloud's pages on v5e, v5p, v6e and TPU7x. A chip's inter-chip
  bandwidth there counts both directions of all its links; here it stands one way and a link. Network: NICs of a host
  over its chips.
  NVIDIA: the data sheets of A100, H100, H200 and B200 in their SXM form, less structured sparsity. NVLink one way;
  network: one NIC a GPU, as in the makers' own reference systems (200 Gb/s HDR beside A100, 400 Gb/s NDR beside the
  others).
"""

import dataclasses
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        name: as it stands before the colon of a topology.
        bf16: peak of products of bfloat16 matrices summed in float32, FLOP/s.
        float32: peak of products of float32 matrices by matmul precision. A TPU makes them of bfloat16 products, six
            for `highest`, three for `high`, one for `default`; a GPU of its float32 units, or of its TF32 ones.
        hbm: bytes of memory, of a TPU those that its compiler gives to programs. hbm_bandwidth: bytes a second.
        link: bytes a second, one way, of one link to a neighbour; of a GPU, of all its NVLinks together.
        dimensions: of the torus of links; 1 where a switch joins a host's GPUs.
        wraps_at: the torus closes in dimensions whose length is a multiple of it; of three, if all are.
        network: bytes a second, one way, between slices (TPU) or hosts (GPU).
        most: chips of the largest slice; 0 where there are no slices. per_chip: devices of one chip.
    """

    name: str
    platform: Literal["tpu", "cuda", "cpu"]
    bf16: float
    float32: dict[str, float] = dataclasses.field(hash=False)
    hbm: int
    hbm_bandwidth: float
    link: float
    dimensions: int
    wraps_at: int
    network: float
    most: int = 0
    per_chip: int = 1

    def peak(self, dtype: str, matmul_precision: str) -> float:
        """FLOP/s of matrix products in a compute dtype."""
        return self.bf16 if dtype == "bfloat16" else self.float32[matmul_precision]


def _tpu(
    name: str, bf16: float, hbm: float, bandwidth: float, link: float, dims: int, wraps: int, network: float,
    most: int, per_chip: int = 1,
) -> Chip:  # fmt: skip
    float32 = {"default": bf16, "high": bf16 / 3, "highest": bf16 / 6}
    return Chip(name, "tpu", bf16, float32, int(hbm * GIB), bandwidth, link, dims, wraps, network, most, per_chip)


def _gpu(
    name: str, bf16: float, tf32: float, float32: float, hbm: int, bandwidth: float, nvlink: float, network: float
) -> Chip:
    by_precision = {"default": tf32, "high": tf32, "highest": float32}
    return Chip(name, "cuda", bf16, by_precision, hbm, bandwidth, nvlink, 1, 1, network)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 197e12, 15.75, 819e9, 50e9, 2, 16, 200e9 / 8 / 8, 256),
        _tpu("v5p", 459e12, 95.74, 2765e9, 100e9, 3, 4, 50e9 / 8, 8960),
        _tpu("v6e", 918e12, 31.25, 1640e9, 100e9, 2, 16, 800e9 / 8 / 8, 256),
        # 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 1,200 GB/s of links (both ways, six of them) a chip of two devices.
        _tpu("tpu7x", 2307e12 / 2, 94.75, 7380e9 / 2, 100e9 / 2, 3, 4, 100e9 / 8 / 2, 9216, per_chip=2),
        _gpu("a100", 312e12, 156e12, 19.5e12, 85_100_068_864, 2039e9, 300e9, 25e9),
        _gpu("h100", 989e12, 494e12, 67e12, 84_942_979_072, 3350e9, 450e9, 50e9),
        _gpu("h200", 989e12, 494e12, 67e12, 150_121_545_728, 4800e9, 450e9, 50e9),
    )
}
# Virtual devices of the processor here: programs compile for them as for any mesh, and no peak is known.
CPU = Chip("cpu", "cpu", 0.0, {"default": 0.0, "high": 0.0, "highest": 0.0}, 0, 0.0, 0.0, 1, 1, 0.0)
