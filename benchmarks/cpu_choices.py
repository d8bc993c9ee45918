"""Forms that were chosen because XLA's CPU back end runs them faster, each beside the usual one, in one run.

    python -m benchmarks.cpu_choices      # prints and writes benchmarks/results/cpu_choices.json

Rounds alternate between the two, so that a machine's other work falls on both; the figure is the ratio of medians.
Shapes are the quickstart's where none is named; the process is pinned to one core, as a worker is.
"""

import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from subjax import cpu

if __name__ == "__main__":
    cpu.pin(0, 1)  # before JAX is imported

import jax
import jax.numpy as jnp
import optax

from benchmarks import data
from subjax import schema
from subjax.data import packing, world
from subjax.models import adapters, cached
from subjax.models.architecture import Rope
from subjax.models.decoder import scaled, softmax
from subjax.models.families import decoder_config
from subjax.models.network import network
from subjax.models.rotary import rotate, rotation
from subjax.parallel.mesh import make_mesh
from subjax.sample.sampler import Sampling, draw
from subjax.train import trainer
from subjax.train.losses import NextToken

ROUNDS, CALLS = 15, 10
Pair = tuple[Callable[[], Any], Callable[[], Any]]  # (own, usual), each a call that returns arrays


def gradient(function: Callable) -> Callable:
    """The jitted vector-Jacobian product of a function of one array."""
    return jax.jit(lambda x, given: jax.vjp(function, x)[1](given)[0])


def softmax_gradient() -> Pair:
    """Gradient of the softmax of attention scores: written as a contraction, against jax.nn.softmax's."""
    scores, given = (jax.random.normal(jax.random.key(i), (128, 2, 1, 29, 29)) for i in range(2))
    own, usual = gradient(softmax), gradient(lambda s: jax.nn.softmax(s, axis=-1))
    return lambda: own(scores, given), lambda: usual(scores, given)


def rotary_gradient() -> Pair:
    """Gradient of rotary positions: with a roll, against halves split off and joined again."""
    x, given = (jax.random.normal(jax.random.key(i), (128, 29, 2, 16)) for i in range(2))
    turn = rotation(jnp.tile(jnp.arange(29)[None], (128, 1)), 16, Rope())

    def halves(x):
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = turn.cos[..., :8], turn.sin[..., 8:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    own, usual = gradient(lambda x: rotate(x, turn)), gradient(halves)
    return lambda: own(x, given), lambda: usual(x, given)


def norm_gradient() -> Pair:
    """Gradient of RMSNorm on rows of SmolLM2-135M: its sum of products as a contraction, against autodiff's."""
    y, given = (jax.random.normal(jax.random.key(i), (8, 512, 576)) for i in range(2))
    own = gradient(lambda y: scaled(y, 1, 1e-5))
    usual = gradient(lambda y: y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5))
    return lambda: own(y, given), lambda: usual(y, given)


def drawing() -> Pair:
    """A token for each of 2,048 rows, and its margin: three plain reductions, against top_k."""
    sampling = Sampling(world.PROMPT, world.ANSWER, world.END, world.PAD)
    logits = jax.random.normal(jax.random.key(0), (2048, len(world.VOCABULARY)))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(2048))

    def top(logits, keys, index):
        noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, index), logits.shape[1:]))(keys)
        best, tokens = jax.lax.top_k(logits + noise, 2)
        return tokens[:, 0], best[:, 0] - best[:, 1] < 1e-4

    own, usual = jax.jit(lambda *a: draw(*a, sampling)), jax.jit(top)
    return lambda: own(logits, keys, jnp.int32(3)), lambda: usual(logits, keys, jnp.int32(3))


def drawing_by_blocks() -> Pair:
    """A token for each of 64 rows of SmolLM2's vocabulary, and its margin: by blocks, against plain reductions."""
    sampling = Sampling(1, 1, -1, 0)
    logits = jax.random.normal(jax.random.key(0), (64, 49_152))
    keys, index = jax.random.split(jax.random.key(1), 64), jnp.arange(64)
    own, usual = (jax.jit(lambda *a, to=to: draw(*a, sampling, to)) for to in (True, False))
    return lambda: own(logits, keys, index), lambda: usual(logits, keys, index)


def decoding() -> Pair:
    """A decoding step of eight layers of SmolLM2-135M's shape, 64 rows: with layers apart, against a stack."""
    net = network(dataclasses.replace(data.shape_of(data.model("135M", "cpu"), "135M"), layers=8))
    params = jax.jit(net.init)(jax.random.key(0))
    token = jnp.arange(64)

    def run(apart: bool) -> Callable[[], Any]:
        layers = cached.set_apart(net, params) if apart else params
        step = jax.jit(lambda p, cache: cached.step(net, p, token, cache), donate_argnums=1)
        held = [cached.empty(net, 64, 112, 44, "float32", apart)]

        def call() -> jax.Array:
            logits, held[0] = step(layers, held[0])
            return logits

        return call

    return run(True), run(False)


def steps() -> Pair:
    """Twenty steps of a student, with the placing of their batches: in one dispatch, against one dispatch each."""
    net = network(
        decoder_config("gpt", "tiny", vocab=len(world.VOCABULARY), length=world.LENGTH, numerics=schema.Numerics())
    )
    base, mesh = jax.jit(net.init)(jax.random.key(0)), make_mesh()
    tuning = schema.Tuning(kind="bias-and-gain")
    stream = packing.in_memory(world.pool(0, 20_000, 10).arrays(), seed=0, batch=128)
    compiled = trainer.program(net, tuning, schema.Optimizer(), 20, (("numbers", 1.0, NextToken(world.ANSWER)),), mesh)
    frozen = adapters.frozen_part(net, tuning, base)

    def run(size: int):
        tuned = jax.tree.map(jnp.copy, adapters.init_tuned(net, tuning, base, jax.random.key(0)))
        state, losses = compiled.start(tuned), []
        for first in range(0, 20, size):
            block = [{"numbers": stream(i)} for i in range(first, first + size)]
            placed = trainer.place(block, {"numbers": ("batch",)}, mesh)
            tuned, state, metrics = compiled.take(tuned, state, frozen, placed)
            losses.append(metrics["loss"])
        return jnp.concatenate(losses), optax.tree.norm(tuned)

    return lambda: run(20), lambda: run(1)


def seconds(function: Callable[[], Any], calls: int) -> float:
    """Seconds a call, mean over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - start) / calls


def compare(pair: Pair, calls: int = CALLS) -> dict[str, Any]:
    """Medians, spread and ratio of a pair, and how far their results lie apart."""
    candidates = dict(zip(("own", "usual"), pair, strict=True))
    outputs = [jax.tree.leaves(jax.block_until_ready(f())) for f in candidates.values()]
    differences = [a.astype(jnp.float32) - b.astype(jnp.float32) for a, b in zip(*outputs, strict=True)]
    apart = max(float(jnp.abs(difference).max()) for difference in differences)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, function in candidates.items():
            times[name].append(seconds(function, calls))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "median_ms": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "spread_ms": {name: [round(1e3 * f(values), 3) for f in (min, max)] for name, values in times.items()},
        "usual_over_own": round(medians["usual"] / medians["own"], 2),
        "largest_difference": apart,
    }


def main() -> None:
    """Measure, print and write the result."""
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rounds": ROUNDS,
    }
    forms = (softmax_gradient, rotary_gradient, norm_gradient, drawing, drawing_by_blocks, decoding)
    for choice, calls in (*((form, CALLS) for form in forms), (steps, 1)):
        assert choice.__doc__
        result[choice.__name__] = {"what": choice.__doc__, **compare(choice(), calls)}
    (pathlib.Path(__file__).parent / "results" / "cpu_choices.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
