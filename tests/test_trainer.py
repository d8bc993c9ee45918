"""The trainer: its schedules, that a resumed run is the uninterrupted one, what it leaves alone, and its errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import on_mesh
import pytest
import quick
from etils import epath
from on_mesh import weights

from subjax import schema
from subjax.config import ConfigError, from_dict, to_dict
from subjax.data import packing, world
from subjax.errors import Preempted, SubjaxError
from subjax.models.network import Declaration
from subjax.parallel.mesh import make_mesh
from subjax.schema import Optimizer, Tuning
from subjax.stages.models import world_network
from subjax.train import trainer
from subjax.train.losses import NextToken
from subjax.train.optimizers import make_optimizer
from subjax.train.trainer import Fitted, Run, Term, fit

STEPS, BATCH, TAIL, VOCAB = 6, 4, 3, 11
MESH = make_mesh()
KINDS = ("bias-and-gain", "full", "lora")


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """Each step is dispatched alone, so that a test may stop after any; the tests of blocks undo it."""
    monkeypatch.setattr(trainer, "DISPATCH_STEPS", 1)


class Bigram:
    """The smallest network that the trainer takes: a table of next-token logits and a bias. It compiles at once."""

    def __init__(self):
        self.declarations = {
            "table": Declaration((VOCAB, VOCAB), "float32", ("vocab", "embed"), "weight"),
            "bias": Declaration((VOCAB,), "float32", ("embed",), "bias"),
        }
        self.parameters = VOCAB * VOCAB + VOCAB

    def forward(self, params, tokens, valid, *, tail, adapter, rows):
        assert adapter == {}
        assert rows is None  # one device has nothing to split
        return params["table"][tokens[:, -tail:]] + params["bias"][None, None]


BIGRAM: Any = Bigram()


def counting_rows(rows: int = 10) -> dict[str, np.ndarray]:
    tokens = (np.arange(rows)[:, None] + np.arange(TAIL + 2)[None]).astype(np.int32) % VOCAB
    return {"tokens": tokens, "valid": np.ones_like(tokens, bool)}


def small_base() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=d.shape), jnp.float32) for n, d in BIGRAM.declarations.items()}


def recorded(stream: packing.Stream, asked: list[int]) -> packing.Stream:
    def told(step: int) -> packing.Batch:
        asked.append(step)
        return stream(step)

    return told


def small_fit(steps: int = STEPS, *, base=None, kind="full", optimizer=None, loss=None, stream=None, **run) -> Fitted:
    stream = stream or packing.in_memory(counting_rows(), seed=0, batch=BATCH)
    return fit(
        BIGRAM,
        base or small_base(),
        tuning=Tuning(kind=kind),
        optimizer=optimizer or Optimizer(lr=1e-2),
        terms=[Term("numbers", 1.0, loss or NextToken(TAIL), stream)],
        steps=steps,
        key=jax.random.key(0),
        run=Run(MESH, **run),
    )


def stop_after(steps: int):
    """`should_stop` that comes true when it is asked for the n-th time: after n steps."""
    left = iter([False] * (steps - 1) + [True])
    return lambda: next(left)


def assert_equal_fits(one: Fitted, other: Fitted) -> None:
    assert one.tuned.keys() == other.tuned.keys()
    for name in one.tuned:
        np.testing.assert_array_equal(one.tuned[name], other.tuned[name], err_msg=name)
    assert one.curve == other.curve
    assert one.tokens == other.tokens


# Schedules ------------------------------------------------------------------------------------------------------------


def rates(steps: int = 10, **settings) -> list[float]:
    """The learning rate of each step: how far plain descent moves along a gradient of 1."""
    rule = make_optimizer(Optimizer(name="sgd", b1=0.0, clip=0.0, **settings), steps)
    state, found = rule.init(jnp.zeros(())), []
    for _ in range(steps):
        update, state = rule.update(jnp.ones(()), state, jnp.zeros(()))
        found.append(-float(update))
    return found


def test_a_constant_rate():
    np.testing.assert_allclose(rates(lr=0.5), [0.5] * 10)


def test_warm_up_rises_from_zero_and_counts_as_steps():
    np.testing.assert_allclose(rates(lr=0.5, warmup=4), [0, 0.125, 0.25, 0.375, *[0.5] * 6], rtol=1e-6)


def test_a_linear_schedule_ends_at_its_final_fraction():
    found = rates(lr=0.5, schedule="linear", warmup=2, final_fraction=0.2)
    np.testing.assert_allclose(found, [0, 0.25, *np.linspace(0.5, 0.1, 9)[:8]], rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_a_cosine_schedule(fraction):
    found = rates(lr=2.0, schedule="cosine", warmup=2, final_fraction=fraction)
    place = np.arange(8) / 8
    expected = 2.0 * ((1 - fraction) * 0.5 * (1 + np.cos(np.pi * place)) + fraction)
    np.testing.assert_allclose(found, [0, 1.0, *expected], rtol=1e-5)


def test_a_warm_up_longer_than_the_run():
    np.testing.assert_allclose(rates(3, lr=1.0, warmup=10, schedule="cosine"), [0, 0.1, 0.2], rtol=1e-6)


def moved(optimizer: Optimizer, gradients: list[np.ndarray], start: np.ndarray) -> np.ndarray:
    rule = make_optimizer(optimizer, 100)
    params = jnp.asarray(start)
    state = rule.init(params)
    for gradient in gradients:
        update, state = rule.update(jnp.asarray(gradient), state, params)
        params = params + update
    return np.asarray(params)


GRADIENTS = [np.array([3.0, -4.0], np.float32), np.array([0.3, 0.4], np.float32), np.array([0.0, 2.0], np.float32)]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_by_hand(name, clip):
    decay = 0.1 if name == "adamw" else 0.0
    start = np.array([1.0, -2.0], np.float32)
    settings = Optimizer(name=name, lr=0.05, b1=0.8, b2=0.9, clip=clip, weight_decay=0.1)
    x, m, v = start.astype(np.float64), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(GRADIENTS, start=1):
        g = gradient.astype(np.float64)
        if clip:
            g = g / max(1.0, np.linalg.norm(g) / clip)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        x = x - 0.05 * ((m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8) + decay * x)
    np.testing.assert_allclose(moved(settings, GRADIENTS, start), x, rtol=1e-5)


def test_momentum_by_hand():
    x, speed = np.zeros(2), np.zeros(2)
    for gradient in GRADIENTS:
        speed = 0.9 * speed + gradient
        x = x - 0.1 * speed
    found = moved(Optimizer(name="sgd", lr=0.1, clip=0.0), GRADIENTS, np.zeros(2, np.float32))
    np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"name": "adamm"}, "adam"), ({"schedule": "cosin"}, "cosine"), ({"lr": -1.0}, "lr"), ({"rate": 1.0}, "rate")],
)
def test_a_bad_optimizer_is_one_line_that_names_the_key(settings, said):
    with pytest.raises(ConfigError) as caught:
        from_dict(Optimizer, settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    return world_network("gpt", "nano", to_dict(schema.Numerics()))


def nano_fit(net, base, kind: str, asked: list[int] | None = None, **run) -> Fitted:
    stream = packing.in_memory(world.pool(0, 40, 10).arrays(), seed=3, batch=8)
    return fit(
        net,
        base,
        tuning=Tuning(kind=kind, rank=2),
        optimizer=Optimizer(name="adamw", lr=1e-2, schedule="cosine", warmup=2, weight_decay=0.01),
        terms=[Term("numbers", 1.0, NextToken(world.ANSWER), recorded(stream, asked if asked is not None else []))],
        steps=STEPS,
        key=jax.random.key(7),
        run=Run(MESH, **run),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(nano, kind, tmp_path):
    base = {name: jnp.asarray(value) for name, value in weights(nano).items()}
    before = {name: np.array(value) for name, value in base.items()}
    whole = nano_fit(nano, base, kind)
    partial = epath.Path(tmp_path / "partial")
    for resumed_from, steps in ((0, 2), (2, 1)):  # stopped twice: after 2 steps, and after 1 more
        asked: list[int] = []
        with pytest.raises(Preempted, match=f"stopped at step {resumed_from + steps} of 6") as caught:
            nano_fit(nano, base, kind, asked, partial=partial, should_stop=stop_after(steps))
        assert caught.value.exit_status == 75
        # A resumed run, too, reads the first batch: it says how many steps are dispatched at once.
        assert asked == [0] * bool(resumed_from) + list(range(resumed_from, resumed_from + steps))
    asked = []
    resumed = nano_fit(nano, base, kind, asked, partial=partial)
    assert asked == [0, 3, 4, 5]
    assert_equal_fits(resumed, whole)
    check_what_moved(nano, kind, before, base, whole)


def check_what_moved(net, kind: str, before, base, fitted: Fitted) -> None:
    """The base is as it was and still there; the tuned arrays are those of the kind, and they moved."""
    for name, value in base.items():
        assert not value.is_deleted(), f"{name} was donated"
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    matrices = ("q", "k", "v", "o", "up", "down")
    expected = {
        "full": set(net.declarations),
        "bias-and-gain": {n for n in net.declarations if n.endswith(("/bias", "/gain")) and "/k/" not in n},
        "lora": {f"lora/{matrix}/{part}" for matrix in matrices for part in "ab"},
    }[kind]
    assert set(fitted.tuned) == expected
    for name, value in fitted.tuned.items():
        start = before.get(name, np.zeros_like(value))
        assert np.isfinite(value).all()
        assert (np.asarray(value) != start).any(), f"{name} did not move"


def test_a_run_on_host_arrays_is_the_same(nano):
    assert_equal_fits(
        nano_fit(nano, weights(nano), "bias-and-gain"),
        nano_fit(nano, {name: jnp.asarray(value) for name, value in weights(nano).items()}, "bias-and-gain"),
    )


def two_checkpoints(folder: Path) -> None:
    """A checkpoint after 2 steps beside one after 4, as a crash between saving and tidying leaves them."""
    with pytest.raises(Preempted):
        small_fit(partial=epath.Path(folder), should_stop=stop_after(2))
    shutil.copytree(folder / "step-00000002", folder.with_name("kept"))
    with pytest.raises(Preempted):
        small_fit(partial=epath.Path(folder), should_stop=stop_after(2))
    shutil.move(folder.with_name("kept"), folder / "step-00000002")
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000004"]


def cut(path: Path, size: int | None = None) -> None:
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "no progress": lambda step: (step / "progress.json").unlink(),
    "half a progress": lambda step: cut(step / "progress.json"),
    "an empty progress": lambda step: cut(step / "progress.json", 0),
    "no arrays": lambda step: shutil.rmtree(step / "arrays"),
    "half the arrays": lambda step: cut(largest(step / "arrays")),
    "no metadata": lambda step: (step / "arrays" / "_METADATA").unlink(),
    "an empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_half_written_newest_checkpoint_is_passed_over(damage, tmp_path):
    folder = tmp_path / "partial"
    two_checkpoints(folder)
    DAMAGE[damage](folder / "step-00000004")
    asked: list[int] = []
    stream = recorded(packing.in_memory(counting_rows(), seed=0, batch=BATCH), asked)
    resumed = small_fit(partial=epath.Path(folder), stream=stream)
    assert asked == [0, 2, 3, 4, 5]  # the first one for how many are dispatched at once
    assert_equal_fits(resumed, small_fit())


def test_a_whole_newest_checkpoint_is_the_one_resumed_from(tmp_path):
    two_checkpoints(tmp_path / "partial")
    asked: list[int] = []
    stream = recorded(packing.in_memory(counting_rows(), seed=0, batch=BATCH), asked)
    assert_equal_fits(small_fit(partial=epath.Path(tmp_path / "partial"), stream=stream), small_fit())
    assert asked == [0, 4, 5]


def test_no_whole_checkpoint_means_the_start(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    assert_equal_fits(small_fit(partial=epath.Path(tmp_path)), small_fit())


def test_checkpoints_are_kept_one_at_a_time_and_change_nothing(tmp_path):
    folder, seen = tmp_path / "partial", []
    look = lambda: seen.append(sorted(p.name for p in folder.iterdir()) if folder.exists() else []) or False  # noqa: E731
    saved = small_fit(partial=epath.Path(folder), checkpoint_s=0.0, should_stop=look)
    # One is written while the next steps are taken, so the one before it may be there still.
    assert seen[0] == []
    for n, names in enumerate(seen[1:], start=1):
        assert names
        assert set(names) <= {f"step-{n - 1:08d}", f"step-{n:08d}"}
    assert_equal_fits(saved, small_fit())


def test_a_stop_with_the_last_step_is_no_preemption(tmp_path):
    whole = small_fit(partial=epath.Path(tmp_path / "partial"), should_stop=stop_after(STEPS))
    assert_equal_fits(whole, small_fit())


# Blocks of steps ------------------------------------------------------------------------------------------------------


def in_blocks(monkeypatch, steps: int) -> None:
    monkeypatch.setattr(trainer, "DISPATCH_STEPS", steps)


@pytest.mark.parametrize("most", [2, 3, 5, 20])
def test_steps_dispatched_together_are_the_steps_dispatched_alone(most, monkeypatch):
    alone = small_fit()
    in_blocks(monkeypatch, most)
    asked, told = [], []
    stream = recorded(packing.in_memory(counting_rows(), seed=0, batch=BATCH), asked)
    together = small_fit(stream=stream, progress=lambda done, total, unit: told.append(done))
    assert asked == list(range(STEPS))
    size = {2: 2, 3: 3, 5: 3, 20: 6}[most]  # the largest that divides the run
    assert told == list(range(size, STEPS + 1, size))
    assert together.tokens == alone.tokens
    for name in alone.tuned:
        np.testing.assert_allclose(together.tuned[name], alone.tuned[name], rtol=1e-6, atol=1e-7, err_msg=name)
    for one, other in zip(together.curve, alone.curve, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_a_resumed_run_has_the_blocks_of_the_whole_one(monkeypatch):
    """Also where batches differ in size, as packed ones do."""
    monkeypatch.setattr(trainer, "DISPATCH_FLOPS", 2e10)
    monkeypatch.setattr(trainer, "DISPATCH_STEPS", 20)
    stream = lambda step: {"tokens": np.zeros((4, 10 if step < 4 else 40)), "valid": np.ones((4, 40), bool)}  # noqa: E731
    terms = [Term("numbers", 1.0, NextToken(TAIL), stream)]
    parameters = int(trainer.DISPATCH_FLOPS / (6 * 40 * 4))  # so that four steps of the first size are one dispatch
    whole = [len(block) for block in trainer._blocks(terms, parameters, 0, 12)]
    assert whole == [4, 4, 4]
    assert [len(block) for block in trainer._blocks(terms, parameters, 4, 12)] == [4, 4]


def test_a_run_in_blocks_stops_and_resumes_between_them_bit_for_bit(monkeypatch, tmp_path):
    in_blocks(monkeypatch, 2)
    partial, asked = epath.Path(tmp_path / "partial"), []
    with pytest.raises(Preempted, match="stopped at step 4 of 6"):
        small_fit(partial=partial, should_stop=stop_after(2))
    stream = recorded(packing.in_memory(counting_rows(), seed=0, batch=BATCH), asked)
    assert_equal_fits(small_fit(partial=partial, stream=stream), small_fit())
    assert asked == [0, 4, 5]


def test_a_checkpoint_within_a_block_is_gone_on_from(monkeypatch, tmp_path):
    """It was saved by a run of other blocks."""
    with pytest.raises(Preempted, match="stopped at step 3 of 6"):
        small_fit(partial=epath.Path(tmp_path), should_stop=stop_after(3))
    in_blocks(monkeypatch, 2)
    found, whole = small_fit(partial=epath.Path(tmp_path)), small_fit()
    assert [point["step"] for point in found.curve] == list(range(STEPS))
    np.testing.assert_allclose(found.tuned["table"], whole.tuned["table"], rtol=1e-6, atol=1e-7)


def test_a_block_names_the_step_that_is_no_number(monkeypatch):
    in_blocks(monkeypatch, 6)
    with pytest.raises(SubjaxError, match=r"loss is (nan|inf) at step [12] of 6; try a lower"):
        small_fit(optimizer=Optimizer(lr=2e38))


def test_steps_of_a_large_model_are_dispatched_alone(monkeypatch):
    in_blocks(monkeypatch, 20)
    monkeypatch.setattr(trainer, "DISPATCH_FLOPS", 6 * BIGRAM.parameters * BATCH * (TAIL + 2) * 2.5)
    told = []
    small_fit(progress=lambda done, total, unit: told.append(done))
    assert told == [2, 4, 6]
    monkeypatch.setattr(trainer, "DISPATCH_FLOPS", 1.0)
    small_fit(progress=lambda done, total, unit: told.append(done))
    assert told[3:] == [1, 2, 3, 4, 5, 6]


# What a fit tells -----------------------------------------------------------------------------------------------------


def test_progress_is_told_every_step():
    told = []
    small_fit(progress=lambda *what: told.append(what))
    assert told == [(n, STEPS, "step") for n in range(1, STEPS + 1)]


def test_the_curve_has_every_step_of_a_short_run_and_its_terms_add_up():
    stream = packing.in_memory(counting_rows(), seed=0, batch=BATCH)
    fitted = fit(
        BIGRAM, small_base(), tuning=Tuning(kind="full"), optimizer=Optimizer(lr=1e-1), steps=40,
        terms=[Term("one", 1.0, NextToken(TAIL), stream), Term("other", 0.25, NextToken(TAIL - 1), stream)],
        key=jax.random.key(0), run=Run(MESH),
    )  # fmt: skip
    assert [point["step"] for point in fitted.curve] == list(range(40))
    for point in fitted.curve:
        assert point["loss"] == pytest.approx(point["one"] + 0.25 * point["other"], rel=1e-6)
        assert point["gradient_norm"] > 0
    assert fitted.curve[-1]["loss"] < 0.2 * fitted.curve[0]["loss"]
    assert fitted.tokens == 40 * 2 * BATCH * (TAIL + 2)


def test_a_long_curve_is_thinned_to_about_a_hundred_points():
    fitted = small_fit(350)
    steps = [point["step"] for point in fitted.curve]
    assert steps == sorted({*range(0, 350, 3), 349})


def test_the_first_loss_is_that_of_the_base():
    base, batch = small_base(), packing.in_memory(counting_rows(), seed=0, batch=BATCH)(0)
    logits = np.asarray(base["table"], np.float64)[batch["tokens"][:, 1:-1]] + np.asarray(base["bias"], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs, batch["tokens"][:, 2:, None], -1).mean()
    assert small_fit().curve[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_weights_of_terms_and_frozen_parts():
    """Only the bias of a table is tuned where the kind says so; the table stays the caller's."""
    base = small_base()
    fitted = small_fit(kind="bias-and-gain", base=base)
    assert set(fitted.tuned) == {"bias"}
    assert not any(value.is_deleted() for value in base.values())
    np.testing.assert_array_equal(base["table"], small_base()["table"])


# Not a number ---------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("place", ["table", "bias"])
def test_a_parameter_that_is_no_number(place):
    base = small_base()
    base[place] = base[place] * jnp.nan
    with pytest.raises(SubjaxError, match=r"loss is nan at step 0 of 6; try a lower learning rate") as caught:
        small_fit(base=base, kind="bias-and-gain")
    assert one_line(caught.value)
    assert caught.value.exit_status == 1


def test_a_huge_learning_rate_names_the_step():
    with pytest.raises(SubjaxError, match=r"loss is (nan|inf) at step [12] of 6; try a lower") as caught:
        small_fit(optimizer=Optimizer(lr=2e38))
    assert one_line(caught.value)


class Cusp:
    """A loss of exactly 0 whose gradient is not a number: the next loss would not be one either."""

    axes = ("batch",)

    def __call__(self, model, batch):
        logits = model(batch["tokens"], batch["valid"], 1)
        return jnp.sqrt(jnp.square(logits - jax.lax.stop_gradient(logits)).sum())


def test_a_gradient_that_is_no_number_in_the_last_step():
    with pytest.raises(SubjaxError, match="gradient norm is nan at step 0 of 1; try a lower learning rate"):
        small_fit(1, loss=Cusp())


def test_no_checkpoint_is_saved_of_a_run_that_is_lost(tmp_path):
    base = small_base()
    base["bias"] = base["bias"] * jnp.nan
    folder = tmp_path / "partial"
    with pytest.raises(SubjaxError, match="at step 0"):
        small_fit(base=base, partial=epath.Path(folder), checkpoint_s=0.0)
    assert not folder.exists()


# Programs and meshes --------------------------------------------------------------------------------------------------


def test_runs_with_equal_settings_share_one_program():
    before = trainer.program.cache_info()
    small_fit(5)
    small_fit(5)
    after = trainer.program.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)


@pytest.mark.slow  # test_mesh_equivalence.py asks the same of fsdp:4,tensor:2 in each run
def test_losses_agree_on_1_2_and_8_devices():
    """Shard shapes are asserted by the script; a loss of any mesh is within 2e-6 of one device's, relative."""
    env = quick.environment("--xla_force_host_platform_device_count=8", quick.PLAIN, quick.FUSION)
    done = subprocess.run([sys.executable, on_mesh.__file__], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    alone = losses.pop("1x1x1")
    assert len(alone) == 20
    assert alone[-1] < alone[0]
    assert sorted(np.prod([int(n) for n in mesh.split("x")]) for mesh in losses) == [2, 8, 8]
    for mesh, found in losses.items():
        np.testing.assert_allclose(found, alone, rtol=2e-6, err_msg=mesh)
