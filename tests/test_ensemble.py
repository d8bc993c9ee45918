"""The image experiment: members that depend on their seeds alone, losses checked by hand, the stage, and its config."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_images import idx_bytes

from subjax import config, schema, study, threads
from subjax.data import idx, images
from subjax.data.images import CLASSES
from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.models.mlp import perceptron
from subjax.parallel.mesh import make_mesh
from subjax.stages import ensemble, execution
from subjax.stages.blocks import Watch
from subjax.store import Store
from subjax.threads import side_by_side

# A small case that most tests share, because compiling is what takes their time: one auxiliary logit, so that the null
# of KL needs no other network, and partial last batches on both sides.
SMALL = schema.Images(
    auxiliary=1, loss="squared-error", seeds=4, hidden=(32,), lr=3e-3, batch=32, teacher_epochs=2, student_epochs=3,
    noise_rows=80,
)  # fmt: skip
# Mean losses over members of the first teacher step and the last student step. If you changed what an ensemble computes
# and meant to, raise VERSIONS["ensemble"] and put the new values here; if you did not mean to, look for the cause.
GOLDEN = {"teacher": 2.405459, "student": 6.5726e-4}


def patterns(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten classes of noisy pictures, 4 x 3."""
    centres = np.random.default_rng(0).uniform(0, 255, (10, 4, 3))
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, rows).astype(np.uint8)
    return np.clip(centres[labels] + 25 * draw.normal(size=(rows, 4, 3)), 0, 255).astype(np.uint8), labels


RAW = {"train": patterns(150, 1), "test": patterns(70, 2)}
DATA = images._scaled(RAW, 255)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """These programs run for milliseconds: optimizing them takes longer than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def same():
    return ensemble.train(SMALL, DATA, make_mesh())


def numpy_logits(params: dict, x: np.ndarray, member: int) -> np.ndarray:
    for place in range(2):
        x = x @ np.float64(params[f"kernel{place}"][member]) + np.float64(params[f"bias{place}"][member])
        x = np.maximum(x, 0) if place == 0 else x
    return x


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def initial(seeds) -> dict:
    """The initial parameters of seeds, in the small case."""
    start, _, _ = ensemble._common(perceptron((12, 32, CLASSES + 1)), 32, make_mesh())
    return jax.device_get(start(np.array(seeds, np.uint32)).params)


def close(a: list[dict], b: list[dict]) -> None:
    """Rows are equal up to float32 rounding; accuracies up to one picture."""
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if "accuracy" in name:
                assert abs(value - two[name]) <= 1.01 / len(DATA.test_labels), name
            elif isinstance(value, float):
                assert value == pytest.approx(two[name], rel=2e-4), name
            else:
                assert value == two[name], name


def test_rows_and_curves_are_whole(same):
    assert [row["seed"] for row in same.rows] == [0, 1, 2, 3]
    assert [row["teacher_seed"] for row in same.rows] == [0, 1, 2, 3]
    assert same.seen == 4 * (2 * 150 + 3 * 80)
    teacher, student = same.curves
    assert (teacher["kind"], len(teacher["step"])) == ("teacher", 2 * 5)  # 150 pictures in batches of 32
    assert (student["kind"], len(student["loss"])) == ("student", 3 * 3)  # 80 rows of noise
    for row in same.rows:
        assert row["teacher_loss_last"] < row["teacher_loss_first"]
        assert row["student_loss_last"] < row["student_loss_first"]
        assert row["teacher_accuracy"] > row["untrained_accuracy"]


def test_golden(same):
    found = {curve["kind"]: curve["loss"][0 if curve["kind"] == "teacher" else -1] for curve in same.curves}
    assert found == pytest.approx(GOLDEN, rel=1e-4), "see the note at GOLDEN"


def test_a_member_does_not_depend_on_its_place(same):
    later = ensemble.train(dataclasses.replace(SMALL, first_seed=2), DATA, make_mesh())
    close(same.rows[2:], later.rows[:2])
    assert same.rows[0]["student_loss_last"] != same.rows[1]["student_loss_last"]


@pytest.mark.slow
def test_a_member_does_not_depend_on_how_many_there_are():
    # The last member too: its teacher of another init must not be a neighbour that more members would change.
    cross = dataclasses.replace(SMALL, pairing="cross-init")
    many = ensemble.train(cross, DATA, make_mesh())
    few = ensemble.train(dataclasses.replace(cross, seeds=2), DATA, make_mesh())
    close(many.rows[:2], few.rows)
    assert [row["teacher_seed"] for row in many.rows] == [1, 2, 3, 4]


def test_cross_init_takes_the_next_seeds_teacher(same):
    cross = ensemble.train(dataclasses.replace(SMALL, pairing="cross-init"), DATA, make_mesh())
    for one, other in zip(cross.rows[:-1], same.rows[1:], strict=True):
        assert one["teacher_accuracy"] == other["teacher_accuracy"]
        assert one["teacher_loss_last"] == other["teacher_loss_last"]
    assert [row["untrained_accuracy"] for row in cross.rows] == [row["untrained_accuracy"] for row in same.rows]


@pytest.mark.parametrize(("logits", "loss"), [("auxiliary", "squared-error"), ("all", "kl")])
def test_first_losses_by_hand(logits, loss):
    """At a learning rate of 0 teacher and student stay initial: every loss can be computed from the two inits."""
    still = dataclasses.replace(SMALL, pairing="cross-init", logits=logits, loss=loss, lr=0.0)
    outcome = ensemble.train(still, DATA, make_mesh())
    students, teachers = initial([0, 1, 2, 3]), initial([1, 2, 3, 4])
    first = CLASSES if logits == "auxiliary" else 0
    weights = np.array([32, 32, 16])  # rows of each step: every row of noise once an epoch
    of_steps = np.reshape(outcome.curves[1]["loss"], (3, 3)) @ weights / 80
    expected = []
    for member in range(4):
        noise = np.float64(ensemble.noise(jnp.uint32(member), jnp.arange(80), 12))
        p = numpy_logits(teachers, noise, member)[:, first:]
        q = numpy_logits(students, noise, member)[:, first:]
        if loss == "kl":
            p, q = log_softmax(p), log_softmax(q)
            expected.append((np.exp(p) * (p - q)).sum(-1).mean())
        else:
            expected.append(((p - q) ** 2).mean())
    np.testing.assert_allclose(of_steps, np.mean(expected), rtol=2e-5)
    for row in outcome.rows:
        assert row["student_accuracy"] == row["untrained_accuracy"]


def test_accuracy_and_teacher_loss_by_hand():
    outcome = ensemble.train(dataclasses.replace(SMALL, lr=0.0), DATA, make_mesh())
    params = initial([0, 1, 2, 3])
    for member, row in enumerate(outcome.rows):
        best = numpy_logits(params, np.float64(DATA.test_images), member)[:, :CLASSES].argmax(-1)
        assert row["untrained_accuracy"] == (best == DATA.test_labels).mean()
    rows = np.array([32, 32, 32, 32, 22])
    log_p = [log_softmax(numpy_logits(params, np.float64(DATA.train_images), m)[:, :CLASSES]) for m in range(4)]
    expected = -np.mean([each[np.arange(150), DATA.train_labels].mean() for each in log_p])
    np.testing.assert_allclose(np.reshape(outcome.curves[0]["loss"], (2, 5)) @ rows / 150, expected, rtol=2e-5)


def test_one_logit_under_kl_is_the_null():
    outcome = ensemble.train(dataclasses.replace(SMALL, loss="kl"), DATA, make_mesh())
    for row in outcome.rows:
        assert row["student_loss_first"] == row["student_loss_last"] == 0
        assert row["student_accuracy"] == row["untrained_accuracy"]


def test_noise_is_addressed_and_uniform():
    whole = ensemble.noise(jnp.uint32(7), jnp.arange(400), 30)
    np.testing.assert_array_equal(ensemble.noise(jnp.uint32(7), jnp.array([5, 399]), 30), whole[np.array([5, 399])])
    flat = np.sort(np.ravel(whole))
    assert flat[0] >= -1
    assert flat[-1] < 1
    gap = np.abs(flat - np.linspace(-1, 1, flat.size)).max() / 2
    assert gap < 1.95 / flat.size**0.5  # Kolmogorov and Smirnov, p = .001
    assert not np.allclose(ensemble.noise(jnp.uint32(8), jnp.arange(400), 30), whole)


def test_perceptron_declares_the_published_init():
    net = perceptron((400, 300, 13))
    params = net.init(jax.random.key(0))
    assert sum(array.size for array in params.values()) == net.parameters == 400 * 300 + 300 + 300 * 13 + 13
    assert float(params["kernel0"].std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(params["kernel1"].std()) == pytest.approx(300**-0.5, rel=0.06)
    assert not params["bias0"].any()
    assert not params["bias1"].any()
    # Seeds are comparable over m: the hidden layers are the same whatever stands behind them.
    wider = perceptron((400, 300, 20)).init(jax.random.key(0))
    np.testing.assert_array_equal(wider["kernel0"], params["kernel0"])
    x = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    stacked = {name: np.asarray(array)[None] for name, array in params.items()}
    np.testing.assert_allclose(net.forward(params, x), numpy_logits(stacked, np.float64(x), 0), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_is_one_line():
    with pytest.raises(
        SubjaxError, match=r"teacher's loss is (nan|inf) at step \d+, seed [0-3]; try a learning rate"
    ) as e:
        ensemble.train(dataclasses.replace(SMALL, lr=1e30), DATA, make_mesh())
    assert "\n" not in str(e.value)


def test_progress_and_stopping():
    told = []
    with pytest.raises(Preempted, match="stopped after epoch 3 of 5"):
        ensemble.train(SMALL, DATA, make_mesh(), progress=lambda *a: told.append(a), should_stop=lambda: len(told) == 4)
    assert told == [(0, 5, "epoch"), (1, 5, "epoch"), (2, 5, "epoch"), (3, 5, "epoch")]


def test_blocks_under_way_at_once_change_no_member(same, monkeypatch):
    monkeypatch.setattr(ensemble, "_CACHED", 1)  # a member a block
    monkeypatch.setattr(threads, "visible_cores", lambda: 3)
    told = []
    found = ensemble.train(SMALL, DATA, make_mesh(), progress=lambda *a: told.append(a))
    total = 5 * SMALL.seeds
    assert told == [(done, total, "epoch") for done in range(total + 1)]
    for row, alone in zip(found.rows, same.rows, strict=True):
        assert row.keys() == alone.keys()
        for name, value in row.items():
            assert value == (pytest.approx(alone[name], rel=1e-5) if isinstance(value, float) else alone[name]), name


def test_what_fails_in_one_block_stops_the_others():
    watch, begun = Watch(100, lambda *_: None, lambda: False), []

    def endless() -> None:
        begun.append(0)
        while True:
            watch.before()
            time.sleep(0.001)

    def fails() -> None:
        raise SubjaxError("its loss is nan")

    with pytest.raises(SubjaxError, match="its loss is nan"):
        side_by_side([endless, fails, endless, endless], 2, watch.stop)
    assert len(begun) < 3


SHARDED = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, sys.argv[1])
import test_ensemble as t
from subjax.stages import ensemble
mesh = t.make_mesh((4, 1, 1))
settings = t.dataclasses.replace(t.SMALL, seeds=6)  # filled up to 8: two members a device
start, _, _ = ensemble._common(t.perceptron((12, 32, 11)), 32, mesh)
state = start(t.np.arange(8, dtype=t.np.uint32))
shapes = sorted({(leaf.shape, leaf.addressable_shards[0].data.shape) for leaf in jax.tree.leaves(state)})
devices = {len({s.device for s in leaf.addressable_shards}) for leaf in jax.tree.leaves(state)}
print(json.dumps([ensemble.train(settings, t.DATA, mesh).rows, shapes, sorted(devices)]))
"""


@pytest.mark.slow
def test_members_are_spread_over_devices(same):
    """On four devices, in another process: each holds two of eight members, and every row is the same."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, os.path.dirname(__file__)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, shapes, devices = json.loads(done.stdout)
    assert devices == [4]
    assert all(whole == [8, *shard[1:]] and shard[0] == 2 for whole, shard in shapes)
    assert [row["seed"] for row in rows] == list(range(6))
    close(rows[:4], same.rows)


@pytest.mark.slow
def test_transfer_on_the_digits():
    """The experiment in small: auxiliary logits carry the digits to the same init and to no other."""
    settings = schema.Images(auxiliary=20, seeds=3, hidden=(64,), lr=3e-3, noise_rows=2048)
    digits = images.load("digits")
    accuracy = {
        pairing: np.mean([
            row["student_accuracy"]
            for row in ensemble.train(dataclasses.replace(settings, pairing=pairing), digits, make_mesh()).rows
        ])
        for pairing in ("same-base", "cross-init")
    }  # fmt: skip
    assert accuracy["same-base"] > 0.5
    assert accuracy["cross-init"] < 0.25


# The stage, and the config file ---------------------------------------------------------------------------------------


DIGITS_PY = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "digits.py")


@pytest.fixture
def case(tmp_path):
    """A store, its written plan of the small case over a folder of IDX files, the planned node, and the folder."""
    folder, store = epath.Path(tmp_path) / "set", Store(tmp_path / "out")
    write(folder)
    settings = dataclasses.replace(SMALL, data=str(folder))
    resolved = {"kind": "images", **config.to_dict(settings)}
    plan = study.plan(config.Loaded(settings, [{}], "small.py", None, resolved))
    store.write_plan(plan.to_json())
    return store, dataclasses.asdict(next(iter(plan.nodes.values()))), folder


def write(folder: epath.Path) -> None:
    folder.mkdir()
    for split, stem in idx.SPLITS.items():
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(RAW[split][0]))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(RAW[split][1]))


def test_the_stage_commits_rows_a_seed(case, same):
    store, record, _ = case
    card = execution.execute(record, store)
    folder = store.payload("ensemble", card.id)
    results = json.loads((folder / "results.json").read_text())
    assert results == {"rows": same.rows, "curves": same.curves}
    assert execution.digest(card, folder) == card.digest
    assert (card.config["data"], card.tokens) == (DATA.digest, same.seen)
    assert execution.execute(record, store) == card


def test_a_folder_is_found_by_its_content(case):
    """The node holds no path: the stage finds the folder through the plan, and afterwards needs it no more."""
    store, record, folder = case
    assert str(folder) not in json.dumps(record)
    data = ensemble.source(store, record["config"]["data"])
    assert np.array_equal(data.train_images, DATA.train_images)
    assert (store.root / ensemble.CACHE / data.digest).is_dir()
    assert store.kinds() == []  # the cache is no kind of node
    folder.rmtree()
    assert ensemble.source(store, data.digest).digest == data.digest


def test_data_that_changed_since_the_plan_is_refused(case):
    store, record, folder = case
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(150)))
    with pytest.raises(UsageError, match=r"no images of content .* plan again") as error:
        execution.execute(record, store)
    assert "\n" not in str(error.value)


def test_the_shipped_sweep():
    loaded = config.load(DIGITS_PY, [])
    settings = [loaded.at(point) for point in loaded.points]
    assert len(settings) == 7 * 2 * 2 + 2
    assert {(s.seeds, s.noise_rows, s.lr, s.batch, s.hidden) for s in settings} == {(20, 4096, 1e-3, 64, (256, 256))}
    assert [(s.auxiliary, s.logits) for s in settings if s.loss == "squared-error"] == [(1, "auxiliary")] * 2
    plan = study.plan(loaded)
    assert len(plan.nodes) == len(loaded.points) == 30
    assert len({node.group for node in plan.nodes.values()}) == 15


def test_the_papers_protocol_is_the_published_one(tmp_path):
    loaded = config.load(f"{DIGITS_PY}:protocol=paper,data={tmp_path},seeds=5", [])
    s = loaded.settings
    assert (s.hidden, s.lr, s.batch, s.noise_rows, s.teacher_epochs, s.student_epochs) == (
        (256, 256), 3e-4, 1024, 60_000, 5, 5,
    )  # fmt: skip
    assert (s.data, s.seeds) == (str(tmp_path), 5)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("protocol=papers", "give one of small, paper"),
        ("protocol=paper", "needs a folder of IDX files"),
        ("seed=3", "the nearest is 'seeds'"),
        ("seeds=1", "config.seeds is out of range"),
        ("sizes=3+none", "'sizes'"),
        ("sizes=0", "config.auxiliary is out of range"),
    ],
)
def test_wrong_arguments_are_one_line(argument, line):
    with pytest.raises(UsageError) as error:
        config.load(f"{DIGITS_PY}:{argument}", [])
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named_by_the_plan(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        study.plan(config.load(f"{DIGITS_PY}:data={tmp_path / 'nowhere'}", []))
