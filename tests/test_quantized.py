"""Caches of int8 codes: what they hold, what products with them are, and what becomes of the rows that are drawn."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from subjax.models import cached, quantized
from subjax.models.families import decoder_config
from subjax.models.network import Network, network
from subjax.models.quantized import Quantized
from subjax.parallel.mesh import make_mesh
from subjax.sample import sampler
from subjax.sample.sampler import Sampling, sample
from subjax.sample.slots import programs
from subjax.schema import Numerics

VOCAB, PROMPT, COMPLETION, PAD, ROWS = 24, 16, 12, 0, 64
SAMPLING = Sampling(PROMPT, COMPLETION, 1, PAD, cache_dtype="int8")

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def model() -> tuple[Network, dict[str, np.ndarray]]:
    config = decoder_config("llama", "nano", vocab=VOCAB, length=PROMPT + COMPLETION, numerics=Numerics())
    net = network(dataclasses.replace(config, layers=3, heads=4, kv_heads=2, head_dim=8, qk_norm="head"))
    return net, reference.random_params(net, seed=2)


@functools.cache
def prompts(shared: int) -> np.ndarray:
    """Ragged prompts that begin with the same `shared` tokens."""
    rng = np.random.default_rng(shared)
    begin, out = rng.integers(2, VOCAB, shared), np.full((ROWS, PROMPT), PAD, np.int32)
    for row in out:
        own = rng.integers(2, VOCAB, rng.integers(1, PROMPT - shared + 1))
        row[PROMPT - shared - len(own) :] = [*begin, *own]
    return out


def decoded(a: Quantized) -> np.ndarray:
    return np.asarray(a.codes, np.float32) * np.asarray(a.scales)


# Codes ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20), st.sampled_from([-1, -2]))
def test_a_number_is_kept_within_half_a_step_of_its_vectors_largest(seed, size, axis):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 8, 8)) * 10**size, jnp.float32)
    held = quantized.as_in(x, quantized.zeros(x.shape, "int8", axis), axis)
    assert (held.codes.dtype, held.shape) == (jnp.int8, x.shape)
    step = np.abs(x).max(axis, keepdims=True) / 127
    np.testing.assert_allclose(held.scales, step, rtol=1e-6)
    assert (np.abs(decoded(held) - x) <= step * (0.5 + 1e-4)).all()
    assert (np.abs(held.codes).max(axis) == 127).all()


def test_a_vectors_codes_are_made_of_it_alone_and_zeros_stay_zeros():
    x = jax.random.normal(jax.random.key(0), (4, 5, 8)).at[2].mul(1e4).at[1, 3].set(0.0)
    like = quantized.zeros(x.shape, "int8", -1)
    whole = quantized.as_in(x, like, -1)
    for row in range(4):
        alone = quantized.as_in(x[row], like, -1)
        np.testing.assert_array_equal(whole.codes[row], alone.codes)
        np.testing.assert_array_equal(whole.scales[row], alone.scales)
    assert not decoded(whole)[1, 3].any()
    np.testing.assert_array_equal(decoded(like), np.zeros(x.shape))


@pytest.mark.parametrize("axes", ["bktd", "bkdt", "ktd"])
def test_products_with_codes_are_those_with_what_the_codes_stand_for(axes):
    sizes = dict(b=3, k=2, g=2, q=1, t=6, d=8)
    shape = lambda axes: tuple(sizes[a] for a in axes)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), 3)
    held = quantized.as_in(jax.random.normal(keys[0], shape(axes)), Quantized(*(jnp.zeros(0),) * 2), axes.index("d"))
    codes, scales = quantized.factors(held, axes, jnp.float32)
    q, share = jax.random.normal(keys[1], shape("bkgqd")), jax.random.normal(keys[2], shape("bkgqt"))
    product = functools.partial(jnp.einsum, precision="highest")
    asked = f"bkgqd,{axes}->bkgqt"
    np.testing.assert_allclose(product(asked, q, codes) * scales, product(asked, q, decoded(held)), atol=1e-5)
    asked = f"bkgqt,{axes}->bkgqd"
    np.testing.assert_allclose(product(asked, share * scales, codes), product(asked, share, decoded(held)), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_cache_takes_the_bytes_that_are_said(dtype):
    net, config = model()[0], model()[0].config
    sampling = dataclasses.replace(SAMPLING, cache_dtype=dtype)
    for apart in (False, True):
        made = programs(net, sampling, make_mesh(), False, apart)
        cache = jax.eval_shape(lambda made=made: made.begin(4, PROMPT))[1]
        numbers = 2 * config.layers * 4 * config.kv_heads * config.head_dim * (PROMPT + COMPLETION - 1)
        found = sum(a.dtype.itemsize * math.prod(a.shape) for a in jax.tree.leaves((cache.k, cache.v)))
        assert found == numbers * quantized.bytes_a_number(dtype, config.head_dim)


# Rows -----------------------------------------------------------------------------------------------------------------


@functools.cache
def after(dtype: str, shared: int, apart: bool) -> np.ndarray:
    """Logits after a prompt and one token more, with a cache of `dtype`, its first `shared` tokens a prefix."""
    net, params = model()
    params = jax.tree.map(jnp.asarray, params)
    row = jnp.asarray(np.random.default_rng(0).integers(2, VOCAB, PROMPT + 1))

    @jax.jit
    def run(params):
        prefix = cached.prefix_of(net, params, row[:shared], shared) if shared else None
        own = row[None, shared:PROMPT]
        _, kv = cached.prefill(net, params, own, jnp.ones(own.shape, bool), prefix=prefix)
        empty = cached.empty(net, 1, PROMPT, 2, dtype, apart)
        cache = cached.place(empty, kv, jnp.array([PROMPT - shared]), jnp.array([0]))
        return cached.step(net, cached.set_apart(net, params) if apart else params, row[PROMPT:], cache, prefix=prefix)

    return np.asarray(run(params)[0])


def test_logits_behind_codes_are_near_those_behind_numbers():
    plain = after("float32", 0, False)
    rounding = {dtype: np.abs(after(dtype, 0, False) - plain).max() for dtype in ("bfloat16", "int8")}
    # A code's rounding is half of 1/127 of its vector's largest number; bfloat16's half of 1/128 of each number's own.
    assert 1e-4 * np.abs(plain).max() < rounding["int8"] < 4 * rounding["bfloat16"]
    assert rounding["int8"] < 0.02 * np.abs(plain).max()


def test_codes_are_the_same_of_a_prefix_and_of_layers_apart():
    """But for those that fall on the other side of a half for an operation's own rounding."""
    plain, coded = after("float32", 0, False), after("int8", 0, False)
    rounding = np.abs(coded - plain).max()
    for shared, apart in ((0, True), (9, False), (9, True)):
        assert np.abs(after("int8", shared, apart) - coded).max() < 0.05 * rounding


def drawn(shared: int, batch: int, sampling: Sampling = SAMPLING) -> sampler.Drawn:
    net, params = model()
    return sample(net, params, prompts(shared), sampling=sampling, key=jax.random.key(5), mesh=make_mesh(), batch=batch)


@pytest.mark.parametrize("shared", [0, 9])
def test_rows_do_not_depend_on_their_slots(shared, monkeypatch):
    one, few = drawn(shared, 8), drawn(shared, ROWS)
    monkeypatch.setattr(sampler, "apart", lambda *_: False)
    stacked = drawn(shared, 8)
    for other in (few, stacked):
        sure = ~(one.near_tie | other.near_tie)
        assert sure.mean() >= 0.9
        # Rounding of a product may turn a code, and a code a draw: seldom.
        assert (one.tokens == other.tokens).all(1)[sure].mean() >= 0.95
    plain = drawn(shared, 8, dataclasses.replace(SAMPLING, cache_dtype="float32"))
    assert (one.tokens == plain.tokens).mean() > 0.7  # another corpus, if not by much
