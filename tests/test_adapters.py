"""What each kind of tuning moves, and LoRA's algebra."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from subjax.data import packing
from subjax.errors import UsageError
from subjax.models import adapters
from subjax.models.families import FAMILIES, decoder_config
from subjax.models.network import Network, network
from subjax.parallel.mesh import make_mesh
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.train.losses import NextToken
from subjax.train.trainer import Run, Term, fit

VOCAB, LENGTH = 23, 10
LORA = Tuning(kind="lora", rank=3, alpha=4.5)
BIAS_AND_GAIN = Tuning(kind="bias-and-gain")
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def _net(family: str, size: str = "nano", vocab: int = VOCAB, length: int = LENGTH) -> Network:
    config = decoder_config(family, size, vocab=vocab, length=length, numerics=Numerics())
    # Grouped heads, so that a pair whose shape is that of the queries does not fit the keys.
    return network(dataclasses.replace(config, heads=4, kv_heads=2, head_dim=4) if size == "nano" else config)


@functools.cache
def _base(family: str) -> dict[str, np.ndarray]:
    return reference.random_params(_net(family), seed=0)


def _pairs(family: str, tuning: Tuning, seed: int = 1) -> dict[str, jax.Array]:
    """Tuned LoRA arrays with a B that is not zero, as after training."""
    rng = np.random.default_rng(seed)
    axes = adapters.tuned_axes(_net(family), tuning)
    return {n: jnp.asarray(rng.normal(0, 0.25, shape), jnp.float32) for n, (shape, _) in axes.items()}


@functools.cache
def _logits(family: str):
    """A function of (params, adapter): the logits of the last positions, by the path that the trainer takes."""
    rng = np.random.default_rng(2)
    tokens, valid = rng.integers(1, VOCAB, (3, LENGTH)), np.arange(LENGTH)[None] >= np.array([[0], [2], [5]])
    forward = jax.jit(_net(family).forward, static_argnames="tail")
    return lambda params, adapter: np.asarray(forward(params, tokens, valid, tail=4, adapter=adapter))


@every_family
def test_lora_shapes_are_those_of_its_matrices(family):
    net = _net(family)
    axes = adapters.tuned_axes(net, LORA)
    targets = {"q", "k", "v", "o", "up", "down"} | ({"gate"} if net.config.gated else set())
    assert axes.keys() == {f"lora/{t}/{part}" for t in targets for part in "ab"}
    assert axes["lora/q/a"] == ((2, 16, 3), ("layers", "embed", "rank"))
    assert axes["lora/q/b"] == ((2, 3, 4, 4), ("layers", "rank", "heads", "head_dim"))
    assert axes["lora/k/b"] == ((2, 3, 2, 4), ("layers", "rank", "kv_heads", "head_dim"))
    assert axes["lora/o/a"] == ((2, 4, 4, 3), ("layers", "heads", "head_dim", "rank"))
    assert axes["lora/o/b"] == ((2, 3, 16), ("layers", "rank", "embed"))
    assert axes["lora/down/a"] == ((2, net.config.hidden, 3), ("layers", "mlp", "rank"))


@pytest.mark.parametrize("family", ["gpt", "llama-bias"])
def test_lora_starts_as_the_base_exactly(family):
    net, base, logits = _net(family), _base(family), _logits(family)
    tuned = adapters.init_tuned(net, LORA, base, jax.random.key(0))
    assert all((np.asarray(a) == 0).all() == n.endswith("/b") for n, a in tuned.items())
    params, adapter = adapters.join(LORA, tuned, adapters.frozen_part(net, LORA, base))
    assert params.keys() == base.keys()
    np.testing.assert_array_equal(logits(params, adapter), logits(base, {}))
    merged = adapters.merge(net, LORA, tuned, base)
    for name, array in base.items():
        np.testing.assert_array_equal(merged[name], array, err_msg=name)


@every_family
def test_merged_lora_is_the_adapter(family):
    net, base, logits = _net(family), _base(family), _logits(family)
    tuned = _pairs(family, LORA)
    params, adapter = adapters.join(LORA, tuned, adapters.frozen_part(net, LORA, base))
    beside = logits(params, adapter)
    inside = logits(adapters.merge(net, LORA, tuned, base), {})
    largest = np.abs(inside).max()
    assert np.abs(beside - logits(base, {})).max() > 0.1 * largest  # it moves the model
    assert np.abs(beside - inside).max() < 5e-6 * largest


def test_merging_adds_alpha_over_rank_times_a_b_to_the_targets_alone():
    family, tuning = "llama", dataclasses.replace(LORA, targets=("k", "o", "gate"))
    base, tuned = _base(family), _pairs(family, tuning)
    merged = adapters.merge(_net(family), tuning, tuned, base)
    scale = 1.5
    wide = {n: np.asarray(a, np.float64) for n, a in tuned.items()}
    updates = {
        "blocks/attention/k/kernel": np.einsum("lir,lrhd->lihd", wide["lora/k/a"], wide["lora/k/b"]),
        "blocks/attention/o/kernel": np.einsum("lhdr,lro->lhdo", wide["lora/o/a"], wide["lora/o/b"]),
        "blocks/mlp/gate/kernel": np.einsum("lir,lro->lio", wide["lora/gate/a"], wide["lora/gate/b"]),
    }
    for name, array in base.items():
        np.testing.assert_allclose(merged[name], array + scale * updates.get(name, 0.0), atol=1e-5, err_msg=name)
        assert (name in updates) != np.array_equal(merged[name], array), name


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    """Kalajdzievski 2023: the update does not shrink as the rank grows."""
    plain = dataclasses.replace(LORA, rank=4, alpha=6.0)
    stable = dataclasses.replace(plain, rslora=True)
    assert (plain.scale, stable.scale) == (1.5, 3.0)
    net, base, tuned = _net("llama"), _base("llama"), _pairs("llama", plain)
    one, other = (adapters.merge(net, tuning, tuned, base) for tuning in (plain, stable))
    for name, array in base.items():
        np.testing.assert_allclose(other[name] - array, 2 * (one[name] - array), atol=2e-6, err_msg=name)
    beside = _logits("llama")(*adapters.join(stable, tuned, adapters.frozen_part(net, stable, base)))
    np.testing.assert_allclose(beside, _logits("llama")(other, {}), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_a_layer_subset_leaves_the_other_layers_as_they_are(layers):
    tuning = dataclasses.replace(LORA, layers=layers)
    np.testing.assert_array_equal(adapters.layer_scales(tuning, 2), [1.5 * (layer in layers) for layer in range(2)])
    net, base, tuned = _net("llama"), _base("llama"), _pairs("llama", tuning)
    merged, whole = adapters.merge(net, tuning, tuned, base), adapters.merge(net, LORA, tuned, base)
    for layer in range(2):
        expected = whole if layer in layers else base
        for name in (name for name in base if name.startswith("blocks/")):
            np.testing.assert_array_equal(merged[name][layer], expected[name][layer], err_msg=name)
    beside = _logits("llama")(*adapters.join(tuning, tuned, adapters.frozen_part(net, tuning, base)))
    np.testing.assert_allclose(beside, _logits("llama")(merged, {}), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_there_is_told_in_one_line():
    with pytest.raises(UsageError) as caught:
        adapters.tuned_axes(_net("gpt"), dataclasses.replace(LORA, layers=(0, 2)))
    assert str(caught.value) == "tuning.layers: there is no layer 2; the model has 2, from 0 on"


def test_lora_pairs_are_drawn_by_name_within_their_bound():
    net, base, key = _net("llama"), _base("llama"), jax.random.key(5)
    every = adapters.init_tuned(net, LORA, base, key)
    few = adapters.init_tuned(net, dataclasses.replace(LORA, targets=("down", "q")), base, key)
    assert few.keys() == {"lora/down/a", "lora/down/b", "lora/q/a", "lora/q/b"}
    for name, array in few.items():
        np.testing.assert_array_equal(array, every[name])
    for name, inputs in (("lora/q/a", 16), ("lora/o/a", 16), ("lora/down/a", net.config.hidden)):
        largest = float(jnp.abs(every[name]).max())
        assert 0.8 * inputs**-0.5 < largest <= inputs**-0.5, name
    assert not np.array_equal(every["lora/q/a"], every["lora/v/a"])
    other = adapters.init_tuned(net, LORA, base, jax.random.key(6))
    assert not np.array_equal(every["lora/q/a"], other["lora/q/a"])


def test_lora_pairs_can_be_drawn_inside_a_compiled_function():
    net, base = _net("gpt"), _base("gpt")
    keys = jax.random.split(jax.random.key(0), 5)
    many = jax.eval_shape(jax.vmap(lambda k: adapters.init_tuned(net, LORA, base, k)), keys)
    assert many["lora/up/a"].shape == (5, 2, 16, 3)


@every_family
@pytest.mark.parametrize("tuning", [Tuning(kind="full"), BIAS_AND_GAIN, LORA], ids=lambda t: t.kind)
def test_tuned_and_frozen_parts_make_up_the_base(family, tuning):
    net, base = _net(family), _base(family)
    frozen = adapters.frozen_part(net, tuning, base)
    start = {n: a for n, a in base.items() if n not in frozen}
    if tuning.kind == "lora":
        assert frozen.keys() == base.keys()
        return
    axes = adapters.tuned_axes(net, tuning)
    assert start.keys() == axes.keys()
    assert all(axes[n][0] == a.shape for n, a in start.items())
    params, adapter = adapters.join(tuning, adapters.init_tuned(net, tuning, base, jax.random.key(0)), frozen)
    assert adapter == {}
    assert params.keys() == base.keys()
    assert all(params[n] is base[n] for n in base)


@pytest.mark.parametrize(("family", "moved"), [("gpt", 896 - 64), ("llama-bias", 864 - 64), ("llama", 160)])
def test_bias_and_gain_names_every_vector_but_the_key_biases(family, moved):
    net = _net(family, "tiny", vocab=171, length=30)
    axes = adapters.tuned_axes(net, BIAS_AND_GAIN)
    vectors = {n for n in net.declarations if n.endswith(("bias", "gain"))}
    assert axes.keys() == vectors - {"blocks/attention/k/bias"}
    assert sum(int(np.prod(shape)) for shape, _ in axes.values()) == moved


def test_bias_and_gain_moves_only_its_own_parameters():
    """Three steps of the trainer on a family whose key biases do have a gradient, being rotated."""
    family = "llama-bias"
    net = _net(family)
    base = {n: jnp.asarray(a) for n, a in _base(family).items()}
    before = {n: np.array(a) for n, a in base.items()}
    tokens = np.random.default_rng(3).integers(1, VOCAB, (32, LENGTH)).astype(np.int32)
    stream = packing.in_memory({"tokens": tokens, "valid": tokens > 0}, seed=0, batch=8)
    fitted = fit(
        net, base, tuning=BIAS_AND_GAIN, optimizer=Optimizer(lr=1e-2), steps=3, key=jax.random.key(0),
        terms=[Term("numbers", 1.0, NextToken(4), stream)], run=Run(make_mesh()),
    )  # fmt: skip
    assert fitted.tuned.keys() == adapters.tuned_axes(net, BIAS_AND_GAIN).keys()
    for name, array in fitted.tuned.items():
        assert np.abs(np.asarray(array) - before[name]).max() > 1e-3, f"{name} did not move"
    merged = adapters.merge(net, BIAS_AND_GAIN, fitted.tuned, base)
    assert merged.keys() == before.keys()
    for name in before.keys() - fitted.tuned.keys():
        np.testing.assert_array_equal(merged[name], before[name], err_msg=name)
    for name, array in base.items():  # the caller's base is as it was: the step donates a copy
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize(
    ("family", "targets", "words"),
    [
        ("gpt", ("q", "query"), ("tuning.targets", "'query'", "q, up, v")),
        ("gpt", ("gate",), ("tuning.targets", "'gate'", "nothing would be trained", "down, k, o, q, up, v")),
        ("llama", (), ("tuning.targets", "nothing would be trained")),
    ],
)
def test_targets_that_do_not_exist_are_told_in_one_line(family, targets, words):
    with pytest.raises(UsageError) as caught:
        adapters.tuned_axes(_net(family), dataclasses.replace(LORA, targets=targets))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_target_that_only_some_families_have_is_passed_over():
    tuning = dataclasses.replace(LORA, targets=("gate", "q"))
    assert adapters.tuned_axes(_net("gpt"), tuning).keys() == {"lora/q/a", "lora/q/b"}
    assert adapters.tuned_axes(_net("llama"), tuning).keys() == {f"lora/{t}/{p}" for t in ("gate", "q") for p in "ab"}
