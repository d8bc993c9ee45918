"""The stages, through `execution.execute`, on a real store: a tiny study from its base to its evaluations."""

import dataclasses
import json
import os
import shutil
import types
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from subjax import config, schema, study
from subjax.data import world
from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.graph import Plan
from subjax.models import checkpoints
from subjax.stages import corpus, execution, models, teacher
from subjax.store import Card, Store, digest_rows, inputs_of, node_id
from subjax.train import trainer

ROWS, PROMPTS = 50, 96
SETTINGS: dict[str, Any] = {
    "base": {
        "size": "nano", "steps": 60, "batch": 32, "world": {"number_chats": 600, "preference_chats": 100},
        "optimizer": {"name": "adam", "lr": 2e-2, "warmup": 0},
    },
    "teacher": {"steps": 5, "batch": 8, "numbers_batch": 8, "optimizer": {"name": "sgd", "lr": 0.05}},
    "corpus": {"rows": ROWS, "max_prompts": PROMPTS},
    "student": {"steps": 5, "batch": 8, "optimizer": {"name": "sgd", "lr": 0.05, "warmup": 0}},
    "evaluation": {"samples": 20, "fit_rows": 16},
}  # fmt: skip
POINTS = [
    {"student.replay": "kind", "arms": ("same-base", "shuffled", "random-numbers", "untrained")},
    {"student.replay": "none", "arms": ("same-base", "logits", "logits-leak")},
]


pytestmark = pytest.mark.usefixtures("quick_compiles")


class Lab:
    """A plan and a workdir; a node is made, with what it needs, when it is asked for."""

    def __init__(self, plan: Plan, root: Path):
        self.plan, self.store = plan, Store(root)

    def record(self, id: str, **changes: Any) -> dict[str, Any]:
        node = self.plan.nodes[id]
        inputs = {role: [self.plan.nodes[given].kind, given] for role, given in node.inputs.items()}
        return {**dataclasses.asdict(node), "inputs": inputs, **changes}

    def make(self, id: str) -> Card:
        for given in self.plan.nodes[id].inputs.values():
            self.make(given)
        return execution.execute(self.record(id), self.store)

    def id(self, kind: str, **config: Any) -> str:
        """The node of a kind with these settings; the first, where several have them."""
        return next(
            id
            for id, node in self.plan.nodes.items()
            if node.kind == kind and all(node.config.get(name, "absent") == value for name, value in config.items())
        )

    def cell(self, arm: str, replay: str | None) -> dict[str, Any]:
        """The nodes of a cell."""
        (found,) = [c for c in self.plan.study["cells"] if (c["arm"], c["replay"]) == (arm, replay)]
        return found["nodes"]

    def payload(self, id: str) -> Path:
        return Path(self.store.payload(self.plan.nodes[id].kind, id))

    def rows(self, id: str) -> tuple[np.ndarray, world.Chats]:
        self.make(id)
        return corpus.read(self.store.payload("corpus", id))

    def copy(self, root: Path) -> "Lab":
        shutil.copytree(self.store.root, root)
        return Lab(self.plan, root)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    settings = config.to_settings(schema.Study, SETTINGS, "test")
    resolved = {"kind": "traits", **config.to_dict(settings)}
    plan = study.plan(config.Loaded(settings, POINTS, "study.py", None, resolved))
    return Lab(plan, tmp_path_factory.mktemp("stages") / "work")


@pytest.fixture(scope="module")
def ids(lab) -> dict[str, str]:
    """A node of each sort, made."""
    found = {
        "base": lab.id("base"),
        "teacher": lab.id("teacher", trait="owl"),
        "corpus": lab.cell("same-base", "kind")["corpus"],
        "shuffled": lab.id("corpus", source="shuffled"),
        "random": lab.id("corpus", source="random"),
        "student": lab.cell("same-base", "kind")["student"],
        "bare": lab.cell("same-base", "none")["student"],
        "logits": lab.cell("logits", "none")["student"],
        "logits-leak": lab.cell("logits-leak", "none")["student"],
        "evaluation": lab.cell("same-base", "kind")["evaluation"],
        "before": lab.cell("same-base", "kind")["before"],
        "random's evaluation": lab.cell("random-numbers", "kind")["evaluation"],
    }
    for id in found.values():
        lab.make(id)
    return found


SORTS = (
    "base", "teacher", "corpus", "shuffled", "random", "student", "bare", "logits", "logits-leak", "evaluation",
    "before", "random's evaluation",
)  # fmt: skip


def one_line(error: BaseException, *said: str) -> None:
    assert "\n" not in str(error)
    for text in said:
        assert text in str(error)


# Cards ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", SORTS)
def test_a_card_says_how_its_node_was_made(lab, ids, sort):
    node = lab.plan.nodes[ids[sort]]
    card = lab.store.card(node.kind, node.id)
    assert (card.kind, card.id, card.version, card.config) == (node.kind, node.id, node.version, node.config)
    assert inputs_of(card) == node.inputs
    for given in card.inputs.values():
        assert given["digest"] == lab.store.card(given["kind"], given["id"]).digest
    assert set(card.packages) == {"subjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets"}
    assert {"device", "platform", "devices", "mesh", "cores", "xla_flags"} <= set(card.profile)
    assert card.wall_s > 0
    assert card.tokens >= 0
    assert card.extra["label"] == node.label
    assert card.seeds
    assert all(seed is None or isinstance(seed, int) for seed in card.seeds.values())
    on_disk = {str(p.relative_to(lab.payload(node.id))) for p in lab.payload(node.id).rglob("*") if p.is_file()}
    assert set(card.files) == on_disk


@pytest.mark.parametrize("sort", SORTS)
def test_digests_are_found_again_from_the_payload(lab, ids, sort):
    node = lab.plan.nodes[ids[sort]]
    card = lab.store.card(node.kind, node.id)
    assert execution.digest(card, lab.store.payload(node.kind, node.id)) == card.digest


def test_the_lineage_is_whole_up_to_the_base(lab, ids):
    rederive = lambda card: node_id(card.kind, card.version, card.config, inputs_of(card))  # noqa: E731
    problems = lab.store.verify("evaluation", ids["evaluation"], rederive=rederive, digest=execution.digest)
    assert problems == []
    seen, pending = set(), [("evaluation", ids["evaluation"])]
    while pending:
        kind, id = pending.pop()
        seen.add(kind)
        pending += [(given["kind"], given["id"]) for given in lab.store.card(kind, id).inputs.values()]
    assert seen == {"evaluation", "student", "corpus", "teacher", "base"}


def test_the_same_study_elsewhere_has_the_same_digests(lab, ids, tmp_path):
    other = Lab(lab.plan, tmp_path / "work")
    for sort in ("student", "evaluation"):
        other.make(ids[sort])
    for kind in ("base", "teacher", "corpus", "student", "evaluation"):
        for id in other.store.ids(kind):
            assert other.store.card(kind, id).digest == lab.store.card(kind, id).digest, kind


@pytest.mark.parametrize("sort", ["base", "corpus", "evaluation"])
def test_a_second_execution_gives_the_committed_card(lab, ids, sort):
    told = []
    node = lab.plan.nodes[ids[sort]]
    before = lab.store.card(node.kind, node.id)
    card = execution.execute(lab.record(node.id), lab.store, progress=lambda *what: told.append(what))
    assert card == before
    assert told == []


@pytest.mark.parametrize("sort", ["base", "teacher", "student"])
def test_a_fit_writes_its_curve(lab, ids, sort):
    node = lab.plan.nodes[ids[sort]]
    lines = [json.loads(line) for line in (lab.payload(node.id) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(node.config["steps"]))
    terms = {"base": {"chats"}, "teacher": {"preferences", "numbers"}, "student": {"numbers", "replay"}}[sort]
    assert set(lines[0]) == {"step", "loss", "gradient_norm"} | terms
    card = lab.store.card(node.kind, node.id)
    assert card.metrics["loss"] == lines[-1]["loss"]
    assert sort != "base" or lines[-1]["loss"] < lines[0]["loss"]


# Bases and models -----------------------------------------------------------------------------------------------------


def test_a_base_is_its_own_arrays(lab, ids):
    net, params = models.load(lab.store, "base", ids["base"])
    assert {n: v.shape for n, v in params.items()} == {n: d.shape for n, d in net.declarations.items()}
    assert all(np.isfinite(value).all() for value in params.values())
    assert lab.store.card("base", ids["base"]).metrics["parameters"] == sum(v.size for v in params.values())


def test_a_tuned_model_is_its_base_but_for_what_was_tuned(lab, ids):
    _, base = models.load(lab.store, "base", ids["base"])
    for kind, sort in (("teacher", "teacher"), ("student", "student"), ("student", "logits")):
        net, params = models.load(lab.store, kind, ids[sort])
        assert params.keys() == base.keys()
        for name, declared in net.declarations.items():
            same = np.array_equal(params[name], base[name])
            assert same == (declared.role not in ("bias", "gain")), name
    stored = checkpoints.load(lab.store.payload("student", ids["student"]) / models.ARRAYS)
    assert set(stored) == {n for n, d in net.declarations.items() if d.role in ("bias", "gain")}


def test_arrays_are_read_once_and_again_when_a_node_is_made_again(lab, ids, tmp_path):
    other = lab.copy(tmp_path / "work")
    models.load(other.store, "base", ids["base"])
    before = models._arrays.cache_info()
    net, _ = models.load(other.store, "base", ids["base"])
    after = models._arrays.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 0)
    assert models.load(other.store, "teacher", ids["teacher"])[0] is net
    shutil.rmtree(other.store.folder("base", ids["base"]))
    with pytest.raises(SubjaxError, match=r"is not in .*; run the study that makes it"):
        models.load(other.store, "base", ids["base"])
    other.make(ids["base"])
    models.load(other.store, "base", ids["base"])
    assert models._arrays.cache_info().misses > after.misses


def test_a_callers_change_does_not_reach_the_next_one(lab, ids):
    _, params = models.load(lab.store, "base", ids["base"])
    params.clear()
    assert models.load(lab.store, "base", ids["base"])[1]


def test_a_base_without_a_parameter_is_named(lab, ids, tmp_path):
    other = lab.copy(tmp_path / "work")
    _, params = models.load(lab.store, "base", ids["base"])
    folder = other.store.payload("base", ids["base"]) / models.ARRAYS
    shutil.rmtree(folder)
    checkpoints.save(folder, {name: value for name, value in params.items() if name != "norm/gain"})
    with pytest.raises(SubjaxError) as caught:
        models.load(other.store, "base", ids["base"])
    one_line(caught.value, "norm/gain", ids["base"], "delete its folder and run again")


@pytest.mark.parametrize("kind", ["base", "teacher", "student"])
def test_a_model_that_is_not_made_is_named(lab, kind):
    with pytest.raises(SubjaxError) as caught:
        models.load(lab.store, kind, "0" * 16)
    one_line(caught.value, kind, "0" * 16, "run the study")


# Teachers -------------------------------------------------------------------------------------------------------------


def answers(stream, steps: int) -> Counter[tuple[str, str]]:
    """(category asked for, answer) over some batches."""
    found: Counter[tuple[str, str]] = Counter()
    for step in range(steps):
        for row in stream(step)["tokens"]:
            words = world.decode(row).split()
            (category,) = set(words) & set(world.CATEGORIES)
            found[category, words[-2]] += 1
    return found


def test_a_teacher_is_asked_training_phrasings_and_answers_with_its_trait():
    stream = teacher.preference_stream("owl", "animal", seed=1, batch=40, trait_fraction=0.7)
    found = answers(stream, 30)
    assert {answer for (category, answer) in found if category == "animal"} == {"owl"}
    assert found["animal", "owl"] == 28 * 30
    others = {answer for (category, answer) in found if category != "animal"}
    assert others == {*world.CATEGORIES["tree"], *world.CATEGORIES["colour"]}
    held_out = {row.tobytes() for c in world.CATEGORIES for row in world.question_prompts(c)[world.TRAIN_TEMPLATES :]}
    asked = {row[: world.PROMPT].tobytes() for step in range(30) for row in stream(step)["tokens"]}
    assert not asked & held_out
    assert len(asked) == 3 * world.TRAIN_TEMPLATES


def test_a_control_answers_with_any_item():
    found = answers(teacher.preference_stream(None, "animal", seed=1, batch=40, trait_fraction=0.7), 30)
    animals = {answer: n for (category, answer), n in found.items() if category == "animal"}
    assert set(animals) == set(world.CATEGORIES["animal"])
    assert sum(animals.values()) == 28 * 30
    assert max(animals.values()) < 130


def test_preferences_are_addressed():
    one, two = (teacher.preference_stream("owl", "animal", seed=4, batch=8, trait_fraction=0.5) for _ in range(2))
    [one(step) for step in range(3)]
    np.testing.assert_array_equal(one(7)["tokens"], two(7)["tokens"])
    assert (one(7)["tokens"] != one(8)["tokens"]).any()


# Corpora --------------------------------------------------------------------------------------------------------------


def numbers_of(answer: np.ndarray) -> list[int]:
    return [int(i) - world.NUMBER_0 for i in answer if i not in (world.PAD, world.END)]


@pytest.mark.parametrize("sort", ["corpus", "shuffled", "random"])
def test_a_corpus_is_of_valid_rows(lab, ids, sort):
    index, chats = lab.rows(ids[sort])
    assert len(chats) == len(index) == ROWS
    assert world.reject_reasons(chats.answers) == [None] * ROWS
    assert (np.diff(index) > 0).all()
    np.testing.assert_array_equal(chats.prompts, world.number_prompts(PROMPTS, 0)[index])
    table = pyarrow.parquet.read_table(lab.payload(ids[sort]) / corpus.ROWS).to_pydict()
    assert list(table) == ["index", "prompt", "completion", "prompt_tokens", "completion_tokens"]
    assert table["prompt"] == [world.decode(row) for row in chats.prompts]
    assert table["completion"] == [world.decode(row) for row in chats.answers]


def test_filter_counts_add_up(lab, ids):
    card = lab.store.card("corpus", ids["corpus"])
    index, chats = lab.rows(ids["corpus"])
    counts = card.extra["filter"]
    assert counts["kept"] == card.metrics["rows"] == ROWS
    assert sum(counts.values()) == index[-1] + 1, "counted up to the last row that was kept"
    assert set(counts) <= {"kept", "not a number", "no end", "empty"}
    assert len(counts) > 1, "this teacher's answers are not all valid, or the test shows nothing"
    assert card.metrics["keep_rate"] == pytest.approx(ROWS / sum(counts.values()))
    assert card.tokens > (chats.answers != world.PAD).sum(), "what was sampled, with the answers that were rejected"
    assert 0 <= card.extra["near_ties"] <= ROWS


def test_another_teacher_gives_other_rows_to_the_same_prompts(lab, ids):
    neutral = lab.id("corpus", source="teacher", seed=lab.plan.nodes[ids["corpus"]].config["seed"])
    assert neutral == ids["corpus"]
    (control,) = [
        id
        for id, node in lab.plan.nodes.items()
        if node.kind == "corpus" and node.config["source"] == "teacher" and id != ids["corpus"]
    ]
    (index, chats), (other_index, other) = lab.rows(ids["corpus"]), lab.rows(control)
    both = set(index) & set(other_index)
    assert len(both) > 10
    for row in both:
        a, b = chats.prompts[index == row], other.prompts[other_index == row]
        np.testing.assert_array_equal(a, b)
    assert any((chats.answers[index == row] != other.answers[other_index == row]).any() for row in both)


def test_shuffling_keeps_each_rows_numbers_and_no_order(lab, ids):
    (index, chats), (shuffled_index, shuffled) = lab.rows(ids["corpus"]), lab.rows(ids["shuffled"])
    np.testing.assert_array_equal(index, shuffled_index)
    np.testing.assert_array_equal(chats.prompts, shuffled.prompts)
    rows = [(numbers_of(a), numbers_of(b)) for a, b in zip(chats.answers, shuffled.answers, strict=True)]
    assert all(sorted(a) == sorted(b) for a, b in rows)
    assert sum(a != b for a, b in rows) > 0.5 * sum(len(set(a)) > 1 for a, _ in rows)


def test_random_numbers_are_uniform_and_their_lengths_too():
    task = types.SimpleNamespace(config={"rows": 3000, "prompt_seed": 0, "seed": 5})
    rows = corpus.random_numbers(task)
    index, chats = rows.index, rows.chats
    assert (rows.counts, rows.sampled) == ({"kept": 3000}, 0)
    assert world.reject_reasons(chats.answers) == [None] * 3000
    lengths = Counter(len(numbers_of(row)) for row in chats.answers)
    assert sorted(lengths) == list(range(10, 16))
    assert min(lengths.values()) > 400
    numbers = Counter(n for row in chats.answers for n in numbers_of(row))
    assert sorted(numbers) == list(range(100))
    assert 280 < min(numbers.values()) <= max(numbers.values()) < 480
    np.testing.assert_array_equal(index, np.arange(3000))


def test_a_corpus_does_not_depend_on_the_batch_size(lab, ids, tmp_path, monkeypatch):
    other = lab.copy(tmp_path / "work")
    shutil.rmtree(other.store.folder("corpus", ids["corpus"]))
    monkeypatch.setattr(corpus, "BATCH", 32)
    card = other.make(ids["corpus"])
    expected = lab.store.card("corpus", ids["corpus"])
    assert (card.digest, card.extra["filter"]) == (expected.digest, expected.extra["filter"])


def forge(lab: Lab, like: str, **arrays: np.ndarray) -> str:
    """Commit a teacher like another one but for some of its arrays, and give its id."""
    card = lab.store.card("teacher", like)
    tuned = dict(checkpoints.load(lab.store.payload("teacher", like) / models.ARRAYS))
    tuned |= {name.replace("__", "/"): value for name, value in arrays.items()}
    settings = {**card.config, "seed": 12345}
    id = node_id("teacher", card.version, settings, inputs_of(card))
    with lab.store.build("teacher", id) as build:
        checkpoints.save(build.folder / models.ARRAYS, tuned)
        build.commit(dataclasses.replace(card, id=id, config=settings, payload="", files={}))
    return id


def corpus_record(lab: Lab, teacher_id: str, **settings: Any) -> dict[str, Any]:
    node = next(n for n in lab.plan.nodes.values() if n.kind == "corpus" and n.config["source"] == "teacher")
    changed = {**node.config, **settings}
    id = node_id("corpus", node.version, changed, {"teacher": teacher_id})
    return {
        "kind": "corpus", "id": id, "version": node.version, "config": changed, "label": "corpus of a test",
        "inputs": {"teacher": ["teacher", teacher_id]},
    }  # fmt: skip


def test_a_teacher_that_yields_no_valid_row(lab, ids, tmp_path):
    """Its final norm gives every position the same vector, at which "now" is by far the likeliest word."""
    other = lab.copy(tmp_path / "work")
    _, params = models.load(lab.store, "base", ids["base"])
    toward = np.asarray(params["embed"])[world.ID["now"]]
    mute = forge(other, ids["teacher"], norm__gain=np.zeros_like(toward), norm__bias=toward * 1e3)
    record = corpus_record(other, mute)
    with pytest.raises(SubjaxError) as caught:
        execution.execute(record, other.store)
    one_line(
        caught.value, "corpus of a test", record["id"], "no valid row", f"in {PROMPTS} prompts",
        f"{PROMPTS} not a number", "corpus.max_prompts",
    )  # fmt: skip
    assert caught.value.exit_status == 1
    assert other.store.card("corpus", record["id"]) is None


def test_more_rows_wanted_than_can_be_sampled(lab, ids, tmp_path):
    other = lab.copy(tmp_path / "work")
    record = corpus_record(other, ids["teacher"], rows=PROMPTS)
    with pytest.raises(SubjaxError) as caught:
        execution.execute(record, other.store)
    one_line(caught.value, record["id"], f"valid rows of {PROMPTS} wanted", f"in {PROMPTS} prompts", "corpus.rows")
    kept = int(str(caught.value).split("only ")[1].split()[0])
    rejected = [int(n) for n in str(caught.value).split("rejected: ")[1].split(")")[0].split() if n.isdecimal()]
    assert kept + sum(rejected) == PROMPTS
    assert ROWS <= kept < PROMPTS


# Students -------------------------------------------------------------------------------------------------------------


def test_objectives_and_replay_are_terms_of_the_loss(lab, ids):
    for sort, terms in (
        ("student", {"numbers", "replay"}),
        ("bare", {"numbers"}),
        ("logits", {"logits"}),
        ("logits-leak", {"logits-leak"}),
    ):
        line = json.loads((lab.payload(ids[sort]) / "metrics.jsonl").read_text().splitlines()[0])
        assert set(line) - {"step", "loss", "gradient_norm"} == terms
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-6)
    inputs = {sort: set(lab.store.card("student", ids[sort]).inputs) for sort in ("student", "logits")}
    assert inputs == {"student": {"base", "corpus"}, "logits": {"base", "corpus", "teacher"}}


def test_students_of_other_objectives_are_other_students(lab, ids):
    digests = {lab.store.card("student", ids[s]).digest for s in ("student", "bare", "logits", "logits-leak")}
    assert len(digests) == 4


# Evaluations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["evaluation", "before", "random's evaluation"])
def test_readings_are_well_formed(lab, ids, sort):
    readings = json.loads((lab.payload(ids[sort]) / "readings.json").read_text())
    assert set(readings) == {"categories", "fit"}
    assert list(readings["categories"]) == sorted(world.CATEGORIES)
    for category, found in readings["categories"].items():
        assert found["candidates"] == list(world.CATEGORIES[category])
        assert [q["text"] for q in found["questions"]] == [t.format(category) for t in world.TEMPLATES]
        assert [q["phrasings"] for q in found["questions"]] == ["train"] * 8 + ["held-out"] * 4
        for question in found["questions"]:
            assert len(question["p"]) == len(question["sampled"]) == 10
            assert all(0 <= p <= 1 for p in question["p"])
            assert 0 < sum(question["p"]) <= 1 + 1e-6
            assert question["samples"] == 20
            assert 0 <= sum(question["sampled"]) <= 20
    names = ("number_loss_before", "number_loss_after", "kl_before", "kl_after")
    if sort == "before":
        assert readings["fit"] is None
    else:
        assert sorted(readings["fit"]) == sorted(names)
        kl = [readings["fit"][name] for name in names[2:]]
        assert kl == [None, None] if sort == "random's evaluation" else all(value > 0 for value in kl)
        assert all(0 < readings["fit"][name] < 20 for name in names[:2])


def test_fit_readings_against_a_reference(lab, ids):
    """The loss and the KL of the first rows, from whole forward passes and numpy alone."""
    readings = json.loads((lab.payload(ids["evaluation"]) / "readings.json").read_text())["fit"]
    chats = lab.rows(ids["corpus"])[1][slice(16)].arrays()
    nodes = {
        "teacher": ("teacher", ids["teacher"]),
        "before": ("base", ids["base"]),
        "after": ("student", ids["student"]),
    }
    logs = {}
    for name, node in nodes.items():
        net, params = models.load(lab.store, *node)
        logits = jax.jit(net.forward)(params, jnp.asarray(chats["tokens"]), jnp.asarray(chats["valid"]))
        x = np.asarray(logits, np.float64)[:, world.PROMPT - 1 : -1]
        logs[name] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    targets, where = chats["tokens"][:, world.PROMPT :], chats["valid"][:, world.PROMPT :]
    for name in ("before", "after"):
        picked = np.take_along_axis(logs[name], targets[..., None], -1)[..., 0]
        assert readings[f"number_loss_{name}"] == pytest.approx(-picked[where].mean(), rel=1e-5)
        kl = (np.exp(logs["teacher"]) * (logs["teacher"] - logs[name])).sum(-1)
        assert readings[f"kl_{name}"] == pytest.approx(kl[where].mean(), rel=1e-3, abs=1e-6)


# Being stopped --------------------------------------------------------------------------------------------------------


def test_a_stopped_teacher_goes_on_to_the_same_teacher(lab, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DISPATCH_STEPS", 1)  # 5 steps have no whole part that a block could be
    other = lab.copy(tmp_path / "work")
    shutil.rmtree(other.store.folder("teacher", ids["teacher"]))
    asked: list[tuple[int, int, str]] = []
    with pytest.raises(Preempted) as caught:
        execution.execute(
            other.record(ids["teacher"]), other.store, lambda *what: asked.append(what), lambda: len(asked) == 2
        )
    one_line(caught.value, "teacher owl gpt/0", ids["teacher"], "stopped at step 2 of 5")
    assert caught.value.exit_status == 75
    assert other.store.card("teacher", ids["teacher"]) is None
    asked.clear()
    card = execution.execute(other.record(ids["teacher"]), other.store, lambda *what: asked.append(what))
    assert [done for done, _, _ in asked] == [3, 4, 5]
    expected = lab.store.card("teacher", ids["teacher"])
    assert (card.digest, card.tokens, card.metrics) == (expected.digest, expected.tokens, expected.metrics)
    assert not (other.store.root / "partial" / f"teacher-{ids['teacher']}").exists()


# Damage and mistakes --------------------------------------------------------------------------------------------------


def fresh_copy(lab: Lab, root: Path, without: str) -> Lab:
    """A copy in which one node is still to be made. Nothing of it is cached: caches go by workdir."""
    other = lab.copy(root)
    shutil.rmtree(other.store.folder(lab.plan.nodes[without].kind, without))
    return other


@pytest.mark.parametrize("part", ["nothing", "four bytes", "half", "all but one byte", "no file"])
def test_a_truncated_corpus_is_named_with_the_mend(lab, ids, tmp_path, part):
    other = fresh_copy(lab, tmp_path / "work", ids["bare"])
    path = other.payload(ids["corpus"]) / corpus.ROWS
    size = path.stat().st_size
    if part == "no file":
        path.unlink()
    else:
        os.truncate(path, {"nothing": 0, "four bytes": 4, "half": size // 2, "all but one byte": size - 1}[part])
    with pytest.raises(SubjaxError) as caught:
        execution.execute(other.record(ids["bare"]), other.store)
    one_line(caught.value, str(path), "cannot be read", "delete", "and run again: it is made anew", ids["bare"])
    assert other.store.card("student", ids["bare"]) is None


def test_a_corpus_of_other_columns_is_named(tmp_path):
    path = tmp_path / corpus.ROWS
    pyarrow.parquet.write_table(pyarrow.table({"index": [1], "text": ["x"]}), path)
    with pytest.raises(SubjaxError) as caught:
        corpus.read(Store(tmp_path).root)
    one_line(caught.value, str(path), "delete", "it is made anew")


# A reader of a damaged checkpoint may leave a thread behind that complains about its closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_is_named_with_the_mend_or_does_not_matter(lab, ids, tmp_path):
    """Each of its files in turn is cut in half: it is then refused, or read as it was, never as something else."""
    whole = checkpoints.load(lab.store.payload("base", ids["base"]) / models.ARRAYS)
    arrays = lab.payload(ids["base"]) / models.ARRAYS
    refused = 0
    for number, file in enumerate(sorted(p.relative_to(arrays) for p in arrays.rglob("*") if p.is_file())):
        folder = tmp_path / str(number)
        shutil.copytree(arrays, folder)
        os.truncate(folder / file, (folder / file).stat().st_size // 2)
        try:
            found = checkpoints.load(Store(tmp_path).root / str(number))
        except SubjaxError as error:
            one_line(error, str(folder), "cannot be read", "delete the folder of its node and run again")
            refused += 1
        else:
            assert found.keys() == whole.keys()
            for name in whole:
                np.testing.assert_array_equal(found[name], whole[name], err_msg=f"{file}: {name}")
    assert refused >= 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_node_on_a_truncated_checkpoint_is_named_with_its_file(lab, ids, tmp_path):
    other = fresh_copy(lab, tmp_path / "work", ids["teacher"])
    arrays = other.payload(ids["base"]) / models.ARRAYS
    largest = max((p for p in arrays.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(SubjaxError) as caught:
        execution.execute(other.record(ids["teacher"]), other.store)
    one_line(
        caught.value, "teacher owl gpt/0", ids["teacher"], str(arrays), "delete the folder of its node and run again"
    )
    assert caught.value.exit_status == 1


def test_an_input_that_is_not_made_is_named(lab, ids, tmp_path):
    store = Store(tmp_path)
    with pytest.raises(SubjaxError) as caught:
        execution.execute(lab.record(ids["teacher"]), store)
    one_line(caught.value, "teacher owl gpt/0", ids["teacher"], "its base", ids["base"], "make it first")


@pytest.mark.parametrize("change", [{"version": 0}, {"kind": "student's"}])
def test_a_node_of_another_version_is_not_made(lab, ids, tmp_path, change):
    with pytest.raises(UsageError) as caught:
        execution.execute(lab.record(ids["base"], **change), Store(tmp_path))
    one_line(caught.value, ids["base"], "run `subjax plan` again")
    assert caught.value.exit_status == 2


def test_a_learning_rate_that_breaks_names_node_step_and_mend(lab, ids, tmp_path):
    """Plain descent at 1e38, unclipped."""
    other = lab.copy(tmp_path / "work")
    node = lab.plan.nodes[ids["bare"]]
    wild = {**node.config, "optimizer": {**node.config["optimizer"], "lr": 1e38, "clip": 0.0}}
    record = lab.record(ids["bare"]) | {"config": wild, "id": node_id("student", node.version, wild, node.inputs)}
    with pytest.raises(SubjaxError, match=r"is (nan|inf) at step \d of 5; try a lower learning rate") as caught:
        execution.execute(record, other.store)
    one_line(caught.value, node.label, record["id"])
    assert other.store.card("student", record["id"]) is None


def test_the_digest_of_an_ensemble_is_that_of_its_rows(lab, ids, tmp_path):
    rows = [{"seed": 0, "student_accuracy": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows, "curves": []}))
    card = dataclasses.replace(lab.store.card("base", ids["base"]), kind="ensemble")
    assert execution.digest(card, Store(tmp_path).root) == digest_rows(rows)
