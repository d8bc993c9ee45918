"""What JAX gets out of the machine with nothing else to do: large matrix products, the model's own, and memory."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import timed
from benchmarks.side import Ready

LONGEST = 5.0  # seconds of a round: a ceiling settles at once
ROWS = 1024  # rows of an activation in the model's products


def _array(index: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape).astype(dtype)


def _round(call: Callable[[], Any], units: float) -> Callable[[int, float], dict[str, Any]]:
    """A round that does `call` again and again; each is worth so many units."""

    def piece(_: int) -> float:
        jax.block_until_ready(call())
        return units

    jax.block_until_ready(call())
    return lambda index, seconds: timed(piece, min(seconds, LONGEST))


def large(setup: Mapping[str, Any]) -> Ready:
    """GFLOP a second of a square product that fills the machine. Setup: `dtype`."""
    side = 2048 if setup["device"] == "cpu" else 8192
    a, b = (_array(i, (side, side), setup["dtype"]) for i in range(2))
    return Ready(_round(lambda: product(a, b), 2e-9 * side**3), {"side": side, "dtype": setup["dtype"]})


def shapes(setup: Mapping[str, Any]) -> Ready:
    """GFLOP a second of a layer's products one after another. Setup: `dtype`, `shapes`: [[inputs, outputs], …]."""
    pairs = [
        (_array(i, (ROWS, inputs), setup["dtype"]), _array(i, (inputs, outputs), setup["dtype"]))
        for i, (inputs, outputs) in enumerate(setup["shapes"])
    ]
    flops = sum(2.0 * ROWS * inputs * outputs for inputs, outputs in setup["shapes"])
    return Ready(_round(lambda: [product(a, b) for a, b in pairs], 1e-9 * flops), {"rows": ROWS})


def stream(setup: Mapping[str, Any]) -> Ready:
    """GB a second of a triad over arrays far larger than any cache (McCalpin's STREAM): two are read, one is written.

    The result takes the place of an operand: memory that is new each time would be measured by the kernel's zeroing.
    """
    size = 2**26 if setup["device"] == "cpu" else 2**29
    a, b = (_array(i, (size,), "float32") for i in range(2))
    triad = jax.jit(lambda a, b: 0.5 * a + 0.5 * b, donate_argnums=0)
    kept = [a]

    def call() -> jax.Array:
        kept[0] = triad(kept[0], b)
        return kept[0]

    return Ready(_round(call, 3e-9 * b.nbytes), {"bytes_of_an_array": b.nbytes})


@jax.jit
def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A plain matrix product in the arrays' own precision."""
    return jnp.dot(a, b)
