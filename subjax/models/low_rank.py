"""The product of a low-rank update, with gradients whose wide operand is never turned over.

Left to itself, the gradient of a thin matrix is written as (wide, tokens) x (tokens, thin), for which XLA's CPU back
end copies the wide operand with its axes exchanged: a third of a LoRA step. Here it is (thin, tokens) x (tokens, wide).
"""

import functools

import jax
from jaxtyping import Array, Float


def _product(u: Array, w: Array, left: tuple[int, ...], right: tuple[int, ...], precision: str) -> Array:
    return jax.lax.dot_general(u, w, ((left, right), ((), ())), precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def low_rank(
    x: Float[Array, "batch length *inputs"],
    a: Float[Array, "*inputs rank"],
    b: Float[Array, "rank *outputs"],
    scale: Float[Array, ""],
    precision: str,
) -> Float[Array, "batch length *outputs"]:
    """`scale` x A B; no gradient is taken by `scale`. Source: Hu et al. 2021, arXiv 2106.09685, section 4.1."""
    return _forward(x, a, b, scale, precision)[0]


def _forward(x: Array, a: Array, b: Array, scale: Array, precision: str):
    n = a.ndim - 1
    # Scaled where it is thin.
    low = _product(x, a, tuple(range(2, 2 + n)), tuple(range(n)), precision) * scale
    return _product(low, b, (2,), (0,), precision), (x, a, b, scale, low)


def _backward(precision: str, held: tuple[Array, ...], gradient: Array):
    x, a, b, scale, low = held
    n, m = a.ndim - 1, b.ndim - 1
    tokens = (0, 1)
    by_b = _product(low, gradient, tokens, tokens, precision)
    by_low = _product(gradient, b, tuple(range(2, 2 + m)), tuple(range(1, 1 + m)), precision) * scale
    by_a = _product(by_low, x, tokens, tokens, precision)  # (rank, *inputs)
    by_x = _product(by_low, a, (2,), (n,), precision)
    return by_x, by_a.transpose(*range(1, 1 + n), 0), by_b, None


low_rank.defvjp(_forward, _backward)
