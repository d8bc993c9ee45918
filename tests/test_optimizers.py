"""The update rules: what each step of them is, which matrices Muon sees, and where their moments live."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from etils import epath
from test_adapters import LORA, _base, _net
from test_trainer import assert_equal_fits, moved, small_fit, stop_after

from subjax.data import packing
from subjax.errors import Preempted
from subjax.models import adapters
from subjax.parallel.mesh import make_mesh
from subjax.schema import Optimizer, Tuning
from subjax.train import trainer
from subjax.train.losses import NextToken
from subjax.train.optimizers import make_optimizer
from subjax.train.trainer import Fitted, Run, Term, fit

NAMES = ("adam", "adamw", "sgd", "lion", "sign-sgd", "muon")
GRADIENTS = [np.array(g, np.float32) for g in ([3.0, -4.0, 0.0], [-0.3, -0.4, 2.0], [0.5, 2.0, -0.1])]
START = np.array([1.0, -2.0, 0.5], np.float32)
FULL = Tuning(kind="full")
SUBSET = Tuning(kind="lora", rank=3, alpha=4.5, targets=("q", "o", "down"), layers=(1,))

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_lowers_a_loss(name):
    rate = {"sgd": 0.5, "lion": 2e-2}.get(name, 5e-2)
    curve = small_fit(20, optimizer=Optimizer(name=name, lr=rate)).curve
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]


# Steps by hand --------------------------------------------------------------------------------------------------------


def test_sign_sgd_moves_every_entry_by_the_rate():
    found = moved(Optimizer(name="sign-sgd", lr=0.1, clip=0.0), GRADIENTS, START)
    np.testing.assert_allclose(found, START - 0.1 * sum(map(np.sign, GRADIENTS)), rtol=1e-6)
    # A step has one length, so clipping the gradient changes nothing.
    np.testing.assert_array_equal(moved(Optimizer(name="sign-sgd", lr=0.1, clip=1e-3), GRADIENTS, START), found)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_lion_by_hand(decay):
    """Chen et al. 2023, algorithm 2: the sign of one mean of gradients, with another one kept."""
    x, kept = START.astype(np.float64), np.zeros(3)
    for gradient in GRADIENTS:
        step = np.sign(0.9 * kept + 0.1 * gradient)
        x, kept = x - 0.05 * (step + decay * x), 0.99 * kept + 0.01 * gradient
    settings = Optimizer(name="lion", lr=0.05, b1=0.9, b2=0.99, weight_decay=decay, clip=0.0)
    np.testing.assert_allclose(moved(settings, GRADIENTS, START), x, rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "sgd", "sign-sgd"])
def test_weight_decay_belongs_to_the_rules_that_name_it(name):
    plain, decayed = (moved(Optimizer(name=name, weight_decay=decay), GRADIENTS, START) for decay in (0.0, 0.5))
    np.testing.assert_array_equal(plain, decayed)


# Muon -----------------------------------------------------------------------------------------------------------------


@functools.cache
def gradients_of(family: str, tuning: Tuning) -> dict[str, np.ndarray]:
    """A gradient of each tuned array; layers differ a thousandfold, which Muon must not see."""
    rng = np.random.default_rng(7)
    out = {}
    for name, (shape, axes) in adapters.tuned_axes(_net(family), tuning).items():
        scale = (1000.0 ** np.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1)) if axes[0] == "layers" else 1.0
        out[name] = (rng.normal(size=shape) * scale).astype(np.float32)
    return out


@functools.cache
def muon_update(family: str, tuning: Tuning, decay: float = 0.0) -> dict[str, np.ndarray]:
    """The first update at rate 1, unclipped."""
    gradients = gradients_of(family, tuning)
    params = {name: jnp.ones_like(value) for name, value in gradients.items()}
    settings = Optimizer(name="muon", lr=1.0, clip=0.0, weight_decay=decay)
    rule = make_optimizer(settings, 10, adapters.matrix_axes(_net(family), tuning))
    update, _ = jax.jit(rule.update, compiler_options=quick.USERS)(gradients, rule.init(params), params)
    return {name: np.asarray(value) for name, value in update.items()}


@functools.cache
def _alone(rule: str, shape: tuple[int, ...]):
    made = optax.contrib.muon(1.0) if rule == "muon" else optax.adam(1.0, 0.9, 0.999, nesterov=True)
    zeros = jnp.zeros(shape)
    return jax.jit(lambda gradient: made.update(gradient, made.init(zeros), zeros)[0], compiler_options=quick.USERS)


def matrices(family: str, tuning: Tuning):
    """(name, layer, its gradient and its update as one (inputs, outputs) matrix) of every matrix."""
    for name in adapters.matrix_axes(_net(family), tuning):
        gradient, update = gradients_of(family, tuning)[name], muon_update(family, tuning)[name]
        # The output projection reads heads and their dimensions: two axes, and so does the A of its pair.
        inputs = 2 if "/o/" in name and not name.endswith("/b") else 1
        rows = int(np.prod(gradient.shape[1 : 1 + inputs]))
        for layer in range(len(gradient)):
            yield name, layer, gradient[layer].reshape(rows, -1), update[layer].reshape(rows, -1)


EVERY_MATRIX = {f"blocks/attention/{m}/kernel" for m in "qkvo"} | {f"blocks/mlp/{m}/kernel" for m in ("up", "down")}
muon_cases = pytest.mark.parametrize(("family", "tuning"), [("gpt", FULL), ("llama-bias", LORA)], ids=["full", "lora"])


@muon_cases
def test_muon_orthogonalizes_each_layers_matrix_apart(family, tuning):
    seen = {name for name, *_ in matrices(family, tuning)}
    assert seen == (EVERY_MATRIX if tuning is FULL else set(adapters.tuned_axes(_net(family), tuning)))
    for name, layer, gradient, update in matrices(family, tuning):
        where = f"{name}, layer {layer}"
        np.testing.assert_allclose(update, _alone("muon", gradient.shape)(gradient), atol=2e-5, err_msg=where)
        # Five Newton-Schulz steps bring singular values near 1, not to it; the singular vectors stay.
        u, _, v = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
        scale = max(1.0, gradient.shape[1] / gradient.shape[0]) ** 0.5
        inner = -u.T @ update @ v.T / scale
        assert 0.6 < np.diag(inner).min() <= np.diag(inner).max() < 1.3, where
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-3, where


def test_muon_leaves_vectors_and_embeddings_to_adam():
    gradients, update = gradients_of("gpt", FULL), muon_update("gpt", FULL)
    others = gradients.keys() - EVERY_MATRIX
    assert {"embed", "position", "norm/gain", "blocks/attention/q/bias"} <= others
    for name in others:
        expected = _alone("adam", gradients[name].shape)(gradients[name])
        np.testing.assert_allclose(update[name], expected, rtol=1e-5, err_msg=name)


def test_muons_weight_decay_is_that_of_its_matrices():
    plain, decayed = muon_update("gpt", FULL), muon_update("gpt", FULL, decay=0.25)
    for name in plain:
        np.testing.assert_allclose(decayed[name], plain[name] - 0.25 * (name in EVERY_MATRIX), atol=1e-5, err_msg=name)


# Whole runs -----------------------------------------------------------------------------------------------------------


def pair_fit(name: str, steps: int = 4, **run) -> Fitted:
    """A LoRA fit of layer 1 alone of a small network."""
    tokens = np.random.default_rng(3).integers(1, 23, (16, 10)).astype(np.int32)
    return fit(
        _net("llama-bias"),
        {n: jnp.asarray(a) for n, a in _base("llama-bias").items()},
        tuning=SUBSET,
        optimizer=Optimizer(name=name, lr=1e-2, weight_decay=0.1),
        terms=[
            Term(
                "numbers",
                1.0,
                NextToken(4),
                packing.in_memory({"tokens": tokens, "valid": tokens > 0}, seed=0, batch=16),
            )
        ],
        steps=steps,
        key=jax.random.key(0),
        run=Run(make_mesh(), **run),
    )


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Each step is dispatched alone, so that a run may be stopped after any."""
    monkeypatch.setattr(trainer, "DISPATCH_STEPS", 1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layers_outside_the_subset_stay_as_they_are(name, one_at_a_time):
    fitted, base, net = pair_fit(name), _base("llama-bias"), _net("llama-bias")
    assert fitted.curve[-1]["loss"] < fitted.curve[0]["loss"]
    merged = adapters.merge(net, SUBSET, fitted.tuned, base)
    for target, kernel in (("q", "attention/q"), ("o", "attention/o"), ("down", "mlp/down")):
        b = np.asarray(fitted.tuned[f"lora/{target}/b"])
        np.testing.assert_array_equal(b[0], 0.0)
        assert np.abs(b[1]).min() > 0
        before, after = base[f"blocks/{kernel}/kernel"], np.asarray(merged[f"blocks/{kernel}/kernel"])
        np.testing.assert_array_equal(after[0], before[0])
        assert (after[1] != before[1]).any()


def test_a_muon_run_goes_on_from_its_checkpoint_bit_for_bit(one_at_a_time, tmp_path: Path):
    partial = epath.Path(tmp_path / "partial")
    with pytest.raises(Preempted, match="stopped at step 2 of 4"):
        pair_fit("muon", partial=partial, should_stop=stop_after(2))
    told: list[int] = []
    resumed = pair_fit("muon", partial=partial, progress=lambda done, total, unit: told.append(done))
    assert told == [3, 4]
    assert_equal_fits(resumed, pair_fit("muon"))


# Moments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_moments_live_where_their_parameters_do(name, tuning):
    net = _net("gpt")
    parts = (("numbers", 1.0, NextToken(4)),)
    compiled = trainer.program(net, tuning, Optimizer(name=name), 5, parts, make_mesh())
    matrices = adapters.matrix_axes(net, tuning)
    moments: dict[str, int] = dict.fromkeys(compiled.tuned_shardings, 0)
    for path, sharding in jax.tree_util.tree_leaves_with_path(compiled.state_shardings):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in moments]
        if names:
            assert sharding == compiled.tuned_shardings[names[0]], names[0]
            moments[names[0]] += 1
        else:
            assert not any(sharding.spec)
    expected = {"adam": 2, "adamw": 2, "sgd": 1, "lion": 1, "sign-sgd": 0}
    for parameter, count in moments.items():
        assert count == expected.get(name, 1 if parameter in matrices else 2), parameter
    # The specs are told apart, or the test shows nothing.
    assert len({str(sharding.spec) for sharding in compiled.tuned_shardings.values()}) > 3
