"""Products with weights in a narrower dtype: their gradients are summed in float32, over tokens and over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subjax.models.products import biased, low_rank, product

BF16 = jnp.bfloat16


def drawn(*shapes, seed=0):
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("x", "w", "inputs"), [((2, 5, 6), (6, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 6), 2)])
def test_a_product_and_its_gradients_are_those_of_the_rounded_operands(x, w, inputs):
    x, w, g = drawn(x, w, (2, 5, *w[inputs:]))
    given = x.astype(BF16)

    def plain(x, w):
        axes = (tuple(range(2, 2 + inputs)), tuple(range(inputs)))
        return (jax.lax.dot_general(x, w, (axes, ((), ())), precision="highest") * g).sum()

    ours = jax.grad(lambda x, w: (product(x, w, inputs, "highest").astype(jnp.float32) * g).sum(), argnums=(0, 1))
    by_x, by_w = ours(given, w)
    rounded = [a.astype(BF16).astype(jnp.float32) for a in (given, w)]
    g = g.astype(BF16).astype(jnp.float32)  # what comes back has the product's dtype
    expected_x, expected_w = jax.grad(plain, argnums=(0, 1))(*rounded)
    assert (by_x.dtype, by_w.dtype) == (BF16, jnp.float32)
    np.testing.assert_allclose(by_w, expected_w, rtol=1e-5, atol=1e-5)  # in bfloat16 it would be 1e-2
    np.testing.assert_allclose(by_x.astype(jnp.float32), expected_x, rtol=1e-2, atol=1e-2)


def test_low_rank_gradients_are_float32():
    x, a, b, g = drawn((2, 64, 6), (6, 2), (2, 3, 4), (2, 64, 3, 4))
    given, scale = x.astype(BF16), jnp.float32(0.5)
    ours = jax.grad(
        lambda a, b: (low_rank(given, a, b, scale, "highest").astype(jnp.float32) * g).sum(), argnums=(0, 1)
    )
    by_a, by_b = ours(a, b)

    def plain(a, b):
        return (
            jnp.einsum("bli,ir,ro->blo", given.astype(jnp.float32), a, b.reshape(2, 12)) * 0.5 * g.reshape(2, 64, 12)
        ).sum()

    for got, expected in zip((by_a, by_b), jax.grad(plain, argnums=(0, 1))(a, b), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=0.05, atol=0.05 * float(jnp.abs(expected).max()))


def test_a_bias_collects_its_gradient_in_float32():
    """4,096 ones: in bfloat16 the sum would stop at 256."""
    y, bias = jnp.zeros((4, 1024, 3), BF16), jnp.zeros(3)
    assert jax.grad(lambda bias: biased(y, bias).astype(jnp.float32).sum())(bias).tolist() == [4096.0] * 3


def test_float32_operands_take_the_plain_product():
    x, w = drawn((2, 5, 6), (6, 4))
    text = jax.jit(lambda x, w: product(x, w, 1, "highest")).lower(x, w).as_text()
    assert len(re.findall("dot_general", text)) == 1
    assert "custom" not in text
