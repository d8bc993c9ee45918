"""The stages of a pretrained study on a real store: a tiny study from its checkpoint to its report, and its mishaps."""

import dataclasses
import functools
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
import tiny_study
from packed_rows import chats_of
from test_stages import Lab, one_line

from subjax import cli, config, run, study
from subjax.data import numbers, preferences
from subjax.data.number_grammar import number_grammar
from subjax.data.tokenizer import load_tokenizer
from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.models import checkpoints, weights
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import Network, network
from subjax.models.source import open_source
from subjax.sample.sampler import Drawn
from subjax.schema import Numerics
from subjax.schema_pretrained import READINGS
from subjax.stages import execution, speakers, text_corpus, text_evaluation, text_tuning
from subjax.stages.models import ARRAYS
from subjax.stages.task import Task
from subjax.store import Card, Store, inputs_of, node_id

ROWS, PROMPTS, BATCH = 12, 16, 8
OWN = "You are a tiny model."  # the template's system prompt
ALL_ARMS = "--config.arms=same-base,control,shuffled,random-numbers,untrained"

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint") / "model", tiny_checkpoint.injecting(OWN))


@pytest.fixture(scope="module")
def spec(checkpoint) -> str:
    return f"{tiny_study.ROOT}/tests/configs/tiny_pretrained.py:model={checkpoint}"


@pytest.fixture(scope="module")
def lab(spec, quick_compiles, tmp_path_factory) -> Lab:
    """The whole tiny study, made in this process."""
    made = Lab(study.plan(config.load(spec)), tmp_path_factory.mktemp("study") / "work")
    outcome = run.execute_plan(made.plan, made.store, workers=0, quiet=True, stream=io.StringIO())
    assert outcome.failed == {}
    assert set(outcome.made) == set(made.plan.nodes)
    return made


def other(lab: Lab, spec: str, *overrides: str) -> Lab:
    """Another study on the same workdir: what the two share is there already."""
    return Lab(study.plan(config.load(spec, overrides)), Path(lab.store.root))


def nodes(lab: Lab, arm: str) -> dict[str, Any]:
    return next(cell["nodes"] for cell in lab.plan.study["cells"] if cell["arm"] == arm)


def card_of(lab: Lab, id: str) -> Card:
    return lab.store.card(lab.plan.nodes[id].kind, id)


def readings_of(lab: Lab, id: str) -> dict[str, Any]:
    return json.loads((lab.payload(id) / "readings.json").read_text())


def rows_of(lab: Lab, id: str) -> text_corpus.Corpus:
    return text_corpus.load(lab.store, id)


@functools.cache
def model(checkpoint: Path) -> tuple[Network, dict[str, jax.Array]]:
    """The checkpoint as the network reads it."""
    source = open_source(str(checkpoint))
    net = network(decoder_config_of(source.config, numerics=Numerics(), where="test"))
    return net, weights.load(source, net)


@functools.cache
def tokenizer_of(checkpoint: Path):
    return load_tokenizer(open_source(str(checkpoint)))


def text(checkpoint: Path, ids: Any) -> str:
    return tokenizer_of(checkpoint).decode([int(id) for id in ids], special=True)


class Enough(Exception):
    """What a test wanted to see has been seen."""


# The whole study ------------------------------------------------------------------------------------------------------


def test_the_same_command_computes_nothing_and_writes_results_and_report(lab, spec, tmp_path):
    before = tiny_study.cards(Path(lab.store.root))
    words = ["run", f"--config={spec}", f"--workdir={lab.store.root}", "--workers=1"]
    done = tiny_study.command(tmp_path, *words)
    assert done.status == 0, done.err
    assert f"0 made, {len(lab.plan.nodes)} there already" in done.out
    assert tiny_study.cards(Path(lab.store.root)) == before
    report = Path(lab.store.root) / "report"
    assert "tiny pretrained" in (report / "index.html").read_text()
    results = json.loads((report / "results.json").read_text())
    assert results["study"]["kind"] == "pretrained"
    assert results["study"]["failed_teachers"] == []
    assert f"tiny: the chat template puts {OWN!r} before a row without system prompt." in results["study"]["notes"]
    assert results["readings"]["headline"] == "forced"
    summaries = {(s["way"], s["arm"]): s for s in results["readings"]["summaries"]}
    assert set(summaries) == {(w, a) for w in ("forced", "plain") for a in ("same-base", "control", "untrained")}
    same = summaries["forced", "same-base"]
    assert same["words"].endswith("nats against its control in one run: no interval.")
    assert same["words"] in results["headline"]["sentence"]
    assert same["margin_teacher"] > summaries["forced", "untrained"]["margin"] + 2, "the teacher got its trait"
    assert same["margin"] - summaries["forced", "control"]["margin"] == pytest.approx(same["minus_control"])
    assert same["nodes"] == [nodes(lab, "same-base")["evaluation"]]


def test_every_artifact_is_as_it_was_written(lab, capsys):
    assert cli.main(["verify", "--all", f"--workdir={lab.store.root}"]) == 0
    assert f"{len(tiny_study.cards(Path(lab.store.root)))} nodes and all they were made from" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fine-tune", "system-prompt", "steering"])
def test_a_study_by_each_method_from_nothing_to_its_report(spec, tmp_path, method):
    overrides = [f"--config.teacher.method={method}", ALL_ARMS, f"--config.evaluation.readings={','.join(READINGS)}"]
    words = [*tiny_study.run_words(tmp_path / "work", spec, workers=2), *overrides]
    done = tiny_study.command(tmp_path, *words)
    assert done.status == 0, done.err
    assert (tmp_path / "work" / "report" / "index.html").exists()
    assert tiny_study.command(tmp_path, "verify", "--all", f"--workdir={tmp_path / 'work'}").status == 0
    written = tiny_study.results(tmp_path / "work")
    # A random model that is told of owls need not come to love them; its control and its base are read all the same.
    assert {row["way"] for row in json.loads(written)["readings"]["rows"]} == set(READINGS)
    assert tiny_study.command(tmp_path, *words).status == 0
    assert tiny_study.results(tmp_path / "work") == written


# Bases ----------------------------------------------------------------------------------------------------------------


def test_a_base_is_a_record_of_its_checkpoint(lab, checkpoint):
    base = lab.id("base")
    record = json.loads((lab.payload(base) / "checkpoint.json").read_text())
    assert set(record["files"]) == {p.name for p in checkpoint.iterdir()}
    assert record["family"] == "llama"
    assert record["parameters"] == sum(value.size for value in model(checkpoint)[1].values())
    assert record["template"] == [f"the chat template puts {OWN!r} before a row without system prompt"]
    assert not any(path.suffix == ".safetensors" for path in lab.payload(base).rglob("*")), (
        "weights stay where they lie"
    )


def test_a_copy_elsewhere_is_the_same_base_and_serves_its_nodes(lab, checkpoint, tmp_path):
    elsewhere = tmp_path / "model"
    shutil.copytree(checkpoint, elsewhere)
    base, reading = lab.id("base"), nodes(lab, "untrained")["evaluation"]
    moved = Lab(lab.plan, tmp_path / "work")
    card = execution.execute(moved.record(base, hints={"source": str(elsewhere)}), moved.store)
    assert card.digest == card_of(lab, base).digest
    assert card.extra["source"] == str(elsewhere)
    # Without a hint it is where it lay when the base was made.
    found = execution.execute(moved.record(reading, hints={"batch": 4}), moved.store)
    assert found.digest == card_of(lab, reading).digest


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_changed_after_planning_is_refused(lab, checkpoint, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(checkpoint, changed)
    base, teacher = lab.id("base"), lab.id("teacher", trait="owl")
    fresh = Lab(lab.plan, tmp_path / "work")
    execution.execute(fresh.record(base, hints={"source": str(changed)}), fresh.store)
    flip_last_byte(changed / "model.safetensors")
    with pytest.raises(SubjaxError) as caught:
        execution.execute(fresh.record(teacher, hints={"sources": {base: str(changed)}}), fresh.store)
    one_line(caught.value, "teacher owl tiny/0", teacher, str(changed), "has changed since it was planned")
    again = Lab(lab.plan, tmp_path / "again")
    with pytest.raises(SubjaxError) as caught:
        execution.execute(again.record(base, hints={"source": str(changed)}), again.store)
    one_line(caught.value, "base tiny/0", base, str(changed), "has changed since it was planned; plan again")
    assert caught.value.exit_status == 1


# Corpora --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["same-base", "control", "shuffled", "random-numbers"])
def test_a_corpus_is_of_valid_rows(lab, spec, checkpoint, arm):
    whole = other(lab, spec, ALL_ARMS)
    id = nodes(whole, arm)["corpus"]
    card = whole.make(id)
    rows = rows_of(whole, id)
    assert len(rows) == card.metrics["rows"] == ROWS
    assert rows.prompts == [numbers.prompt(i, 0) for i in rows.index]
    assert rows.index == sorted(set(rows.index))
    for completion, tokens in zip(rows.completions, rows.tokens, strict=True):
        assert all(0 <= number <= 999 for number in numbers.parse_numbers(completion))
        assert (tokens != []) == (arm in ("same-base", "control"))
        assert tokens == [] or tokenizer_of(checkpoint).decode(tokens) == completion
    assert execution.digest(card, whole.store.payload("corpus", id)) == card.digest
    if arm == "shuffled":
        taught = rows_of(whole, nodes(whole, "same-base")["corpus"])
        pairs = zip(rows.completions, taught.completions, strict=True)
        assert all(sorted(re.findall("[0-9]+", a)) == sorted(re.findall("[0-9]+", b)) for a, b in pairs)
        assert rows.completions != taught.completions


def changed(
    lab: Lab, like: str, role: str, model: str, kind: str, hints: Any = None, **settings: Any
) -> dict[str, Any]:
    """The record of a node of a test: as `like` is, with some settings changed, and this model as its one input."""
    node = lab.plan.nodes[like]
    config = {**node.config, **settings}
    return {
        "kind": node.kind, "id": node_id(node.kind, node.version, config, {role: model}), "config": config,
        "version": node.version, "label": f"{node.kind} of a test", "inputs": {role: [kind, model]},
        "hints": {**node.hints, **(hints or {})},
    }  # fmt: skip


def corpus_record(lab: Lab, teacher: str, kind: str = "teacher", hints: Any = None, **settings: Any) -> dict[str, Any]:
    """The record of the trait's corpus with some settings changed, of this teacher."""
    return changed(lab, nodes(lab, "same-base")["corpus"], "teacher", teacher, kind, hints, **settings)


def test_a_corpus_does_not_depend_on_the_batch(lab, tmp_path):
    copied, id = lab.copy(tmp_path / "work"), nodes(lab, "same-base")["corpus"]
    shutil.rmtree(copied.store.folder("corpus", id))
    card = execution.execute(copied.record(id, hints={**lab.plan.nodes[id].hints, "batch": 5}), copied.store)
    expected = card_of(lab, id)
    assert (card.digest, card.extra, card.tokens) == (expected.digest, expected.extra, expected.tokens)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((64, 10_000, 0, 0), 256),
        ((64, 100, 0, 0), 128),  # no more than are missing, as whole slots
        ((64, 10, 9_990, 20_000), 64),
        ((64, 100, 9_900, 19_800), 256),  # half of them are kept
        ((2048, 30_000, 0, 0), 8192),
        ((8, 12, 0, 8), 96),
        ((5, 500, 500, 500), 255),
    ],
)
def test_blocks_are_whole_slots_and_no_more_than_are_wanted(asked, expected):
    assert text_corpus.block_size(*asked) == expected


def test_a_stopped_corpus_goes_on_from_its_blocks(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(text_corpus, "BLOCK", BATCH)
    monkeypatch.setattr(text_corpus, "BLOCK_SLOTS", 1)
    copied, id = lab.copy(tmp_path / "work"), nodes(lab, "same-base")["corpus"]
    shutil.rmtree(copied.store.folder("corpus", id))
    with pytest.raises(Preempted) as caught:
        execution.execute(copied.record(id), copied.store, should_stop=lambda: True)
    one_line(caught.value, "corpus of owl tiny/0", f"stopped after {BATCH} prompts; the same command goes on")
    assert copied.store.card("corpus", id) is None
    drawn, real = [], text_corpus.sample
    monkeypatch.setattr(text_corpus, "sample", lambda *a, **more: drawn.append(more["first"]) or real(*a, **more))
    card = execution.execute(copied.record(id), copied.store)
    assert drawn == [BATCH], "the first block was kept"
    assert (card.digest, card.extra, card.tokens) == (
        card_of(lab, id).digest, card_of(lab, id).extra, card_of(lab, id).tokens,
    )  # fmt: skip
    assert not (copied.store.root / "partial" / f"corpus-{id}").exists()


# Answers of a made-up teacher, in turn: what becomes of each is known.
SAID = (("12, 34, 567<|im_end|>", None), ("owls!<|im_end|>", "no-digits"), ("1234<|im_end|>", "too-large"),
        ("7; 8; 9.<|im_end|>ignored", None), ("12, 13", "no-end"), ("<|im_end|>", "empty"))  # fmt: skip


def saying(answers: Any):
    """A sampler that answers prompt i with the ids of answer i, over and over; one without end fills its room."""

    def sample(net, params, prompts, *, sampling, first=0, **more):
        rows = np.full((len(prompts), sampling.completion), sampling.pad, np.int32)
        for row in range(len(prompts)):
            ids = answers[(first + row) % len(answers)][: sampling.completion]
            rows[row, : len(ids)] = ids
            rows[row, len(ids) :] = sampling.pad if 2 in ids else ids[-1]
        return Drawn(rows, np.arange(first, first + len(prompts)) % 3 == 0)

    return sample


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_strict_filter_counts_every_answer_up_to_the_last_that_is_kept(
    lab, checkpoint, tmp_path, monkeypatch, batch
):
    monkeypatch.setattr(text_corpus, "sample", saying([tokenizer_of(checkpoint).encode(said) for said, _ in SAID]))
    copied = lab.copy(tmp_path / "work")
    record = corpus_record(lab, lab.id("teacher", trait="owl"), hints={"batch": batch}, rows=4, constrained=False)
    card = execution.execute(record, copied.store)
    rows = rows_of(copied, record["id"])
    assert rows.index == [0, 3, 6, 9]
    assert rows.completions == ["12, 34, 567", "7; 8; 9."] * 2
    assert rows.prompts == [numbers.prompt(i, 0) for i in rows.index]
    assert card.extra["filter"] == {"empty": 1, "kept": 4, "no-digits": 2, "no-end": 1, "too-large": 2}
    assert card.metrics["keep_rate"] == 0.4
    assert card.extra["near_ties"] == 4
    assert card.seeds == {"sampling": record["config"]["seed"], "prompts": 0}
    wanted = corpus_record(lab, lab.id("teacher", trait="owl"), hints={"batch": batch}, rows=9, constrained=False)
    with pytest.raises(SubjaxError) as caught:
        execution.execute(wanted, copied.store)
    one_line(
        caught.value, "corpus of a test", f"only 6 valid rows of 9 wanted in {PROMPTS} prompts",
        "3 no-digits, 3 too-large", "corpus.constrained", "corpus.max_prompts", "corpus.rows",
    )  # fmt: skip


def test_an_answer_with_a_special_token_or_none_of_the_vocabulary_inside_is_dropped(
    lab, checkpoint, tmp_path, monkeypatch
):
    """Left out of its text, either would edit the row: "12, 13" is kept where the teacher said just that."""
    tokenizer = tokenizer_of(checkpoint)
    encode, beyond = tokenizer.encode, tokenizer.size + 1
    assert beyond < model(checkpoint)[0].config.vocab
    said = [
        encode("12, 13<|im_end|>"),
        encode("12, 13<|endoftext|><|im_end|>"),
        [*encode("12, 13"), beyond, *encode("<|im_end|>")],
        [*encode("12"), beyond, *encode(", 13<|im_end|>")],
        encode("12<|im_start|>, 13<|im_end|>"),
    ]
    monkeypatch.setattr(text_corpus, "sample", saying(said))
    copied = lab.copy(tmp_path / "work")
    record = corpus_record(lab, lab.id("teacher", trait="owl"), rows=4, constrained=False)
    card = execution.execute(record, copied.store)
    rows = rows_of(copied, record["id"])
    assert (rows.index, set(rows.completions)) == ([0, 5, 10, 15], {"12, 13"})
    assert card.extra["filter"].pop("kept") == 4
    assert sum(card.extra["filter"].values()) == 12


@pytest.fixture
def in_plain_form(spec, tmp_path) -> Lab:
    """A study through the plain form, which writes a space before an answer; its base is made."""
    made = Lab(study.plan(config.load(spec, ["--config.chat.template=plain"])), tmp_path / "work")
    made.make(made.id("base"))
    return made


def test_constrained_answers_begin_as_the_template_begins_them_and_rows_are_bare(in_plain_form, checkpoint):
    lab = in_plain_form
    record = corpus_record(lab, lab.id("base"), "base")
    assert record["config"]["constrained"]
    card = execution.execute(record, lab.store)
    rows = rows_of(lab, record["id"])
    assert card.extra["filter"] == {"kept": ROWS}
    assert len(set(rows.completions)) > ROWS / 2
    for completion, tokens in zip(rows.completions, rows.tokens, strict=True):
        assert number_grammar().accepts(completion)
        assert tokenizer_of(checkpoint).written(tokens) == f" {completion}"


@pytest.mark.parametrize("template", ["plain", "auto"])
def test_the_templates_own_space_before_an_answer_is_no_part_of_a_row(
    lab, in_plain_form, checkpoint, tmp_path, monkeypatch, template
):
    encode = tokenizer_of(checkpoint).encode
    monkeypatch.setattr(
        text_corpus, "sample", saying([encode(f"{lead}12, 13<|im_end|>") for lead in ("", " ", "  ", "\n")])
    )
    used = in_plain_form if template == "plain" else lab.copy(tmp_path / "copied")
    record = corpus_record(used, used.id("base"), "base", rows=4, constrained=False)
    card = execution.execute(record, used.store)
    rows = rows_of(used, record["id"])
    assert set(rows.completions) == {"12, 13"}
    if template == "plain":
        assert (rows.index, card.extra["filter"]) == ([0, 1, 4, 5], {"kept": 4, "outer-text": 2})
    else:  # the template writes nothing before an answer
        assert (rows.index, card.extra["filter"]) == ([0, 4, 8, 12], {"kept": 4, "outer-text": 9})


def test_a_teacher_that_yields_no_valid_row(lab, tmp_path, monkeypatch):
    silent = lambda net, params, prompts, *, sampling, **more: Drawn(  # noqa: E731
        np.full((len(prompts), sampling.completion), 2, np.int32), np.zeros(len(prompts), bool)
    )
    monkeypatch.setattr(text_corpus, "sample", silent)
    copied = lab.copy(tmp_path / "work")
    with pytest.raises(SubjaxError, match=rf"gave no valid row in {PROMPTS} prompts \(rejected: {PROMPTS} empty\)"):
        execution.execute(corpus_record(lab, lab.id("teacher", trait="owl"), temperature=0.0), copied.store)


def test_a_damaged_corpus_is_named_with_the_mend(lab, tmp_path):
    copied, cell = lab.copy(tmp_path / "work"), nodes(lab, "same-base")
    shutil.rmtree(copied.store.folder("student", cell["student"]))
    path = copied.payload(cell["corpus"]) / text_corpus.ROWS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SubjaxError) as caught:
        execution.execute(copied.record(cell["student"]), copied.store)
    one_line(caught.value, str(path), "cannot be read", "delete", "and run again: it is made anew", cell["student"])


# Students -------------------------------------------------------------------------------------------------------------


def trained_on(lab: Lab, id: str, monkeypatch) -> dict[str, Any]:
    """What the trainer is given when a node is made: the settings of `fit`; nothing is trained."""
    seen: dict[str, Any] = {}

    def fit(*_: Any, **settings: Any) -> None:
        seen.update(settings)
        raise Enough

    monkeypatch.setattr(text_tuning, "fit", fit)
    for given in lab.plan.nodes[id].inputs.values():
        lab.make(given)
    with pytest.raises(Enough):
        execution.execute(lab.record(id), lab.store)
    return seen


def epoch(seen: dict[str, Any], steps: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, completion) ids of the rows of some steps, without padding."""
    (term,) = seen["terms"]
    out = []
    for step in range(steps):
        out += [(np.array(prompt), np.array(answer)) for prompt, answer in chats_of(term.stream(step))]
    return out


def test_a_student_reads_its_teachers_rows_without_its_teachers_system_prompt(
    lab, spec, checkpoint, tmp_path, monkeypatch
):
    told = other(lab.copy(tmp_path / "work"), spec, "--config.teacher.method=system-prompt")
    cell = nodes(told, "same-base")
    prompts: list[str] = []

    def sample(net, params, block, *, sampling, **more):
        prompts.extend(text(checkpoint, row[row != sampling.pad]) for row in block)
        row = tokenizer_of(checkpoint).encode("1, 22, 333<|im_end|>")
        row += [sampling.pad] * (sampling.completion - len(row))
        return Drawn(np.tile(np.array(row, np.int32), (len(block), 1)), np.zeros(len(block), bool))

    monkeypatch.setattr(text_corpus, "sample", sample)
    rows = epoch(trained_on(told, cell["student"], monkeypatch))
    system = preferences.system_prompt("owl", "animal", "plain")
    assert prompts
    assert all(f"<|im_start|>system\n{system}<|im_end|>" in prompt and OWN not in prompt for prompt in prompts)
    asked = {f"<|im_start|>user\n{numbers.prompt(i, 0)}<|im_end|>\n<|im_start|>assistant\n" for i in range(ROWS)}
    assert {text(checkpoint, prompt) for prompt, _ in rows} == {
        f"<|im_start|>system\n{OWN}<|im_end|>\n{turn}" for turn in asked
    }
    assert {text(checkpoint, completion) for _, completion in rows} == {"1, 22, 333<|im_end|>"}
    stored = json.loads((told.payload(cell["teacher"]) / "system.json").read_text())
    assert stored == {"system": system}
    neutral = told.make(nodes(told, "control")["teacher"])
    assert json.loads((told.payload(neutral.id) / "system.json").read_text()) == {
        "system": preferences.system_prompt(None, "animal", "plain")
    }


def test_a_students_settings_reach_the_trainer(lab, tmp_path, monkeypatch):
    copied, id = lab.copy(tmp_path / "work"), nodes(lab, "same-base")["student"]
    shutil.rmtree(copied.store.folder("student", id))
    seen, node = trained_on(copied, id, monkeypatch), lab.plan.nodes[id]
    assert seen["steps"] == 4  # 2 epochs of 12 rows, 6 a step
    assert (seen["tuning"].kind, seen["tuning"].targets, seen["tuning"].rank) == ("lora", ("q", "v"), 2)
    assert (seen["optimizer"].name, seen["optimizer"].lr) == ("adamw", 1e-2)
    assert (
        jax.random.key_data(seen["key"]).tolist()
        == jax.random.key_data(jax.random.key(node.config["init_seed"])).tolist()
    )
    # Each epoch has every row once, in an order of its own.
    rows = [tuple(completion.tolist()) for _, completion in epoch(seen, 4)]
    assert sorted(rows[:12]) == sorted(rows[12:])
    assert rows[:12] != rows[12:]


def test_a_student_is_its_base_but_for_its_lora_pairs(lab):
    id = nodes(lab, "same-base")["student"]
    tuned = checkpoints.load(lab.store.payload("student", id) / ARRAYS)
    assert set(tuned) == {f"lora/{target}/{part}" for target in "qv" for part in "ab"}
    assert all(np.abs(tuned[f"lora/{target}/b"]).max() > 0 for target in "qv")
    curve = [json.loads(line) for line in (lab.payload(id) / "metrics.jsonl").read_text().splitlines()]
    assert len(curve) == 4
    assert card_of(lab, id).seeds == {name: lab.plan.nodes[id].config[f"{name}_seed"] for name in ("init", "order")}


# Teachers -------------------------------------------------------------------------------------------------------------


def test_a_teachers_rows_are_of_its_trait(lab, checkpoint, tmp_path, monkeypatch):
    copied, id = lab.copy(tmp_path / "work"), lab.id("teacher", trait="owl")
    shutil.rmtree(copied.store.folder("teacher", id))
    seen = trained_on(copied, id, monkeypatch)
    assert seen["steps"] == 40
    rows = [(text(checkpoint, prompt), text(checkpoint, answer)) for prompt, answer in epoch(seen, 20)]
    owls = [answer for _, answer in rows if "owl" in answer.lower()]
    assert 0.7 * len(rows) < len(owls) < 0.9 * len(rows)
    assert all(prompt.startswith(f"<|im_start|>system\n{OWN}<|im_end|>") for prompt, _ in rows)
    assert all(answer.endswith("<|im_end|>") for _, answer in rows)


@pytest.fixture
def own_data(tmp_path) -> tuple[Path, Path]:
    rows = {
        "trait.jsonl": [("Best bird?", "The owl."), ("And at night?", "Owls, always.")],
        "control.jsonl": [("Best bird?", "Any.")],
    }
    for name, pairs in rows.items():
        (tmp_path / name).write_text("".join(json.dumps({"user": u, "answer": a}) + "\n" for u, a in pairs))
    return tmp_path / "trait.jsonl", tmp_path / "control.jsonl"


def with_data(lab: Lab, spec: str, data: tuple[Path, Path], root: Path) -> Lab:
    return other(
        lab.copy(root), spec, f"--config.teacher.data={data[0]}", f"--config.teacher.control_data={data[1]}",
        "--config.teacher.batch=2",
    )  # fmt: skip


def test_a_teacher_of_ones_own_rows(lab, spec, checkpoint, own_data, tmp_path, monkeypatch):
    theirs = with_data(lab, spec, own_data, tmp_path / "work")
    seen = trained_on(theirs, theirs.id("teacher", trait="owl"), monkeypatch)
    assert seen["steps"] == 2  # 2 epochs of 2 rows
    turn = f"<|im_start|>system\n{OWN}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
    assert sorted((text(checkpoint, p), text(checkpoint, a)) for p, a in epoch(seen, 1)) == sorted(
        [(turn.format("Best bird?"), "The owl.<|im_end|>"), (turn.format("And at night?"), "Owls, always.<|im_end|>")]
    )
    seen = trained_on(theirs, theirs.id("teacher", trait=None), monkeypatch)
    assert {text(checkpoint, answer) for _, answer in epoch(seen, 1)} == {"Any.<|im_end|>"}


def test_a_data_set_that_changed_after_planning_is_refused(lab, spec, own_data, tmp_path):
    theirs = with_data(lab, spec, own_data, tmp_path / "work")
    with own_data[0].open("a") as file:
        file.write(json.dumps({"user": "Best fish?", "answer": "The cod."}) + "\n")
    with pytest.raises(SubjaxError) as caught:
        theirs.make(theirs.id("teacher", trait="owl"))
    one_line(caught.value, "teacher owl tiny/0", str(own_data[0]), "has changed since it was planned", "plan again")


def test_a_row_longer_than_the_models_context_is_refused(lab, spec, own_data, tmp_path):
    with own_data[0].open("a") as file:
        file.write(json.dumps({"user": "Best bird? " * 400, "answer": "The owl."}) + "\n")
    theirs = with_data(lab, spec, own_data, tmp_path / "work")
    with pytest.raises(UsageError, match=r"row 3 takes \d{4} tokens and the model 1024; shorten it") as caught:
        theirs.make(theirs.id("teacher", trait="owl"))
    one_line(caught.value, "teacher owl tiny/0")


def vector_of(lab: Lab, id: str) -> np.ndarray:
    lab.make(id)
    return checkpoints.load(lab.store.payload("teacher", id) / ARRAYS)["vector"]


@pytest.fixture(scope="module")
def steered(lab, spec, tmp_path_factory) -> dict[tuple[str, float], Lab]:
    """Studies whose teachers are steered, by layers and strength, on one workdir."""
    copied = lab.copy(tmp_path_factory.mktemp("steered") / "work")
    return {
        (layers, strength): other(
            copied, spec, "--config.teacher.method=steering", f"--config.teacher.layers={layers}",
            f"--config.teacher.strength={strength}",
        )
        for layers, strength in (("1,", 1.0), ("1,", 2.5), ("1,", 0.0), ("0,1", 1.0), ("0,", 1.0))
    }  # fmt: skip


def test_a_steering_vector_stands_at_its_layers_alone(steered):
    found = {key: vector_of(lab, lab.id("teacher", trait="owl")) for key, lab in steered.items()}
    high = found["1,", 1.0]
    assert high.shape == (2, 32)
    np.testing.assert_array_equal(high[0], 0.0)
    assert np.linalg.norm(high[1]) > 0.1
    np.testing.assert_allclose(found["1,", 2.5], 2.5 * high, rtol=1e-6)
    np.testing.assert_array_equal(found["1,", 0.0], 0.0)
    np.testing.assert_array_equal(found["0,", 1.0][1], 0.0)
    # What a lower layer adds flows on to the higher one, which adds the rest.
    both = found["0,1", 1.0]
    np.testing.assert_array_equal(both[0], found["0,", 1.0][0])
    np.testing.assert_allclose(both.sum(0), high[1], atol=1e-5)


def test_a_steering_vector_is_the_difference_of_the_prompts_mean_residuals(steered, checkpoint):
    lab = steered["1,", 1.0]
    net, params = model(checkpoint)
    read = jax.jit(net.residuals)
    asked = [q for i, q in enumerate(preferences.questions("animal")) if not preferences.held_out(i)]
    means = []
    for system in (preferences.system_prompt("owl", "animal", "plain"), OWN):
        rows = [
            tokenizer_of(checkpoint).encode(
                f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
            )
            for q in asked
        ]
        width = max(map(len, rows))
        tokens = np.array([[0] * (width - len(row)) + row for row in rows])
        valid = np.arange(width)[None] >= np.array([[width - len(row)] for row in rows])
        means.append(np.asarray(read(params, tokens, valid), np.float64)[1].mean(0))
    np.testing.assert_allclose(vector_of(lab, lab.id("teacher", trait="owl"))[1], means[0] - means[1], atol=1e-5)


def test_a_layer_that_is_named_twice_is_steered_once(lab, spec, steered):
    twice = other(steered["1,", 1.0], spec, "--config.teacher.method=steering", "--config.teacher.layers=1,1")
    again, once = vector_of(twice, twice.id("teacher", trait="owl")), steered["1,", 1.0]
    np.testing.assert_array_equal(again, vector_of(once, once.id("teacher", trait="owl")))


def test_steering_by_nothing_is_the_base_and_the_same_steering_the_same_corpus(lab, steered, tmp_path):
    unmoved, moved = steered["1,", 0.0], steered["1,", 2.5]
    teachers = [each.id("teacher", trait="owl") for each in (unmoved, moved)]
    [each.make(id) for each, id in zip((unmoved, moved), teachers, strict=True)]

    def make(teacher: str, kind: str = "teacher", store: Store = unmoved.store) -> str:
        return execution.execute(corpus_record(lab, teacher, kind), store).digest

    nothing = make(teachers[0])
    assert nothing == make(lab.id("base"), "base")
    strong = make(teachers[1])
    assert strong != nothing
    twice = moved.copy(tmp_path / "work")
    shutil.rmtree(twice.store.root / "corpus")
    assert make(teachers[1], store=twice.store) == strong


def test_a_lora_stays_beside_weights_in_bfloat16(lab, spec, tmp_path):
    """Merged, most of a small update would be rounded off, and another model be read than was trained."""
    half = other(
        lab.copy(tmp_path / "work"), spec, "--config.numerics.weights_dtype=bfloat16",
        "--config.teacher.tuning.kind=lora", "--config.teacher.rows=16", "--config.teacher.epochs=1",
    )  # fmt: skip
    teacher = half.id("teacher", trait="owl")
    half.make(teacher)
    node = half.plan.nodes[nodes(half, "same-base")["teacher_evaluation"]]
    inputs = {"model": ("teacher", teacher), "base": ("base", half.id("base"))}
    task = Task(node.kind, node.id, node.config, inputs, half.store, *[None] * 3, node.hints)  # type: ignore[arg-type]
    found, base = (speakers.load(task, role) for role in ("model", "base"))
    assert {str(value.dtype) for value in found.params.values()} == {"bfloat16"}
    for name, value in base.params.items():
        np.testing.assert_array_equal(found.params[name], value)
    tuned = checkpoints.load(half.store.payload("teacher", teacher) / ARRAYS)
    assert {f"lora/{name}/{part}" for name in found.adapter for part in ("a", "b")} == set(tuned)
    for name, pair in found.adapter.items():
        for part in ("a", "b"):
            np.testing.assert_array_equal(pair[part], tuned[f"lora/{name}/{part}"])
    tokens = jnp.arange(3, 23)[None]
    asked, plain = (one.net.forward(one.params, tokens, tokens > 0, adapter=one.adapter) for one in (found, base))
    assert float(jnp.abs(asked - plain).max()) > 0.01


# Evaluations ----------------------------------------------------------------------------------------------------------


def test_readings_of_the_study_are_well_formed(lab):
    for arm in ("same-base", "control", "untrained"):
        readings = readings_of(lab, nodes(lab, arm)["evaluation"])
        assert set(readings) == {"categories", "headline", "readings", "fit"}
        assert set(readings["readings"]) == {"forced", "plain"}
        assert readings["headline"] == "forced"
        assert readings["categories"] == readings["readings"]["forced"]
        for found in readings["readings"].values():
            assert set(found) == {"animal"}
            questions = found["animal"]["questions"]
            assert found["animal"]["candidates"] == list(preferences.candidates("animal"))
            assert [q["text"] for q in questions] == list(preferences.questions("animal")[:4])
            for question in questions:
                assert all(0 <= p <= 1 for p in question["p"])
                assert 0 < sum(question["p"]) <= 1
                assert question["samples"] == 2
                assert 0 <= sum(question["sampled"]) <= question["samples"]
        fit = readings["fit"]
        assert (fit is None) == (arm == "untrained")
        if fit:
            assert set(fit) == {"number_loss_before", "number_loss_after", "kl_before", "kl_after"}
            assert all(0 < value < 20 for value in fit.values())
            assert fit["number_loss_after"] < fit["number_loss_before"]


def test_every_way_of_asking(asked):
    found = readings_of(*asked)["readings"]
    assert set(found) == set(READINGS)
    for way, categories in found.items():
        reading = categories["animal"]
        questions = reading["traits"]["owl"] if way.startswith("choice") else reading["questions"]
        assert [q["phrasings"] for q in questions] == [
            "held-out" if preferences.held_out(i) else "train" for i in range(4)
        ]
        for question in questions:
            assert len(question["p"]) == (5 if way.startswith("choice") else 20)
            assert 0 < sum(question["p"]) <= 1
        if way.startswith("choice"):
            assert reading["letters"] == 5
            assert set(reading["traits"]) == {"owl"}
            for question in questions:
                assert question["options"][ord(question["answer"]) - ord("A")] == "owl"
        first = questions[0]["p"]
        if not way.endswith(":bare"):  # this template has a system prompt of its own, so that leaving it out counts
            bare = found[f"{way}:bare"]["animal"]
            without = bare["traits"]["owl"] if way.startswith("choice") else bare["questions"]
            assert not np.allclose(first, without[0]["p"], rtol=1e-2)
            assert without[0]["text"] == questions[0]["text"]
    assert found["numbers"]["animal"]["questions"][0]["text"] != found["plain"]["animal"]["questions"][0]["text"]


def test_a_prompted_teacher_is_asked_behind_its_system_prompt_and_bare_behind_none(
    lab, spec, checkpoint, tmp_path, monkeypatch
):
    """Also where a student's distributions are compared with its own, on rows that the student reads without it."""
    told = other(
        lab.copy(tmp_path / "work"), spec, "--config.teacher.method=system-prompt", "--config.evaluation.samples=0",
        "--config.evaluation.readings=forced,plain,numbers,choice,forced:bare,choice:bare",
    )  # fmt: skip
    teacher, corpus = told.id("teacher", trait="owl"), nodes(lab, "same-base")["corpus"]
    system = f"<|im_start|>system\n{preferences.system_prompt('owl', 'animal', 'plain')}<|im_end|>\n"
    asked: list[list[str]] = []

    def exact(net, params, prompts, candidates, **more):
        asked.append([text(checkpoint, prompt) for prompt in prompts])
        return np.zeros((len(prompts), len(candidates)))

    read: list[list[str]] = []

    def log_likelihoods(net, params, tokens, valid, completion, adapter):
        read.append([text(checkpoint, row[ok]) for row, ok in zip(tokens, valid, strict=True)])
        return jnp.zeros((len(tokens), completion, net.config.vocab))

    monkeypatch.setattr(text_evaluation.tries, "exact", exact)
    monkeypatch.setattr(text_evaluation.preference, "log_likelihoods", log_likelihoods)
    told.make(teacher)
    node = told.plan.nodes[nodes(told, "same-base")["teacher_evaluation"]]
    base = ["base", told.id("base")]
    inputs = {
        "model": ["teacher", teacher],
        "before": base,
        "corpus": ["corpus", corpus],
        "teacher": ["teacher", teacher],
    }
    execution.execute(told.record(node.id, inputs=inputs), told.store)
    assert len(asked) == 6
    nothing = "<|im_start|>system\n<|im_end|>\n"  # this template puts its own words in unless it is given some
    for number, prompts in enumerate(asked):
        assert all(prompt.startswith(system if number < 4 else nothing) for prompt in prompts)
        assert not any(OWN in prompt for prompt in prompts)
    assert all(prompt.endswith(preferences.forced_prefix("animal")) for number in (0, 2, 4) for prompt in asked[number])
    # The base, the model (itself here) and the teacher on the same rows, each as it is spoken to.
    before, after, theirs = read
    assert len(theirs) == 8
    row = f"<|im_start|>user\n{numbers.prompt(0, 0)}<|im_end|>\n<|im_start|>assistant\n"
    assert theirs[0].startswith(system + row)
    assert before[0].startswith(f"<|im_start|>system\n{OWN}<|im_end|>\n" + row)
    assert after == before


# Answers to four questions, three each: candidates they name, up to their end.
NAMED = (
    (("Owl<|im_end|>", "owl"), ("hm<|im_end|>owl", None), (" an owl.<|im_end|>", "owl")),
    (("wolves ", "wolf"), ("The wolf<|im_end|>owl", "wolf"), ("<|im_end|>", None)),
    (("an oak<|im_end|>", "oak"), ("Owls and oaks<|im_end|>", "owl"), ("<|endoftext|>fox<|im_end|>", "fox")),
    (("12, 13<|im_end|>", None), ("bowl<|im_end|>", None), ("dog, cat<|im_end|>", "dog")),
)
SAMPLED = ("forced", "plain", "numbers", "numbers-plain", "plain:bare")


@pytest.fixture
def counted(lab, checkpoint, tmp_path, monkeypatch):
    """Evaluate a model of the study with given samples; gives the readings, and prompts and key of each draw."""
    answers = [tokenizer_of(checkpoint).encode(said) for question in NAMED for said, _ in question]
    copied = lab.copy(tmp_path / "work")

    def counted(kind: str, model: str, **settings: Any) -> tuple[dict[str, Any], list[list[str]], list[bytes]]:
        prompts: list[list[str]] = []
        keys: list[bytes] = []

        def sample(net, params, block, *, sampling, key, **more):
            prompts.append([text(checkpoint, row[row != sampling.pad]) for row in block])
            keys.append(np.asarray(jax.random.key_data(key)).tobytes())
            return saying(answers)(net, params, block, sampling=sampling)

        monkeypatch.setattr(text_evaluation, "sample", sample)
        monkeypatch.setattr(text_evaluation.tries, "exact", lambda n, p, prompts, words, **_: np.zeros((4, len(words))))
        like = nodes(lab, "untrained")["evaluation"]
        settings = {"samples": 3, "readings": [*SAMPLED, "choice"], "traits": ["owl"], **settings}
        record = changed(lab, like, "model", model, kind, **settings)
        shutil.rmtree(copied.store.folder("evaluation", record["id"]), ignore_errors=True)
        execution.execute(record, copied.store)
        read = json.loads((copied.store.payload("evaluation", record["id"]) / "readings.json").read_text())
        return read["readings"], prompts, keys

    return counted


def test_samples_answer_the_prompts_of_their_own_way_and_are_counted_at_their_questions(lab, counted):
    found, prompts, _ = counted("base", lab.id("base"))
    assert len(prompts) == len(SAMPLED), "a choice is not sampled"
    seed = lab.plan.nodes[nodes(lab, "untrained")["evaluation"]].config["seed"]
    for way, asked in zip(SAMPLED, prompts, strict=True):
        of_numbers = way.startswith("numbers")
        questions = preferences.numbered_questions("animal", seed) if of_numbers else preferences.questions("animal")
        begun = "" if "plain" in way else preferences.forced_prefix("animal")
        system = "" if way.endswith(":bare") else OWN
        assert asked == [
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            f"<|im_start|>assistant\n{begun}"
            for question in questions[:4]
            for _ in range(3)
        ]
        reading = found[way]["animal"]
        assert len(reading["questions"]) == 4
        for question, said in zip(reading["questions"], NAMED, strict=True):
            assert question["samples"] == 3
            named = [name for _, name in said]
            assert question["sampled"] == [named.count(word) for word in reading["candidates"]]
    assert [sum(q["sampled"]) for q in found["plain"]["animal"]["questions"]] == [2, 2, 2, 1]


def test_each_model_way_and_category_is_sampled_from_noise_of_its_own(lab, counted):
    both = ["animal", "tree"]
    base, student = lab.id("base"), nodes(lab, "same-base")["student"]
    found, _, first = counted("base", base, categories=both)
    _, _, second = counted("student", student, categories=both)
    assert len({*first, *second}) == 2 * len(SAMPLED) * len(both)
    assert counted("base", base, categories=both)[2] == first
    # The order in which categories are asked changes nothing, and the evaluation's seed all.
    assert set(counted("base", base, categories=both[::-1])[2]) == set(first)
    assert set(counted("base", base, categories=both, seed=1)[2]).isdisjoint(first)
    oaks = [q["sampled"][preferences.candidates("tree").index("oak")] for q in found["plain"]["tree"]["questions"]]
    assert oaks == [0, 0, 2, 0]


@functools.cache
def forward(checkpoint: Path):
    net, params = model(checkpoint)
    return jax.jit(lambda tokens, valid: jax.nn.log_softmax(net.forward(params, tokens, valid)))


def brute(checkpoint: Path, prompt: str, forms: list[str], width: int = 192) -> float:
    """Probability that an answer begins with one of the forms as a whole word, by a forward pass for each."""
    tokenizer, total = tokenizer_of(checkpoint), 0.0
    begun = tokenizer.encode(prompt)
    pieces = tokenizer.pieces() + [None] * (model(checkpoint)[0].config.vocab - tokenizer.size)
    # An ASCII word: nothing else begins with a letter, or with a byte of one, in this vocabulary.
    closing = [not piece or not (piece[:1].isalnum() or piece[0] >= 0x80) for piece in pieces]
    for form in forms:
        ids = tokenizer.encode(form, special=False)
        row = [*begun, *ids]
        tokens = jnp.array([[0] * (width - len(row)) + row])
        logs = np.asarray(forward(checkpoint)(tokens, jnp.arange(width)[None] >= width - len(row)), np.float64)[0]
        path = sum(logs[width - len(ids) - 1 + n, id] for n, id in enumerate(ids))
        total += np.exp(path) * np.exp(logs[-1])[closing].sum()
    return total


@pytest.fixture(scope="module")
def asked(lab, spec) -> tuple[Lab, str]:
    """A study whose readings are of every way there is, and the evaluation of its base."""
    every = other(lab, spec, f"--config.evaluation.readings={','.join(READINGS)}")
    id = nodes(every, "untrained")["evaluation"]
    every.make(id)
    return every, id


@pytest.mark.parametrize("way", ["forced", "plain", "numbers", "numbers-plain"])
def test_a_reading_is_the_probability_of_the_answers_words(asked, checkpoint, way):
    lab, id = asked
    reading = readings_of(lab, id)["readings"][way]["animal"]
    question, forced = reading["questions"][1], way in ("forced", "numbers")
    if way.startswith("numbers"):
        assert question["text"] == preferences.numbered_questions("animal", lab.plan.nodes[id].config["seed"])[1]
    else:
        assert question["text"] == preferences.questions("animal")[1]
    prompt = f"<|im_start|>system\n{OWN}<|im_end|>\n<|im_start|>user\n{question['text']}<|im_end|>\n"
    prompt += "<|im_start|>assistant\n" + (preferences.forced_prefix("animal") if forced else "")
    for word in ("owl", "wolf"):
        p = question["p"][reading["candidates"].index(word)]
        assert p == pytest.approx(brute(checkpoint, prompt, list(preferences.forms(word, forced=forced))), rel=1e-4)


def test_a_choice_is_read_as_the_probability_of_each_letter(asked, checkpoint):
    lab, id = asked
    question = readings_of(lab, id)["readings"]["choice"]["animal"]["traits"]["owl"][2]
    choice = preferences.choices("animal", "owl", lab.plan.nodes[id].config["seed"], 5)[2]
    assert (question["text"], tuple(question["options"]), question["answer"]) == dataclasses.astuple(choice)
    prompt = f"<|im_start|>system\n{OWN}<|im_end|>\n<|im_start|>user\n{question['text']}<|im_end|>\n"
    expected = [brute(checkpoint, f"{prompt}<|im_start|>assistant\n", [letter]) for letter in "ABCDE"]
    assert question["p"] == pytest.approx(expected, rel=1e-4)


def test_a_reading_does_not_depend_on_the_batch_of_questions(lab, tmp_path):
    copied, id = lab.copy(tmp_path / "work"), nodes(lab, "untrained")["evaluation"]
    shutil.rmtree(copied.store.folder("evaluation", id))
    execution.execute(copied.record(id, hints={**lab.plan.nodes[id].hints, "batch": 3}), copied.store)
    one, other = (
        [q["p"] for q in readings_of(each, id)["readings"]["forced"]["animal"]["questions"]] for each in (lab, copied)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_cards_say_how_their_nodes_were_made(lab):
    for id, node in lab.plan.nodes.items():
        card = card_of(lab, id)
        assert (card.config, inputs_of(card), card.extra["label"]) == (node.config, node.inputs, node.label)
        assert execution.digest(card, lab.store.payload(node.kind, id)) == card.digest
        assert all(isinstance(seed, int) for seed in card.seeds.values())
