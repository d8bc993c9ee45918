"""Compile time of a training step against depth: layers are scanned, so 64 should cost what 4 do.

    python benchmarks/compile_depth.py --topology=v5e:4x4 --rounds=5

Writes benchmarks/results/compile_depth.json, by topology: for each depth the median of the rounds, which alternate,
with their spread, in seconds of wall clock and of this process's CPU; the second is of use where the machine is
shared. What is looked for is a ratio of at most 1.5.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from subjax.models.families import decoder_config
from subjax.parallel.topology import compiler_version, described_mesh, parse_topology
from subjax.rehearsal.plans import default_mesh, mesh_text
from subjax.rehearsal.programs import Rows, Training, training
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.train.losses import NextToken

DEPTHS = (4, 64)
ROWS, LENGTH = 64, 128
RESULTS = pathlib.Path(__file__).parent / "results" / "compile_depth.json"


def spec(layers: int) -> Training:
    """A full fine-tune of a Llama-like decoder, 256 wide."""
    numerics = Numerics(dtype="bfloat16", matmul_precision="default")
    config = decoder_config("llama", "small", vocab=1024, length=LENGTH, numerics=numerics)
    config = dataclasses.replace(config, width=256, heads=8, kv_heads=8, head_dim=32, hidden=512, layers=layers)
    arrays = (("tokens", (ROWS, LENGTH + 1), "int32"), ("valid", (ROWS, LENGTH + 1), "bool"))
    rows = Rows("numbers", 1.0, NextToken(LENGTH), arrays, ROWS, LENGTH, LENGTH)
    return Training(config, "float32", Tuning(kind="full"), Optimizer(name="adamw"), (rows,))


def seconds(layers: int, mesh: jax.sharding.Mesh, round_: int) -> tuple[float, float]:
    """Wall and CPU seconds of lowering and compiling, at another learning rate each time: nothing is found again."""
    made = dataclasses.replace(spec(layers), optimizer=Optimizer(name="adamw", lr=1e-3 * (1 + round_)))
    wall, cpu = time.perf_counter(), time.process_time()
    training(made, mesh).lowered.compile()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    topology = parse_topology(given.topology)
    mesh = described_mesh(topology, default_mesh(topology))
    seconds(2, mesh, 0)  # the compiler's own start
    taken: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
    for round_ in range(1, given.rounds + 1):
        for depth in DEPTHS:
            taken[depth].append(seconds(depth, mesh, round_))
    found = {}
    for at, clock in enumerate(("wall", "cpu")):
        values = {depth: [one[at] for one in times] for depth, times in taken.items()}
        found[clock] = {
            str(depth): {"median": statistics.median(v), "least": min(v), "most": max(v)} for depth, v in values.items()
        }
        found[clock]["ratio"] = statistics.median(values[DEPTHS[1]]) / statistics.median(values[DEPTHS[0]])
    record = {
        "date": datetime.date.today().isoformat(), "jax": jax.__version__, "compiler": compiler_version(topology),
        "topology": str(topology), "mesh": mesh_text(default_mesh(topology)), "rounds": given.rounds, "seconds": found,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept | {str(topology): record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
