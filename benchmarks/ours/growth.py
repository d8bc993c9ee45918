"""Growth: what one more layer, a wider model, longer rows, more students or devices cost a step and a compilation.

    python -m benchmarks.ours.growth SETUP.json RESULT.json      # started by `benchmarks.growth`, on N virtual devices

A point is a full training step of a tiny random Llama on rows of one length, through the trainer's own program.
"""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from subjax.models.architecture import DecoderConfig
from subjax.models.network import network
from subjax.parallel.mesh import make_mesh
from subjax.parallel.rules import COHORT, TRAIN
from subjax.schema import Optimizer, Tuning
from subjax.train.cohort import Cohort
from subjax.train.losses import NextToken
from subjax.train.step import place, program


def decoder(point: Mapping[str, int]) -> DecoderConfig:
    """A Llama of a point's `layers`, `width` and `length`, with heads of 16."""
    heads = max(1, point["width"] // 16)
    return DecoderConfig(
        vocab=256, length=point["length"], width=point["width"], layers=point["layers"], heads=heads, kv_heads=heads,
        head_dim=16, hidden=3 * point["width"], norm="rmsnorm", norm_eps=1e-5, positions="rotary", activation="silu",
        gated=True, tied=True,
    )  # fmt: skip


def step(point: Mapping[str, int], repeats: int) -> dict[str, float]:
    """Seconds to trace and compile a step of `rows` rows, and of the step itself (median of `repeats`)."""
    net, mesh = network(decoder(point)), make_mesh((1, point["devices"], 1))
    tuning, loss = Tuning(kind="full"), NextToken(point["length"] - 1)  # type: Tuning, Loss
    base = jax.jit(net.init)(jax.random.key(0))
    members = point["members"]
    loss = loss if members == 1 else Cohort(loss)
    parts = (("rows", 1.0, loss),)
    compiled = program(net, tuning, Optimizer(), 1000, parts, mesh, "none", None if members == 1 else members)
    stack = (lambda a: a) if members == 1 else (lambda a: np.stack([a] * members))
    tuned = jax.device_put(jax.tree.map(stack, base), dict(compiled.tuned_shardings))
    state = compiled.start(tuned)
    rng = np.random.default_rng(0)
    shape = (point["rows"], point["length"])
    batch = {"tokens": rng.integers(0, 256, shape).astype(np.int32), "valid": np.ones(shape, bool)}
    batch = {name: stack(array) for name, array in batch.items()}
    placed = place([{"rows": batch}], {"rows": loss.axes}, mesh, TRAIN if members == 1 else COHORT)
    rates = () if members == 1 else (np.full(members, 1e-3, np.float32),)
    begin = time.perf_counter()
    tuned, state, metrics = compiled.take(tuned, state, {}, placed, *rates)
    jax.block_until_ready(metrics)
    first = time.perf_counter() - begin
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        tuned, state, metrics = compiled.take(tuned, state, {}, placed, *rates)
        jax.block_until_ready((tuned, metrics))
        times.append(time.perf_counter() - begin)
    middle = float(np.median(times))
    return {"step": middle, "compile": max(first - middle, 0.0), "least": min(times), "most": max(times)}


def main() -> None:
    """Measure every point of the setup that is for this number of devices, each compiled anew."""
    setup = json.loads(pathlib.Path(sys.argv[1]).read_text())
    jax.config.update("jax_enable_compilation_cache", False)
    found: list[dict[str, Any]] = []
    for point in setup["points"]:
        jax.clear_caches()
        program.cache_clear()
        found.append({**point, **step(point, setup["repeats"])})
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
