"""Compile time of a training step against depth: layers are scanned, so 64 should cost what 4 do.

    python benchmarks/compile_depth.py --topology=v5e:4x4 --rounds=5

Writes benchmarks/results/compile_depth.json, by topology: for each depth the median of the rounds, which alternate,
with their spread, in seconds of wall clock and of this process's CPU; the second is of use where the machine is
shared. Wanted is a ratio of at most 1.5 between the first two depths. The third tells growth from what the
compiler does otherwise for a deep loop than for a shallow one; so do the lines of the program, before and after it.
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
from subjax.parallel.axes import shown
from subjax.parallel.topology import compiler_version, described_mesh, parse_topology
from subjax.rehearsal.plans import default_mesh
from subjax.rehearsal.programs import Rows, Training, training
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.train.losses import NextToken

DEPTHS = (4, 64, 256)
WANTED = 1.5  # times, 64 layers against 4
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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Wall and CPU seconds of lowering and compiling, and the lines of both programs."""

    wall: float
    cpu: float
    lowered: int
    compiled: int


def compiled(layers: int, mesh: jax.sharding.Mesh, round_: int) -> Compiled:
    """Lower and compile a step, at another learning rate each time: nothing is found again."""
    made = dataclasses.replace(spec(layers), optimizer=Optimizer(name="adamw", lr=1e-3 * (1 + round_)))
    wall, cpu = time.perf_counter(), time.process_time()
    lowered = training(made, mesh).lowered
    program = lowered.compile()
    taken = time.perf_counter() - wall, time.process_time() - cpu
    return Compiled(*taken, *(len(text.splitlines()) for text in (lowered.as_text(), program.as_text() or "")))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    topology = parse_topology(given.topology)
    mesh = described_mesh(topology, default_mesh(topology))
    compiled(2, mesh, 0)  # the compiler's own start
    taken: dict[int, list[Compiled]] = {depth: [] for depth in DEPTHS}
    for round_ in range(1, given.rounds + 1):
        for depth in DEPTHS:
            taken[depth].append(compiled(depth, mesh, round_))
    found = {}
    for clock in ("wall", "cpu"):
        values = {depth: [getattr(one, clock) for one in times] for depth, times in taken.items()}
        found[clock] = {
            str(depth): {"median": statistics.median(v), "least": min(v), "most": max(v)} for depth, v in values.items()
        }
        found[clock]["ratio"] = statistics.median(values[DEPTHS[1]]) / statistics.median(values[DEPTHS[0]])
    record = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "compiler": compiler_version(topology),
        "topology": str(topology),
        "mesh": shown(default_mesh(topology)),
        "rounds": given.rounds,
        "seconds": found,
        "wanted_within": WANTED,
        "lines": {str(depth): {"lowered": t[0].lowered, "compiled": t[0].compiled} for depth, t in taken.items()},
    }
    print(json.dumps(record, indent=1))
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept | {str(topology): record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
