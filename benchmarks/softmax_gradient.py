"""The decoder's own softmax gradient against jax.nn.softmax's, at the quickstart's shapes, side by side in one run.

    python -m benchmarks.softmax_gradient      # prints and writes benchmarks/results/softmax_gradient.json

Rounds alternate between the two, so that a machine's other work falls on both; the figure is the ratio of medians.
"""

import datetime
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from subjax.models.decoder import softmax

SHAPE = (128, 2, 1, 29, 29)  # batch, key-value heads, groups, queries, keys
ROUNDS, CALLS = 15, 20


def gradient(function):
    """The jitted vector-Jacobian product of a softmax."""
    return jax.jit(lambda scores, given: jax.vjp(function, scores)[1](given)[0])


def seconds(function, *arguments) -> float:
    """Seconds a call, mean over CALLS calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        jax.block_until_ready(function(*arguments))
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    """Measure, print and write the result."""
    scores, given = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(2))
    candidates = {"own": gradient(softmax), "usual": gradient(lambda s: jax.nn.softmax(s, axis=-1))}
    outputs = {name: jax.block_until_ready(f(scores, given)) for name, f in candidates.items()}
    difference = float(jnp.abs(outputs["own"] - outputs["usual"]).max())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, function in candidates.items():
            times[name].append(seconds(function, scores, given))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "what": "softmax gradient, float32",
        "shape": SHAPE,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "median_ms": {name: round(1e3 * value, 4) for name, value in medians.items()},
        "spread_ms": {name: [round(1e3 * f(values), 4) for f in (min, max)] for name, values in times.items()},
        "usual_over_own": round(medians["usual"] / medians["own"], 3),
        "largest_difference": difference,
    }
    folder = pathlib.Path(__file__).parent / "results"
    (folder / "softmax_gradient.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
