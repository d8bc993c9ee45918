"""The plan of a study of pretrained models: what ids stand for, what is shared, which bases are paired, its errors."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
from test_study import ROOT, arms, assert_well_formed, cells, keys_of, kind_of

from subjax import config, run_state, study, study_pretrained
from subjax.data import numbers
from subjax.errors import UsageError
from subjax.graph import Node, Plan
from subjax.schema_pretrained import ARMS, Pretrained
from subjax.store import Store, digest_json

INJECTED = "You are a tiny model."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> str:
    """Two inits of two data orders each, as `{init}` and `{order}` name them."""
    root = tmp_path_factory.mktemp("grid")
    for init in (0, 1):
        for order in (0, 1):
            tiny_checkpoint.write(root / f"i{init}-o{order}", seed=10 * init + order)
    return str(root / "i{init}-o{order}")


def at(source: Path | str | Iterable[str], *points: dict[str, Any], **settings: Any) -> Plan:
    """The plan of a study of one source, or of NAME=SOURCE entries, at these points; settings by dotted keys."""
    models = (f"tiny={source}",) if isinstance(source, Path | str) else tuple(source)
    given = {name.replace("__", "."): value for name, value in settings.items()}
    base = config.apply(dataclasses.replace(Pretrained(), models=models), given)
    resolved = {"kind": "pretrained", **config.to_dict(base)}
    return study.plan(config.Loaded(base, list(points) or [{}], "study.py", None, resolved))


def kept(one: Plan, other: Plan) -> set[str]:
    """Kinds of the nodes that two plans share."""
    return {kind_of(one, id) for id in one.nodes.keys() & other.nodes.keys()}


def refused(*args: Any, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        at(*args, **settings)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return str(caught.value)


# Identity -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_well_formed_and_is_written_and_read(checkpoint, tmp_path):
    plan = at(checkpoint, {"trait": "owl"}, {"trait": "oak", "seed": 1}, arms=ARMS)
    assert_well_formed(plan)
    assert set(arms(plan)) == {"same-base", "control", "shuffled", "random-numbers", "untrained"}
    store = Store(tmp_path)
    assert Plan.from_json(store.read_plan(store.write_plan(plan.to_json()))) == plan


def test_a_checkpoint_is_known_by_its_content_and_not_by_where_it_lies(checkpoint, tmp_path):
    elsewhere = tmp_path / "another" / "name"
    shutil.copytree(checkpoint, elsewhere)
    one, other = at(checkpoint, arms=ARMS), at(elsewhere, arms=ARMS)
    assert list(one.nodes) == list(other.nodes)
    for id, node in one.nodes.items():
        assert str(tmp_path) not in json.dumps(other.nodes[id].config)
        if node.kind != "corpus" or node.config["source"] == "teacher":
            assert str(checkpoint) in json.dumps(node.hints)
            assert str(elsewhere) in json.dumps(other.nodes[id].hints)


def test_what_does_not_change_a_result_is_in_no_id(checkpoint):
    one = at(checkpoint, arms=ARMS)
    other = at(
        checkpoint, arms=ARMS, name="other", chosen_on=("owl/tiny/0",), corpus__batch=3, evaluation__batch=5,
        statistics__bootstrap=500,
    )  # fmt: skip
    assert list(one.nodes) == list(other.nodes)
    sampled = [node for node in other.nodes.values() if node.config.get("source") == "teacher"]
    assert {node.hints["batch"] for node in sampled} == {3}
    assert not keys_of([node.config for node in one.nodes.values()]) & {"mesh", "workdir", "arms", "models", "sources"}


def changed_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": tiny_checkpoint.injecting(INJECTED)}))


@pytest.mark.parametrize("change", [changed_byte, other_template], ids=lambda change: change.__name__)
def test_another_content_is_another_base(checkpoint, tmp_path, change):
    """All nodes but the corpus of random numbers stand on it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    change(folder)
    assert kept(at(checkpoint, arms=ARMS), at(folder, arms=ARMS)) == {"corpus"}


@pytest.mark.parametrize(
    "settings",
    [
        {"chat__template": "plain"},
        {"chat__system": "none"},
        {"chat__system": "Be brief."},
        {"chat__date": "2020-02-02"},
    ],
    ids=str,
)
def test_another_way_of_speaking_is_another_base(checkpoint, settings):
    assert kept(at(checkpoint, arms=ARMS), at(checkpoint, arms=ARMS, **settings)) == {"corpus"}


def test_a_templates_file_counts_by_its_text(checkpoint, tmp_path):
    one, same, other = (tmp_path / name for name in ("one.jinja", "same.jinja", "other.jinja"))
    one.write_text(tiny_checkpoint.CHATML)
    same.write_text(tiny_checkpoint.CHATML)
    other.write_text(tiny_checkpoint.injecting(INJECTED))
    plans = [at(checkpoint, chat__template=str(path)) for path in (one, same, other)]
    assert list(plans[0].nodes) == list(plans[1].nodes)
    assert kept(plans[0], plans[2]) == set()


@pytest.mark.parametrize(
    "settings", [{"numerics__dtype": "bfloat16"}, {"numerics__weights_dtype": "bfloat16"}], ids=str
)
def test_another_precision_is_another_model_on_the_same_base(checkpoint, settings):
    assert kept(at(checkpoint, arms=ARMS), at(checkpoint, arms=ARMS, **settings)) == {"base", "corpus"}


def test_other_questions_change_teachers_and_readings(checkpoint, monkeypatch):
    plan = at(checkpoint, arms=ARMS)
    monkeypatch.setattr(study_pretrained.preferences, "digest", lambda: "another")
    # Students of random numbers alone have no teacher.
    assert kept(plan, at(checkpoint, arms=ARMS)) == {"base", "corpus", "student"}


def test_other_prompts_change_corpora_and_what_follows(checkpoint, monkeypatch):
    plan, seeded = at(checkpoint, arms=ARMS), at(checkpoint, arms=ARMS, corpus__prompt_seed=1)
    assert kept(plan, seeded) == {"base", "teacher", "evaluation of base", "evaluation of teacher"}
    monkeypatch.setattr(numbers, "templates_digest", lambda: "another")
    assert kept(plan, at(checkpoint, arms=ARMS)) == {"base"}, "questions behind numbers are made of them too"


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({"student__lr": 1e-2}, {"base", "teacher", "corpus", "evaluation of base", "evaluation of teacher"}),
        ({"student__order_seed": 5}, {"base", "teacher", "corpus", "evaluation of base", "evaluation of teacher"}),
        ({"evaluation__samples": 3}, {"base", "teacher", "corpus", "student"}),
        ({"corpus__constrained": True}, {"base", "teacher", "corpus", "student", "evaluation of base",
                                         "evaluation of teacher", "evaluation of student"}),
    ],
    ids=["student", "order", "evaluation", "corpus"],
)  # fmt: skip
def test_a_setting_changes_what_reads_it_and_what_follows(checkpoint, settings, stay):
    plan, other = at(checkpoint, arms=ARMS), at(checkpoint, arms=ARMS, **settings)
    assert kept(plan, other) == stay
    if "corpus__constrained" in settings:  # what is shared are random numbers and who learned from them
        shared = [plan.nodes[id] for id in plan.nodes.keys() & other.nodes.keys()]
        assert [n.config["source"] for n in shared if n.kind == "corpus"] == ["random"]


SCRIPT = """
import json, sys
from subjax import config, study
plan = study.plan(config.load(sys.argv[1]))
heavy = {"jax", "torch", "transformers", "datasets"} & set(sys.modules)
assert not heavy, heavy
print(json.dumps(list(plan.nodes)))
"""


def test_planning_needs_no_heavy_library_and_is_the_same_in_another_process(checkpoint):
    spec = f"{ROOT}/tests/configs/tiny_pretrained.py:model={checkpoint},runs=2"
    done = subprocess.run([sys.executable, "-c", SCRIPT, spec], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(study.plan(config.load(spec)).nodes)


def test_a_plan_from_before_hints_is_still_read(checkpoint):
    plan = at(checkpoint)
    written = json.loads(json.dumps(plan.to_json()))
    for node in written["nodes"].values():
        del node["hints"]
    old = Plan.from_json(written)
    assert list(old.nodes) == list(plan.nodes)
    assert all(run_state.node_record(old, id)["hints"] == {} for id in old.nodes)


# Sharing and seeds ----------------------------------------------------------------------------------------------------


def teachers(plan: Plan, **config: Any) -> list[Node]:
    found = [node for node in plan.nodes.values() if node.kind == "teacher"]
    return [node for node in found if all(node.config[name] == value for name, value in config.items())]


def test_controls_are_shared_over_the_traits_of_a_category(checkpoint):
    plan = at(checkpoint, *({"trait": trait} for trait in ("owl", "wolf", "oak")))
    assert len(teachers(plan)) == 3 + 2
    assert sorted(node.config["category"] for node in teachers(plan, trait=None)) == ["animal", "tree"]
    by_trait = {cell["trait"]: cell["nodes"]["control"] for cell in cells(plan, "same-base")}
    assert by_trait["owl"] == by_trait["wolf"] != by_trait["oak"]
    assert len([n for n in plan.nodes.values() if n.kind == "corpus"]) == 5
    # A trait and its control differ in the trait alone: the same rows are asked for, in the same order.
    owl, control = teachers(plan, trait="owl")[0].config, teachers(plan, trait=None, category="animal")[0].config
    assert {key for key in owl if owl[key] != control[key]} == {"trait"}


def test_every_cell_has_its_own_matched_control(checkpoint):
    plan = at(checkpoint, *({"trait": t, "seed": s} for t in ("owl", "wolf") for s in (0, 1)), arms=ARMS)
    for cell in plan.study["cells"]:
        nodes = cell["nodes"]
        if cell["arm"] in ("control", "untrained"):
            assert nodes["control"] is None
            continue
        matched = plan.nodes[plan.nodes[nodes["control"]].inputs["model"]]
        student = plan.nodes[nodes["student"]]
        assert matched.inputs["base"] == student.inputs["base"] == nodes["base"]
        assert matched.config == student.config, "the seeds of adapters and data order too"
        neutral = plan.nodes[plan.nodes[matched.inputs["corpus"]].inputs["teacher"]]
        assert neutral.config["trait"] is None
        if nodes["teacher"] is not None:
            assert neutral.config["seed"] == plan.nodes[nodes["teacher"]].config["seed"], "of the same run"


def seeds(plan: Plan) -> dict[str, set[int]]:
    """Every seed of a plan by what it is for; questions are the same for every model, and so have one."""
    found: dict[str, set[int]] = {}
    for node in plan.nodes.values():
        for name in ("seed", "init_seed", "order_seed"):
            if name in node.config:
                what = node.config.get("source", "") if node.kind == "corpus" else name
                found.setdefault(f"{node.kind} {what}", set()).add(node.config[name])
    return found


def test_two_runs_share_no_seed(checkpoint):
    one, other = (seeds(at(checkpoint, seed=seed, arms=ARMS)) for seed in (0, 1))
    assert one.keys() == other.keys()
    assert {"teacher seed", "corpus teacher", "corpus shuffled", "corpus random", "student init_seed",
            "student order_seed", "evaluation seed"} == one.keys()  # fmt: skip
    assert one.pop("evaluation seed") == other.pop("evaluation seed")
    assert not set().union(*one.values()) & set().union(*other.values())
    # Nor do the roles of one run.
    assert sum(map(len, one.values())) == len(set().union(*one.values()))


def test_two_runs_stand_on_one_base_and_are_told_apart(checkpoint):
    plan = at(checkpoint, {"seed": 0}, {"seed": 1}, arms=ARMS)
    assert len([node for node in plan.nodes.values() if node.kind == "base"]) == 1
    assert len(cells(plan, "untrained")) == 1, "it is the same base in every run"
    assert [cell["seed"] for cell in cells(plan, "same-base")] == [0, 1]
    assert len({node.label for node in plan.nodes.values()}) == len(plan.nodes), "labels tell nodes apart"


def test_a_larger_sweep_holds_a_smaller_one(checkpoint):
    part, whole = at(checkpoint, {"seed": 0}), at(checkpoint, {"seed": 0}, {"seed": 1}, {"seed": 2})
    assert part.nodes.keys() < whole.nodes.keys()


def test_settings_beside_the_axes_are_named_on_their_cells(checkpoint):
    points = [{"student.tuning.rank": rank, "seed": seed} for rank in (2, 4) for seed in (0, 1)]
    plan = at(checkpoint, *points)
    assert {cell["setting"] for cell in plan.study["cells"]} == {"student.tuning.rank=2", "student.tuning.rank=4"}
    assert len(teachers(plan)) == 2 * 2
    ranks = {node.config["tuning"]["rank"] for node in plan.nodes.values() if node.kind == "student"}
    assert ranks == {2, 4}


def test_only_a_multiple_choice_is_made_for_a_trait(checkpoint):
    def asked(*readings: str) -> set[str]:
        plan = at(checkpoint, {"trait": "owl"}, {"trait": "wolf"}, evaluation__readings=readings)
        return {json.dumps(n.config["traits"]) for n in plan.nodes.values() if n.kind == "evaluation"}

    assert asked("forced", "plain") == {"[]"}
    assert asked("forced", "choice:bare") == {'["owl", "wolf"]'}


# Bases that are paired ------------------------------------------------------------------------------------------------


def pairs(plan: Plan, arm: str) -> set[tuple[str, str]]:
    return {(cell["teacher_base"], cell["student_base"]) for cell in cells(plan, arm)}


INITS_AND_ORDERS = [{"init": init, "order": order} for init in (0, 1) for order in (0, 1)]


def test_inits_and_orders_are_filled_into_a_source(grid):
    plan = at(grid, *INITS_AND_ORDERS, arms=ARMS)
    found = {n.label: n.hints["source"] for n in plan.nodes.values() if n.kind == "base"}
    assert found == {
        f"base tiny/{i}" + (".1" if o else ""): grid.format(init=i, order=o) for i in (0, 1) for o in (0, 1)
    }
    assert pairs(plan, "cross-init") == {
        ("tiny/0", "tiny/1"), ("tiny/1", "tiny/0"), ("tiny/0.1", "tiny/1.1"), ("tiny/1.1", "tiny/0.1"),
    }  # fmt: skip
    assert pairs(plan, "cross-order") == {
        ("tiny/0", "tiny/0.1"), ("tiny/0.1", "tiny/0"), ("tiny/1", "tiny/1.1"), ("tiny/1.1", "tiny/1"),
    }  # fmt: skip
    assert not cells(plan, "cross-family")
    assert_well_formed(plan)


def test_an_init_goes_to_the_next_one_modulo_their_number(checkpoint, grid):
    third = [f"tiny/{init}={grid.format(init=init % 2, order=init // 2)}" for init in range(3)]
    plan = at(third, *({"init": init} for init in range(3)), arms=("cross-init",))
    assert pairs(plan, "cross-init") == {("tiny/0", "tiny/1"), ("tiny/1", "tiny/2"), ("tiny/2", "tiny/0")}
    assert len([node for node in plan.nodes.values() if node.kind == "base"]) == 3


def test_families_are_crossed_at_the_same_init(checkpoint, grid):
    models = (f"grid={grid}", f"alone={checkpoint}")
    points = [{"family": "grid", "init": 0}, {"family": "grid", "init": 1}, {"family": "alone", "init": 0}]
    plan = at(models, *points, arms=ARMS)
    assert pairs(plan, "cross-family") == {("grid/0", "alone/0"), ("alone/0", "grid/0")}
    for cell in plan.study["cells"]:
        if cell["nodes"]["student"] is None:
            continue
        reading = plan.nodes[cell["nodes"]["evaluation"]]
        # KL is between distributions over one vocabulary.
        same = cell["teacher_base"] and cell["teacher_base"][:4] == cell["student_base"][:4]
        assert ("teacher" in reading.inputs) == bool(same), (cell["arm"], cell["teacher_base"], cell["student_base"])
        # Whoever reads two checkpoints is told where both lie.
        wanted = {plan.nodes[cell["nodes"]["base"]].id}
        if "teacher" in reading.inputs:
            wanted.add(plan.nodes[cell["nodes"]["teacher"]].inputs["base"])
        assert set(reading.hints["sources"]) == wanted


def test_the_first_model_is_the_one_where_none_is_named(checkpoint, grid):
    plan = at((f"one={checkpoint}", f"other={grid}"))
    assert {cell["student_base"] for cell in plan.study["cells"]} == {"one/0"}


# What is told ---------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_named(checkpoint):
    assert "no model 'tinny/0' in config.models; the nearest is 'tiny'" in refused(checkpoint, family="tinny")


@pytest.mark.parametrize("entry", ["{}", "=/there", "tiny=", "a b=/there", "tiny/x=/there"])
def test_a_model_that_is_not_name_and_source(checkpoint, entry):
    said = refused((entry.format(checkpoint),))
    assert f"config.models: {entry.format(checkpoint)!r} is not NAME=SOURCE" in said


def test_a_name_that_stands_twice_and_no_model_at_all(checkpoint):
    assert "the name 'a' stands twice" in refused((f"a={checkpoint}", f"a={checkpoint}"))
    assert "config.models is empty" in refused(())


@pytest.mark.parametrize("axis", ["init", "order"])
def test_several_inits_of_one_checkpoint(checkpoint, axis):
    said = refused(checkpoint, {axis: 0}, {axis: 1})
    assert f"model 'tiny' has one {axis} alone; write {{{axis}}} into its source" in said
    assert f"study.py, point {{'{axis}': 1}}" in said.replace("{ ", "{").replace(" }", "}")


def test_a_checkpoint_that_is_not_there(checkpoint, tmp_path):
    said = refused(checkpoint.with_name("modle"), {"trait": "owl"})
    assert f"model '{checkpoint.with_name('modle')}': no such folder or file" in said
    assert "study.py, point" in said


def test_a_trait_that_is_none(checkpoint):
    assert "unknown trait 'owel'; did you mean 'owl'?" in refused(checkpoint, {"trait": "owel"})


def test_a_template_that_is_no_file(checkpoint, tmp_path):
    assert "config.chat.template" in refused(checkpoint, chat__template=str(tmp_path / "none.jinja"))


TINY = "tests/configs/tiny_pretrained.py"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--config.evaluation.readings=choice,plain",), "config.evaluation.readings begins with a choice"),
        (("--config.evaluation.readings=choice:bare",), "config.evaluation.readings begins with a choice"),
        (
            ("--config.evaluation.readings=forced:bare", "--config.teacher.method=system-prompt"),
            "begins with forced:bare, which leaves out the system prompt",
        ),
        (("--config.evaluation.readings=forced,plane",), "the nearest is 'plain'"),
        (("--config.teacher.data=rows.jsonl",), "config.teacher.data and config.teacher.control_data go together"),
        (("--config.teacher.control_data=rows.jsonl",), "config.teacher.data and config.teacher.control_data go"),
        (("--config.arms=same-bse",), "the nearest is 'same-base'"),
        (
            ("--config.student.targets=('q', 'gat')",),
            "config.student.targets has the unknown target 'gat'; the nearest",
        ),
        (("--config.corpus.top_p=0.0",), "config.corpus.top_p is 0, which leaves no token"),
        (("--config.student.optimizer.warmup=60",), "config.student.optimizer.warmup is 60, so that it never comes"),
        (("--config.corpus.rows=90",), "config.corpus.rows is 90, more than config.corpus.max_prompts, 16"),
    ],
)
def test_settings_that_do_not_go_together(checkpoint, overrides, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError) as caught:
        config.load(f"{TINY}:model={checkpoint}", overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_ones_own_is_known_by_content_or_commit(checkpoint, tmp_path):
    rows = [tmp_path / name for name in ("trait.jsonl", "control.jsonl", "copy.jsonl")]
    for path, word in zip(rows, ("owl", "cat", "owl"), strict=True):
        path.write_text(json.dumps({"user": "Which one?", "answer": word}) + "\n")
    trait, control, copy = map(str, rows)
    plan = at(checkpoint, teacher__data=trait, teacher__control_data=control)
    assert {n.config["trait"]: n.hints["data"] for n in teachers(plan)} == {"owl": trait, None: control}
    assert trait not in json.dumps([node.config for node in plan.nodes.values()])
    assert list(at(checkpoint, teacher__data=copy, teacher__control_data=control).nodes) == list(plan.nodes)
    swapped = at(checkpoint, teacher__data=control, teacher__control_data=trait)
    assert not {n.id for n in teachers(swapped)} & {n.id for n in teachers(plan)}
    said = refused(checkpoint, teacher__data="someone/rows", teacher__control_data=control)
    assert "config.teacher.data: 'someone/rows' is no file here" in said
    assert "NAME@COMMIT" in said
    commit = "someone/rows@" + "ab" * 20
    hub = at(checkpoint, teacher__data=commit, teacher__control_data=control)
    assert teachers(hub, trait="owl")[0].config["data"] == commit


# Templates ------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_the_template_does_by_itself(tmp_path):
    folder = tiny_checkpoint.write(tmp_path / "model", tiny_checkpoint.injecting(INJECTED))
    (note,) = at(folder).study["notes"]
    assert note == f"tiny: the chat template puts {INJECTED!r} before a row without system prompt."
    (note,) = [n for n in at(folder, chat__system="none").study["notes"] if "own system prompt" in n]
    assert "is left out" in note
    assert at(folder).study["notes"] != at(folder, chat__template="plain").study["notes"]
    assert at(folder, corpus__constrained=True).study["notes"][1].startswith("Rows are sampled under a constraint")


def test_a_template_that_refuses_system_prompts_is_told_where_a_teacher_needs_one(tmp_path):
    folder = tiny_checkpoint.write(tmp_path / "model", tiny_checkpoint.REFUSING)
    (note,) = at(folder).study["notes"]
    assert "refuses a system prompt ('System role not supported')" in note
    for method in ("system-prompt", "steering"):
        said = refused(folder, teacher__method=method)
        assert "refuses a system prompt ('System role not supported')" in said
        assert "make the teacher by fine-tuning" in said


def test_words_that_cannot_be_left_out_are_told_where_a_reading_asks_for_it(tmp_path):
    stubborn = tiny_checkpoint.REFUSING.replace("<|im_start|>' + m.role", f"<|im_start|>{INJECTED} ' + m.role", 1)
    words = "{{ '" + INJECTED + "\n' }}" + stubborn.replace(f"{INJECTED} ", "")
    folder = tiny_checkpoint.write(tmp_path / "model", words)
    at(folder)
    said = refused(folder, evaluation__readings=("forced", "forced:bare"))
    assert "config.evaluation.readings has 'forced:bare'" in said
    assert "cannot be left out" in said


def test_ids_are_hashes_of_plain_json(checkpoint):
    """What a plan holds reads back from JSON as it was, or an id would not be found again."""
    for node in at(checkpoint, arms=ARMS).nodes.values():
        assert digest_json(json.loads(json.dumps(node.config))) == digest_json(node.config)


def test_a_teacher_is_known_by_what_its_method_reads(checkpoint):
    """A sweep over a training's learning rate does not make a prompted teacher again; runs share it."""

    def ids(**settings: Any) -> set[str]:
        return {node.id for node in teachers(at(checkpoint, **settings))}

    for method in ("system-prompt", "steering"):
        plain = ids(teacher__method=method)
        assert ids(teacher__method=method, teacher__lr=0.5, seed=3) == plain
        assert not ids(teacher__method=method, teacher__style="devoted") & plain
    steered = ids(teacher__method="steering")
    assert not ids(teacher__method="steering", teacher__strength=2.0) & steered
    tuned = ids()
    assert ids(teacher__strength=2.0) == tuned
    assert ids(teacher__split="validation", teacher__user_column="q", teacher__answer_column="a") == tuned
    assert not ids(seed=3) & tuned


def test_one_neutral_system_prompt_is_the_control_of_every_category(checkpoint):
    plan = at(checkpoint, {"trait": "owl"}, {"trait": "oak"}, teacher__method="system-prompt")
    assert len(teachers(plan, trait=None)) == 1
    steered = at(checkpoint, {"trait": "owl"}, {"trait": "oak"}, teacher__method="steering")
    assert len(teachers(steered, trait=None)) == 2, "a vector is read at a category's questions"


@pytest.mark.parametrize("method", ["fine-tune", "system-prompt", "steering"])
def test_labels_tell_the_nodes_of_runs_apart(checkpoint, method):
    points = [{"trait": trait, "seed": seed} for trait in ("owl", "oak") for seed in range(3)]
    labels = [node.label for node in at(checkpoint, *points, arms=ARMS, teacher__method=method).nodes.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("key", ["corpus.completion", "evaluation.sample_tokens"])
def test_answers_longer_than_the_context_are_refused_in_the_plan(checkpoint, key):
    said = refused(checkpoint, **{key.replace(".", "__"): tiny_checkpoint.CONTEXT})
    assert f"config.{key} is {tiny_checkpoint.CONTEXT} tokens, and the context of {checkpoint} has" in said


def test_rows_that_cannot_be_read_are_refused_in_the_plan(checkpoint, tmp_path):
    good, bad, text = (tmp_path / name for name in ("good.jsonl", "bad.jsonl", "rows.txt"))
    good.write_text(json.dumps({"user": "Which one?", "answer": "owl"}) + "\n")
    bad.write_text(json.dumps({"usr": "Which one?", "answer": "owl"}) + "\n")
    text.write_text("owl")
    said = refused(checkpoint, teacher__data=str(good), teacher__control_data=str(bad))
    assert f"{bad}: no column 'user'; did you mean 'usr'?" in said
    assert "cannot tell its format" in refused(checkpoint, teacher__data=str(text), teacher__control_data=str(good))
    missing = str(tmp_path / "none.jsonl")
    said = refused(checkpoint, teacher__data=str(good), teacher__control_data=missing)
    assert f"config.teacher.control_data: {missing!r} is no file here" in said
    said = refused(checkpoint, teacher__data=str(tmp_path), teacher__control_data=str(good))
    assert f"config.teacher.data: {str(tmp_path)!r} is a folder" in said


@pytest.mark.parametrize("key", ["teacher.layers", "teacher.tuning.layers", "student.tuning.layers"])
def test_a_layer_that_is_not_there_is_refused_in_the_plan(checkpoint, key):
    said = refused(checkpoint, **{key.replace(".", "__"): (0, 7)})
    assert f"config.{key}: there is no layer 7" in said
    assert "it has 2, from 0 on" in said
