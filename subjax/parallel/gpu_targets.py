"""What XLA must know of a GPU to compile for it where there is none: its text form of a target.

The numbers are the hardware's own (NVIDIA's CUDA programming guide, table of technical specifications by compute
capability, and the data sheets); the keys are those of XLA's `GpuTargetConfigProto`.
"""

import dataclasses

from subjax.parallel.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class _Gpu:
    capability: int  # the major number; all here have minor 0
    cores: int  # streaming multiprocessors
    units: int  # float32 units of one
    clock_ghz: float
    cache: int  # bytes of the second level
    shared: int  # bytes of shared memory of a multiprocessor
    title: str


_GPUS = {
    "a100": _Gpu(8, 108, 64, 1.41, 40 * 2**20, 164 * 2**10, "NVIDIA A100-SXM4-80GB"),
    "h100": _Gpu(9, 132, 128, 1.98, 50 * 2**20, 228 * 2**10, "NVIDIA H100 80GB HBM3"),
    "h200": _Gpu(9, 132, 128, 1.98, 60 * 2**20, 228 * 2**10, "NVIDIA H200"),
}


def target_config(name: str) -> str:
    """The target of a GPU of `subjax.parallel.chips`, as text."""
    gpu, chip = _GPUS[name], CHIPS[name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {gpu.shared - 1024}
  shared_memory_per_core: {gpu.shared}
  core_count: {gpu.cores}  fpus_per_core: {gpu.units}  clock_rate_ghz: {gpu.clock_ghz}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {int(chip.hbm_bandwidth)}  device_memory_size: {chip.hbm}  l2_cache_size: {gpu.cache}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
device_description_str: "{gpu.title}"
"""
