"""What a result was measured on: CPU, cores, memory, kernel, a GPU where there is one, and package versions."""

import contextlib
import importlib.metadata
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import psutil

from subjax.cpu import visible_cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "tokenizers")


def gpu() -> str | None:
    """The first GPU's name by `nvidia-smi`; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        return lines[0].strip() if lines else None
    return None


def cpu_model() -> str:
    """The CPU's name, with its vector and matrix extensions that matter to matrix products."""
    text = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split("\t: ", 1) for line in text.replace("\t\t", "\t").splitlines() if "\t: " in line)
    name = fields.get("model name", platform.processor() or platform.machine())
    flags = set(fields.get("flags", "").split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(known)})" if known else name


def describe() -> dict[str, Any]:
    """The machine as a result tells it."""
    return {
        "cpu": cpu_model(),
        "cores": visible_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def packages() -> dict[str, str]:
    """Versions of what was compared, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
