"""Products with weights, whose gradients are summed in float32 whatever the computation's dtype, and LoRA's.

Weights that are trained are held in float32 and rounded for each product. Their gradients are sums over tokens, and on
a mesh over devices: a product that gives them in float32 makes both sums in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product with weights"


def _product(
    u: Array, w: Array, left: tuple[int, ...], right: tuple[int, ...], precision: str, dtype: str | None = None
) -> Array:
    return jax.lax.dot_general(u, w, ((left, right), ((), ())), precision=precision, preferred_element_type=dtype)


def product(
    x: Float[Array, "batch length *inputs"], w: Float[Array, "*inputs_and_outputs"], inputs: int, precision: str
) -> Float[Array, "batch length *outputs"]:
    """x W over the last `inputs` axes of x, in the dtype of x."""
    if w.dtype == x.dtype:
        # As matrices: over several axes XLA would copy a weight with its axes exchanged for the gradient by x.
        outputs = w.shape[inputs:]
        w = w.reshape(math.prod(w.shape[:inputs]), -1)
        y = _product(x.reshape(*x.shape[:2], -1), w, (2,), (0,), precision)
        return y.reshape(*y.shape[:2], *outputs)
    return _rounded(x, w, inputs, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(x: Array, w: Array, inputs: int, precision: str) -> Array:
    return _product(x, w.astype(x.dtype), tuple(range(2, 2 + inputs)), tuple(range(inputs)), precision)


def _rounded_forward(x: Array, w: Array, inputs: int, precision: str):
    return _rounded(x, w, inputs, precision), (x, w)


def _rounded_backward(inputs: int, precision: str, held: tuple[Array, Array], gradient: Array):
    x, w = held
    outputs = w.ndim - inputs
    behind = tuple(range(2, 2 + outputs))
    by_x = _product(gradient, w.astype(x.dtype), behind, tuple(range(inputs, w.ndim)), precision)
    by_w = _product(x, gradient, (0, 1), (0, 1), precision, "float32")
    return by_x, by_w.astype(w.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)


def biased(y: Float[Array, "batch length *outputs"], bias: Float[Array, "*outputs"]) -> Array:
    """y with a bias added, in the dtype of y; where that is not the bias's, added in float32, as its gradient is."""
    if bias.dtype == y.dtype:
        return y + bias[None, None]
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def low_rank(
    x: Float[Array, "batch length *inputs"],
    a: Float[Array, "*inputs rank"],
    b: Float[Array, "rank *outputs"],
    scale: Float[Array, ""],
    precision: str,
) -> Float[Array, "batch length *outputs"]:
    """`scale` x A B, in the dtype of x; no gradient is taken by `scale`.

    Left to itself, the gradient of a thin matrix is written as (wide, tokens) x (tokens, thin), for which XLA's CPU
    back end copies the wide operand with its axes exchanged. Here it is (thin, tokens) x (tokens, wide).
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    return _low_rank_forward(x, a, b, scale, precision)[0]


def _low_rank_forward(x: Array, a: Array, b: Array, scale: Array, precision: str):
    n = a.ndim - 1
    # Scaled where it is thin.
    low = _product(x, a.astype(x.dtype), tuple(range(2, 2 + n)), tuple(range(n)), precision) * scale.astype(x.dtype)
    low = checkpoint_name(low, PRODUCT)
    return _product(low, b.astype(x.dtype), (2,), (0,), precision), (x, a, b, scale, low)


def _low_rank_backward(precision: str, held: tuple[Array, ...], gradient: Array):
    x, a, b, scale, low = held
    n, m = a.ndim - 1, b.ndim - 1
    tokens = (0, 1)
    by_b = _product(low, gradient, tokens, tokens, precision, "float32")
    by_low = _product(gradient, b.astype(x.dtype), tuple(range(2, 2 + m)), tuple(range(1, 1 + m)), precision)
    by_low = by_low * scale.astype(x.dtype)
    by_a = _product(by_low, x, tokens, tokens, precision, "float32")  # (rank, *inputs)
    by_x = _product(by_low, a.astype(x.dtype), (2,), (n,), precision)
    return by_x, by_a.transpose(*range(1, 1 + n), 0).astype(a.dtype), by_b.astype(b.dtype), None


low_rank.defvjp(_low_rank_forward, _low_rank_backward)
