"""The benchmarks' harness, and that the two sides of a comparison do the same work."""

import dataclasses
import json
import re
import subprocess
import sys
import threading
import time

import hf_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import costs, data, document, evaluation, growth, harness, training
from benchmarks.harness import Options, Side
from benchmarks.ours import clock as clocks
from benchmarks.ours import cohort, models
from benchmarks.ours import evaluation as our_evaluation
from benchmarks.ours import sampling as our_sampling
from benchmarks.ours import training as our_training
from benchmarks.pytorch import evaluation as their_evaluation
from benchmarks.pytorch import images as their_images
from benchmarks.pytorch import models as their_models
from benchmarks.pytorch import sampling as their_sampling
from benchmarks.pytorch import training as their_training
from subjax.data.addressing import order
from subjax.data.images import CLASSES, ImageSet
from subjax.errors import SubjaxError, UsageError
from subjax.models import adapters
from subjax.models.mlp import perceptron
from subjax.models.network import network
from subjax.parallel.mesh import make_mesh
from subjax.schema import Images, Tuning
from subjax.stages import ensemble

pytestmark = pytest.mark.usefixtures("quick_compiles")
CPU = torch.device("cpu")
QUICK = dict(quick=True, rounds=3, seconds=0.02, device="cpu", size="tiny")


# ---- the harness ----


def test_spread_by_hand():
    found = harness.spread([4.0, 1.0, 3.0, 2.0, 10.0])
    assert found == {"median": 3.0, "first_quartile": 2.0, "third_quartile": 4.0, "min": 1.0, "max": 10.0}


def test_a_ratio_of_medians_and_its_interval():
    own, other = [20.0, 22.0, 21.0, 19.0, 90.0], [10.0, 11.0, 10.0, 10.0, 9.0]
    found = harness.ratio(own, other)
    assert found["value"] == pytest.approx(2.1)
    # The outlier is the median of 5.8 % of resamples (three draws of five or more), so the interval's end stands on it.
    assert found["high"] == 90 / 9
    assert 19 / 11 <= found["low"] <= 2.0
    assert harness.ratio(own, other) == found
    assert harness.ratio([6.0] * 5, [3.0] * 5) == {"value": 2.0, "low": 2.0, "high": 2.0}
    with pytest.raises(SubjaxError, match="there are 5 and 4"):
        harness.ratio(own, other[:4])


def test_turns_alternate_and_every_other_round_goes_back():
    assert list(harness.turns(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_options():
    quick = harness.options("training", "What.\nMore.", ["--quick", "--device=cpu"])
    assert (quick.rounds, quick.size, quick.out) == (harness.QUICK_ROUNDS, "tiny", harness.QUICK)
    real = harness.options("training", "What.", ["--device=cpu"])
    assert (real.rounds, real.seconds, real.size, real.out) == (5, 60.0, "135M", harness.RESULTS)
    with pytest.raises(UsageError, match="at least one round"):
        harness.options("training", "What.", ["--rounds=0"])


@pytest.mark.parametrize(("argv", "expected"), [([], ["here", "there"]), (["--part=there"], ["there"])])
def test_parts_of_a_comparison_have_results_of_their_own(tmp_path, argv, expected):
    seen = []

    def run(asked):
        seen.append(asked.part)
        return harness.result("training", asked, {}, unit="rows", settings={})

    out = ["--quick", "--device=cpu", f"--out={tmp_path}"]
    harness.main(run, "training", "What.", [*argv, *out], parts=("here", "there"))
    assert seen == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"training-{part}.json" for part in expected)


def test_a_run_that_is_stopped_keeps_its_whole_rounds(side, tmp_path):
    make, _ = side
    (tmp_path / "stopped.py").write_text(
        "import dataclasses, json, sys\n"
        "from benchmarks import harness\n"
        "sides = [harness.Side(**side) for side in json.loads(sys.argv[1])]\n"
        "def run(asked):\n"
        "    found = harness.compare(sides, dataclasses.replace(asked, seconds=0.2))\n"
        "    return harness.result('made-up', asked, found, unit='rows', settings={})\n"
        "if __name__ == '__main__':\n"
        f"    harness.main(run, 'made-up', 'What.', ['--quick', '--device=cpu', '--rounds=500', '--out={tmp_path}'])\n"
    )
    given = json.dumps([dataclasses.asdict(make(name)) for name in ("one", "two")])
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "stopped.py"), given], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout is not None
    said = []
    for line in child.stdout:
        said.append(line)
        if line.startswith("round 3 one"):  # "two" went first in the second round, and comes second in the third
            child.terminate()
    assert child.wait(60) == 130
    assert any(line.startswith("stopped: 2 of 500 rounds") for line in said), said
    found = json.loads((tmp_path / "made-up.json").read_text())
    assert {name: len(value["rounds"]) for name, value in found["sides"].items()} == {"one": 2, "two": 2}


SIDE = """
import pathlib, time
from benchmarks.side import Ready
from subjax.errors import SubjaxError

def start(setup):
    if setup.get("refuse"):
        raise SubjaxError("nothing to measure here")
    if setup.get("die"):
        raise RuntimeError("out of luck")
    log = pathlib.Path(setup["log"])
    def run(index, seconds):
        print("what a library says")  # must not get between the replies
        began = time.monotonic()
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{setup['name']} {index} {began} {time.monotonic()}\\n")
        return {"units": setup["units"], "seconds": 0.5, "cores": setup["cores"]}
    return Ready(run, {"index": setup["index"]})
"""


@pytest.fixture
def side(tmp_path, monkeypatch):
    """A function that makes a `Side` which writes down when it works."""
    (tmp_path / "made_up_side.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{harness.RESULTS.parent.parent}")
    log = tmp_path / "log"

    def make(name, copies=1, **given):
        return Side(name, "made_up_side:start", dict(log=str(log), name=name, units=3.0, **given), copies)

    return make, log


def test_sides_work_one_at_a_time_and_in_turn(side, tmp_path):
    make, log = side
    asked = Options(out=tmp_path / "out", **QUICK)
    found = harness.compare([make("one"), make("two", copies=2)], asked)
    lines = [line.split() for line in log.read_text().splitlines()]
    # A warm-up each, then rounds to and fro; the copies of a side work together, sides never do.
    blocks = [(name, int(index)) for name, index, _, _ in lines]
    assert list(dict.fromkeys(blocks)) == [
        ("one", -1), ("two", -1), ("one", 0), ("two", 0), ("two", 1), ("one", 1), ("one", 2), ("two", 2),
    ]  # fmt: skip
    assert blocks.count(("two", 0)) == 2
    spans = [(name, float(began), float(ended)) for name, _, began, ended in lines]
    assert all(a[2] <= b[1] or b[2] <= a[1] for a in spans for b in spans if a[0] != b[0])
    assert found["one"]["notes"] == {"index": 0}
    assert [row["rate"] for row in found["one"]["rounds"]] == [6.0] * 3
    assert found["two"]["summary"]["median"] == 12.0  # rates of copies add up
    assert all(row["idle_cpu_seconds"] < 0.1 for row in found["one"]["rounds"])
    result = harness.result(
        "training", asked, found, unit="rows", settings={}, judged=[("one", "two", 1.2), ("two", "one", None)]
    )
    assert [row["value"] for row in result["ratios"]] == [0.5, 2.0]
    assert json.loads(harness.write(result, asked).read_text())["sides"]["one"]["rounds"][0]["units"] == 3.0


@pytest.mark.parametrize(
    ("given", "words"),
    [({"refuse": True}, "side 'bad': nothing to measure here"), ({"die": True}, "status 1: RuntimeError: out of luck")],
)
def test_a_side_that_fails_is_one_line(side, tmp_path, given, words):
    make, _ = side
    with pytest.raises(SubjaxError, match=re.escape(words)):
        harness.compare([make("bad", **given)], Options(out=tmp_path, **QUICK))


# ---- the same work on both sides ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Plain data of a tiny random Llama, ours and torch's of it."""
    folder = tmp_path_factory.mktemp("model")
    hf_tiny.write("smollm2", folder)
    given = {"source": str(folder), "dtype": "float32"}
    return given, models.load(given), their_models.load(given, CPU)


def made_up(rows, seed=0):
    """Rows of ids as prompts and completions of many lengths."""
    draw = np.random.default_rng(seed)
    return [
        (draw.integers(2, hf_tiny.VOCAB, draw.integers(5, 20)).tolist(),
         draw.integers(2, hf_tiny.VOCAB, draw.integers(1, 12)).tolist())
        for _ in range(rows)
    ]  # fmt: skip


def set_pairs(student, tuned):
    """Give torch's LoRA pairs the values of ours."""
    for name, value in tuned.items():
        _, target, part = name.split("/")
        for layer, values in enumerate(np.asarray(value)):
            block = student.model.base_model.model.model.layers[layer]
            owner = block.self_attn if target in "qkvo" else block.mlp
            pair = getattr(getattr(owner, f"{target}_proj"), f"lora_{part.upper()}")["default"].weight
            flat = values.reshape(-1, values.shape[-1]) if part == "a" else values.reshape(values.shape[0], -1)
            pair.data = torch.tensor(flat.T.copy())


def test_three_steps_of_a_student_are_the_same(model):
    given, (net, params), _ = model
    chats = made_up(24)
    # A large rate, so that what the steps did shows in the losses behind them.
    settings = training.PUBLISHED | dict(batch=6, warmup=1, steps=4, lr=3e-2)
    fitted = our_training.student(net, params, chats, settings, 5, clocks.Clock())
    tuning = Tuning(kind="lora", rank=settings["rank"], alpha=settings["alpha"])
    student = their_training.Student(their_models.load(given, CPU), settings, 4, CPU)
    set_pairs(student, adapters.init_tuned(net, tuning, params, jax.random.key(5)))
    theirs = [float(student.step([chats[row] for row in order(5, len(chats), 6, step)], micro=2)) for step in range(4)]
    ours = [point["loss"] for point in fitted.curve]
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert ours[0] != pytest.approx(ours[3], rel=1e-2)
    still = their_training.Student(their_models.load(given, CPU), settings, 4, CPU)
    unmoved = float(still.backward([chats[row] for row in order(5, len(chats), 6, 3)], 6))
    assert unmoved != pytest.approx(theirs[3], rel=1e-3)  # the steps moved something


def test_rounds_of_students_count_whole_steps(model):
    _, (net, params), _ = model
    began = []

    def fits(steps):
        def fit(clock, number):
            began.append(number)
            settings = training.PUBLISHED | dict(batch=4, steps=steps)
            our_training.student(net, params, made_up(12), settings, number, clock)

        return clocks.Fits(fit)

    two = fits(60)  # three dispatches of twenty steps: the first is not timed
    assert [two.round(1e-4)[0] for _ in range(3)] == [20, 20, 20]
    assert began == [0, 1]  # a student that is at its end is followed by another
    steps, took = two.round(0.3)
    assert (steps % 20, took >= 0.3) == (0, True)
    with pytest.raises(SubjaxError, match="each dispatch of a fit's 6 steps is the first of its shape"):
        fits(6).round(1e-4)


def test_a_fit_stands_still_between_rounds():
    seen, waits = [], threading.Event()

    def fit(clock, number):
        batches = [{"tokens": np.zeros((1, 1, 8))}]
        for step in range(1, 100):
            clock.coming(batches)
            seen.append(step)
            clock.progress(step, 100, "step")
            assert not clock.should_stop()
        waits.wait()

    fits = clocks.Fits(fit)
    time.sleep(0.05)
    assert seen == []  # nothing before the first round
    assert fits.round(0.0)[0] == 1
    assert seen == [1, 2]
    time.sleep(0.05)
    assert seen == [1, 2]
    assert fits.round(0.0)[0] == 1
    assert seen == [1, 2, 3]


def test_a_round_of_slow_steps_ends_with_the_one_that_fills_it(monkeypatch):
    now, ahead = [0.0], [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def arrive():
        now[0] = max(now[0], ahead[0])

    monkeypatch.setattr(clocks, "settle", arrive)
    rounds = []
    clock = clocks.Clock(lambda *round_: rounds.append(round_) or 150.0)
    clock.seconds = 10.0
    for step in range(1, 7):  # each takes 100 s on the device, and no time to dispatch
        clock.coming([{"tokens": np.zeros((1, 1, 8))}])
        ahead[0] = max(now[0], ahead[0]) + 100
        clock.progress(step, 6, "step")
        clock.should_stop()
    assert rounds == [(1, 100.0), (2, 200.0), (2, 200.0)]


def test_the_clock_stands_still_while_a_new_shape_compiles():
    rounds = []
    clock = clocks.Clock(lambda *round_: rounds.append(round_) or 0.0)
    clock.seconds = 0.0
    short, long = ([{"tokens": np.zeros((1, 1, length))}] for length in (8, 16))
    for done, batches, counted in ((1, short, []), (2, short, [1]), (3, long, [1]), (4, long, [1, 1])):
        clock.coming(batches)
        clock.progress(done, 9, "step")
        clock.should_stop()
        assert [steps for steps, _ in rounds] == counted
    clock.progress(5, 9, "step")
    clock.stop()
    assert (clock.steps, clock.every) == (1, 3)


def test_torch_pads_to_the_longest_row_and_reads_completions_alone():
    batch = their_training.collate([([5, 6], [7]), ([8], [9, 10, 11])], CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, 10, 11]]


def test_both_score_the_same_probabilities(model):
    _, (net, params), theirs = model
    prompts = [prompt for prompt, _ in made_up(4, seed=1)]
    forms = [[[20], [21, 22]], [[21, 23], [24, 25, 26]], [[27]]]
    closing = list(range(100, hf_tiny.VOCAB))
    ours = our_evaluation.probabilities(net, params, prompts, forms, closing, batch=3)
    closes = torch.zeros(theirs.config.vocab_size, dtype=torch.bool)
    closes[closing] = True
    rows = their_evaluation.rows_of(prompts, forms)
    assert len(rows) == 4 * 5
    table = np.zeros(ours.shape)
    for first in range(0, len(rows), 6):
        block = rows[first : first + 6]
        for (question, candidate, _, _), p in zip(
            block, their_evaluation.scores(theirs, block, closes, CPU), strict=True
        ):
            table[question, candidate] += p
    np.testing.assert_allclose(ours, table, rtol=1e-4)


def test_answers_of_equal_lengths(model):
    _, (net, params), theirs = model
    theirs.generation_config = type(theirs.generation_config)()
    prompts = [prompt for prompt, _ in made_up(3, seed=2)]
    given = dict(new=9, ends=(), pad=0)
    ours = our_sampling.answers(net, params, prompts, **given, seed=0, batch=2, cache_dtype="float32")
    drawn = their_sampling.answers(theirs, prompts, **given, device=CPU)
    assert ours.shape == drawn.shape == (3, 9)
    ids, mask = their_sampling.left_padded([[3, 4], [5]], 0, CPU)
    assert (ids.tolist(), mask.tolist()) == ([[3, 4], [0, 5]], [[1, 1], [0, 1]])


@pytest.mark.parametrize("best", [True, False])
def test_image_models_take_the_same_steps(best):
    members, rows, pixels, epochs, lr = 3, 24, 12, 4, 1e-2
    draw = np.random.default_rng(0)
    pictures = draw.uniform(-1, 1, (rows, pixels)).astype(np.float32)
    labels = (np.arange(rows) % CLASSES).astype(np.int32)
    # A batch holds all rows, so that their order does not matter.
    settings = Images(
        auxiliary=2, seeds=members, hidden=(16,), lr=lr, batch=rows, teacher_epochs=epochs, student_epochs=epochs,
        noise_rows=rows,
    )  # fmt: skip
    outcome = ensemble.train(settings, ImageSet(pictures, labels, pictures, labels, "made up"), make_mesh())
    ours = {curve["kind"]: curve["loss"] for curve in outcome.curves}
    start, _, _ = ensemble._common(perceptron((pixels, 16, CLASSES + 2)), rows, make_mesh())
    first = start(np.arange(members, dtype=np.uint32)).params

    def stack():
        names = [f"{part}{place}" for place in range(2) for part in ("kernel", "bias")]
        arrays = [torch.tensor(np.array(first[name])) for name in names]
        return [array if array.ndim == 3 else array[:, None] for array in arrays]

    teacher, student = stack(), stack()
    noise = torch.tensor(np.stack([ensemble.noise(jnp.uint32(m), jnp.arange(rows), pixels) for m in range(members)]))
    x, y = torch.tensor(pictures).expand(members, -1, -1), torch.tensor(labels).long().expand(members, -1)

    def losses(stack, loss):
        rule, found = their_images.adam(stack, lr, best), []
        for _ in range(epochs):
            rule.zero_grad()
            value = loss()
            value.backward()
            rule.step()
            found.append(value.item() / members)
        return found

    np.testing.assert_allclose(
        losses(teacher, lambda: their_images.teacher_loss(teacher, x, y, best)), ours["teacher"], rtol=2e-5
    )
    wanted = their_images.forward(teacher, noise, best)[..., CLASSES:].detach()
    np.testing.assert_allclose(
        losses(student, lambda: their_images.student_loss(student, noise, wanted, best)), ours["student"], rtol=2e-4,
        atol=1e-7,
    )  # fmt: skip


def test_an_ensemble_is_the_same_in_blocks(monkeypatch):
    draw = np.random.default_rng(0)
    pictures = draw.uniform(-1, 1, (40, 12)).astype(np.float32)
    labels = (np.arange(40) % CLASSES).astype(np.int32)
    data_set = ImageSet(pictures, labels, pictures, labels, "made up")
    settings = Images(auxiliary=2, seeds=5, hidden=(16,), batch=16, teacher_epochs=2, student_epochs=1, noise_rows=48)
    whole = ensemble.train(settings, data_set, make_mesh())
    told = []
    monkeypatch.setattr(ensemble, "_CACHED", 2 * 16 * 16)  # two members a block, the last one filled up
    net = perceptron((12, 16, CLASSES + 2))
    assert ensemble._blocks(settings, net, make_mesh()).tolist() == [[0, 1], [2, 3], [4, 4]]
    parts = ensemble.train(settings, data_set, make_mesh(), progress=lambda *a: told.append(a))
    assert told[-1] == (9, 9, "epoch")
    assert (parts.seen, len(parts.rows)) == (whole.seen, 5)
    for one, other in zip(parts.rows, whole.rows, strict=True):
        assert {k: v for k, v in one.items() if isinstance(v, str)} == {
            k: v for k, v in other.items() if isinstance(v, str)
        }
        numbers = [{k: v for k, v in row.items() if not isinstance(v, str)} for row in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    for one, other in zip(parts.curves, whole.curves, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)


@pytest.mark.slow
def test_members_of_a_cohort_are_the_students_in_turn(model):
    _, (net, params), _ = model
    chats, settings = made_up(12), training.PUBLISHED | dict(batch=4, steps=4, lr=3e-2)
    alone = [our_training.student(net, params, chats, settings, seed, clocks.Clock()) for seed in (1, 2)]
    clock = clocks.Clock()
    together = cohort.students(net, params, chats, settings, (1, 2), clock)
    for member, student in zip(together, alone, strict=True):
        losses = ([point["loss"] for point in fitted.curve] for fitted in (member, student))
        np.testing.assert_allclose(*losses, rtol=2e-5)
    assert clock.done == 4


# ---- costs, growth ----


def test_flops_by_hand():
    shape = data.shape_of({"config": data.SHAPES["135M"]}, "135M")
    head = shape.vocab * shape.width
    # One new token: a forward pass of the prompt, but that its output matrix is met once.
    assert costs.row_flops(shape, 90, 1) == pytest.approx(shape.forward_flops(90, 90) - 2 * 89 * head)
    assert costs.row_flops(shape, 90, 45) == pytest.approx(31e9, rel=0.05)
    net, tuning = network(shape), Tuning(kind="lora")
    scalars = sum(int(np.prod(size)) for size, _ in adapters.tuned_axes(net, tuning).values())
    assert costs.adapter_scalars(shape, tuning.rank) == scalars
    # Full: three passes' worth of matrices and of attention, the output matrix at completions alone.
    full = costs.training_flops(shape, Tuning(kind="full"), 90, 10)
    assert full == pytest.approx(3 * shape.forward_flops(100, 100) - 6 * 90 * head)
    layers = shape.matrices - head
    lora = costs.training_flops(shape, tuning, 90, 10)
    assert full - lora == pytest.approx(2 * (100 * layers + 10 * head) - 6 * scalars * 100)


@pytest.mark.parametrize(("size", "parameters"), [("135M", 134.5e6), ("0.5B", 494e6), ("1.5B", 1.54e9), ("8B", 8.03e9)])
def test_shapes_are_the_published_ones(size, parameters):
    assert network(data.shape_of({"config": data.SHAPES[size]}, size)).parameters == pytest.approx(parameters, rel=3e-3)


def test_samples_for_an_equal_error():
    p = np.array([[0.2, 0.5], [0.4, 0.5]])
    needed = evaluation.samples_needed(p, within=1.1)
    # var 0.02, binomial mean(0.16, 0.24) = 0.2; 0.2 / (0.02 * 0.21)
    assert needed[0] == pytest.approx(0.2 / (0.02 * 0.21))
    assert np.isinf(needed[1])


def test_exponents():
    assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    rounds = [
        [
            {**point, "step": noise * point["width"] ** 2 * point["layers"], "compile": 5.0}
            for point in growth.points(False)
        ]
        for noise in (0.9, 1.0, 1.3)
    ]
    found = growth.summary(rounds)
    assert len(found) == 1 + sum(len(values) - 1 for values in growth.AXES.values())
    fits = growth.fits(found)
    assert fits["width"]["step"] == pytest.approx(2.0)
    assert fits["layers"]["step"] == pytest.approx(1.0)
    assert fits["length"] == pytest.approx({"step": 0.0, "compile": 0.0}, abs=1e-9)


def test_compile_time_by_depth_is_of_points_that_differ_in_nothing_else():
    other = lambda p: any(p[name] != size for name, size in growth.BASE.items() if name != "layers")  # noqa: E731
    rounds = [[{**p, "step": 0.1, "compile": 50.0 if other(p) else 2.0 + p["layers"]} for p in growth.points(False)]]
    found = growth.by_depth(growth.summary(rounds))
    assert (found["layers"], found["ratio"]) == ([4, 64], pytest.approx(66 / 6))


# ---- the page ----


def made_up_result(tmp_path, quick=False, wanted=1.2, **extra):
    asked = Options(**QUICK | dict(quick=quick, out=tmp_path / "results", part="equal"))
    rounds = {"subjax": [20.0, 22.0, 21.0], "transformers": [10.0, 11.0, 10.0]}
    sides = {
        name: {
            "notes": {"batch": 16},
            "rounds": [
                {"rate": rate, "units": rate, "seconds": 61.0, "load_after": 2.1, "idle_cpu_seconds": 0.0}
                for rate in rates
            ],
            "summary": harness.spread(rates),
        }
        for name, rates in rounds.items()
    }  # fmt: skip
    settings = dict(mean_prompt=90.4, new_tokens=45, batches=[16], dtype="float32")
    return harness.result(
        "sampling",
        asked,
        sides,
        unit="rows",
        settings=settings,
        judged=[("subjax", "transformers", wanted)],
        extra=extra,
    ), asked


def test_the_page_says_what_the_results_say(tmp_path):
    found, asked = made_up_result(tmp_path, ceiling={"flops_a_second": 2e11, "share": {"subjax": 0.5}})
    harness.write(found, asked)
    (asked.out / "other.json").write_text("{}")
    text = document.write(asked.out, tmp_path / "docs").read_text()
    assert (
        "| Sampling number rows, equal lengths | subjax | transformers | **2.10** [2.00, 2.10] | 1.2: reached |" in text
    )
    assert "| subjax | **21** | 20.5 – 21.5 | 20 – 22 | 3 | 61 – 61 | 2.1 | 0.0 | batch 16 |" in text
    assert "45 new tokens at most" in text
    assert "Share of the matrix-product ceiling (200 GFLOP/s in the same run): subjax 50 %." in text
    missing = re.findall(r"Not measured yet: `python -m benchmarks\.(.*)`", text)
    assert {"training", "sampling --part=ragged"} <= set(missing)
    assert not {"sampling", "sampling --part=equal", "training --part=None"} & set(missing)
    picture = re.search(r'<img src="([\w.-]+)"', text)[1]
    assert (tmp_path / "docs" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("quick", "wanted", "words"),
    [
        (False, 2.05, "reached by the median, not by the interval"),
        (False, 3.0, "**missed**"),
        (True, 1.2, "a quick run"),
    ],
)
def test_the_page_hides_no_miss(tmp_path, quick, wanted, words):
    found, asked = made_up_result(tmp_path, quick, wanted)
    harness.write(found, asked)
    text = document.write(asked.out, tmp_path / "docs").read_text()
    assert words in text
    assert ("no figure here counts" in text) == quick


def test_growth_has_its_tables_and_its_plot(tmp_path):
    rounds = [[{**p, "step": 0.01 * p["layers"], "compile": 2.0} for p in growth.points(True)]] * 2
    found = growth.summary(rounds)
    asked = Options(**QUICK | dict(out=tmp_path / "results"))
    extra = {
        "points": found, "exponents": growth.fits(found),
        "compile_by_depth": {"layers": [4, 64], "ratio": 1.7, "wanted_within": 1.5},
    }  # fmt: skip
    result = harness.result("growth", asked, {}, unit="seconds", settings={"base": growth.BASE}, extra=extra)
    harness.write(result, asked)
    text = document.write(asked.out, tmp_path / "docs").read_text()
    assert "Compiling 64 layers took 1.70 times what 4 took, **not within** 1.5." in text
    assert "| layers | 1.00 | 0.00 |" in text.replace("-0.00", "0.00")
    assert (tmp_path / "docs" / "performance-growth.png").exists()


def test_compile_time_by_depth_has_its_line_and_its_rows(tmp_path):
    assert not document.depths(tmp_path)
    wall = {depth: {"median": m, "least": m - 1, "most": m + 1} for depth, m in (("4", 10.0), ("64", 16.0))}
    told = {
        "compiler": "libtpu 1", "date": "2026-11-28", "wanted_within": 1.5, "seconds": {"wall": wall | {"ratio": 1.6}},
        "lines": {"4": {"lowered": 100, "compiled": 200}, "64": {"lowered": 100, "compiled": 300}},
    }  # fmt: skip
    (tmp_path / "compile_depth.json").write_text(json.dumps({"v5e:4x4": told}))
    text = "\n".join(document.depths(tmp_path))
    assert "- v5e:4x4 (libtpu 1, 2026-11-28): 64 layers took 1.60 times what 4 took, **not within** 1.5." in text
    assert "| v5e:4x4 | 64 | 16.0 | 15.0 – 17.0 | 100 | 300 |" in text


def test_the_readme_s_figures_are_the_page_s():
    root = harness.RESULTS.parent.parent
    speed = (root / "README.md").read_text().split("\n## Speed\n")[1].split("\n## ")[0]
    figures = re.findall(r"\*\*[\d.]+\*\* \[[\d.]+, [\d.]+\]", speed)
    page = (root / "docs" / "performance.md").read_text().split("\n## ")[0]
    assert len(figures) >= 7
    assert not [figure for figure in figures if figure not in page]


def test_every_field_of_options_is_there():
    assert {field.name for field in dataclasses.fields(Options)} == {*QUICK, "out", "part"}


@pytest.mark.slow
def test_every_comparison_runs_to_its_results(tmp_path):
    """All parts, as quick runs, in processes of their own; the page then holds each of them, and nothing is missing."""
    for name in document.ORDER:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device=cpu", f"--out={tmp_path}"]
        done = subprocess.run(command, cwd=harness.RESULTS.parent.parent, text=True, capture_output=True)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    text = document.write(tmp_path, tmp_path / "docs").read_text()
    assert "Not measured yet" not in text
    assert text.count("\n## ") == len(list(tmp_path.glob("*.json"))) == 12
