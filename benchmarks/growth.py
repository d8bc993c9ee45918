"""How step time and compile time grow with layers, width, length, rows and devices, with fitted exponents.

    python -m benchmarks.growth            # about half an hour on two cores
    python -m benchmarks.growth --quick    # two points an axis: to see that it works

Tiny random Llamas trained in full, one axis moved at a time. Every round is a fresh process a number of devices, with
nothing compiled before. Virtual devices share the machine's cores, so more of them cannot be faster: the point is what
they cost. Step time ~ axis ** exponent, by least squares on logarithms. Members are a cohort's: each has weights of its
own here, for tiny models are trained in full.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Options
from subjax.cpu import visible_cores
from subjax.errors import SubjaxError

BASE = dict(layers=4, width=64, length=64, rows=16, members=1, devices=1)
AXES: dict[str, Sequence[int]] = {
    "layers": (4, 8, 16, 32, 64),
    "width": (32, 64, 128, 256, 512),
    "length": (32, 64, 128, 256, 512),
    "rows": (8, 16, 32, 64, 128),
    "members": (1, 2, 4, 8, 16),
    "devices": (1, 2, 4, 8),
}
WITHIN = 1.5  # compile time at 64 layers over that at 4


def points(quick: bool) -> list[dict[str, int]]:
    """Every point once: the base with one axis moved."""
    moved = [{**BASE, axis: value} for axis, values in AXES.items() for value in (values[:2] if quick else values)]
    return list({json.dumps(point): point for point in moved}.values())


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log time over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def measure(wanted: Sequence[Mapping[str, int]], repeats: int, devices: int) -> list[dict[str, Any]]:
    """The points of a number of devices, in a fresh process.

    Raises:
        SubjaxError: the process failed; its last line is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, told = pathlib.Path(folder) / "setup.json", pathlib.Path(folder) / "result.json"
        asked.write_text(json.dumps({"points": list(wanted), "repeats": repeats}))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(visible_cores()),
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.ours.growth", str(asked), str(told)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SubjaxError(f"growth on {devices} devices: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        return list(json.loads(told.read_text()))


def summary(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each point with the spread over rounds of its step and compile times."""
    return [
        {name: same[0][name] for name in BASE}
        | {what: harness.spread([point[what] for point in same]) for what in ("step", "compile")}
        for same in zip(*rounds, strict=True)
    ]


def fits(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each axis the exponents of step and compile time over its points."""
    out = {}
    for axis in AXES:
        line = sorted(
            (p for p in found if all(p[name] == BASE[name] for name in BASE if name != axis)), key=lambda p: p[axis]
        )
        if len(line) > 1:
            sizes = [p[axis] for p in line]
            out[axis] = {what: exponent(sizes, [p[what]["median"] for p in line]) for what in ("step", "compile")}
    return out


def by_depth(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many times as long the deepest step compiles as the shallowest one, all else as in `BASE`."""
    alike = [p for p in found if all(p[name] == size for name, size in BASE.items() if name != "layers")]
    took = {p["layers"]: p["compile"]["median"] for p in alike}
    deepest, shallowest = max(took), min(took)
    return {"layers": [shallowest, deepest], "ratio": took[deepest] / took[shallowest], "wanted_within": WITHIN}


def run(asked: Options) -> dict[str, Any]:
    """Measure; see the module."""
    wanted = points(asked.quick)
    repeats = 3 if asked.quick else 20
    rounds = []
    for index in range(asked.rounds):
        by_devices = {
            devices: measure([p for p in wanted if p["devices"] == devices], repeats, devices)
            for devices in sorted({p["devices"] for p in wanted})
        }
        rounds.append([point for several in by_devices.values() for point in several])
        print(f"round {index + 1} of {asked.rounds}", flush=True)
    found = summary(rounds)
    return harness.result(
        "growth", dataclasses.replace(asked, device="cpu"), {}, unit="seconds",
        settings={"base": BASE, "repeats": repeats},
        extra={
            "points": found,
            "exponents": fits(found),
            "compile_by_depth": by_depth(found),
        },
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "growth", __doc__ or "")
