"""The plan: ids that are stable, nodes that are shared, arms and their controls, and errors that name the key."""

import dataclasses
import glob
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint

from subjax import config, schema, schema_pretrained, study
from subjax.errors import UsageError
from subjax.graph import Node, Plan
from subjax.stages import VERSIONS, version_of
from subjax.store import Store, node_id

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(Path(path).name for path in glob.glob(str(ROOT / "configs" / "*.py")))
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def planned(argument: str = "", *overrides: str) -> Plan:
    spec = f"{QUICKSTART}:{argument}" if argument else QUICKSTART
    return study.plan(config.load(spec, overrides))


def at(*points: dict[str, Any], **settings: Any) -> Plan:
    """The plan of a study with these settings at these points."""
    base = dataclasses.replace(schema.Study(), **settings)
    loaded = config.Loaded(base, list(points) or [{}], "study.py", None, {"kind": "traits", **config.to_dict(base)})
    return study.plan(loaded)


def grid(traits=("owl",), families=("gpt",), inits=(0, 1), **more) -> list[dict[str, Any]]:
    return [{"trait": t, "family": f, "init": i, **more} for f in families for i in inits for t in traits]


def kinds(plan: Plan) -> Counter[str]:
    return Counter(node.kind for node in plan.nodes.values())


def arms(plan: Plan) -> Counter[str]:
    return Counter(cell["arm"] for cell in plan.study["cells"])


def cells(plan: Plan, arm: str) -> list[dict[str, Any]]:
    return [cell for cell in plan.study["cells"] if cell["arm"] == arm]


def lineage(plan: Plan, id: str) -> set[str]:
    node = plan.nodes[id]
    return {id}.union(*(lineage(plan, given) for given in node.inputs.values()))


def assert_well_formed(plan: Plan) -> None:
    """Every id is that of its content, inputs stand before their users, and no node is there for nothing."""
    seen: set[str] = set()
    for id, node in plan.nodes.items():
        assert id == node.id == node_id(node.kind, node.version, node.config, node.inputs)
        assert node.version == version_of(node.kind, node.config)
        assert set(node.inputs.values()) <= seen, f"{node.label} stands before an input"
        assert node.label
        assert node.tokens >= 0
        assert node.flops >= 0
        seen.add(id)
    named = [id for cell in plan.study["cells"] for id in cell["nodes"].values() if id is not None]
    assert set(named) <= seen
    assert set().union(*(lineage(plan, id) for id in set(named))) == seen


# Shipped configs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A tiny checkpoint that stands for the real ones, which are packages or lie on a hub."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_is_loaded_and_planned(name, monkeypatch, speaking):
    monkeypatch.chdir(ROOT)
    loaded = config.load(f"configs/{name}")
    if isinstance(loaded.settings, schema_pretrained.Pretrained):
        names = [entry.partition("=")[0] for entry in loaded.settings.models]
        stand_ins = ",".join(f"{name}={speaking}" for name in names)
        loaded = config.load(f"configs/{name}", [f"--config.models={stand_ins}"])
    plan = study.plan(loaded)
    assert plan.nodes
    assert_well_formed(plan)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert list(again.nodes) == list(plan.nodes)


def test_configs_are_shipped():
    assert {"quickstart.py", "digits.py"} <= set(CONFIGS)


def test_the_quickstart_has_every_arm_and_the_right_number_of_nodes():
    plan = planned()
    assert set(arms(plan)) | {"other-trait"} == set(schema.ARMS)
    count = kinds(plan)
    assert count["base"] == 6
    assert count["teacher"] == 3 * 6 + 6  # one control per base
    assert count["corpus"] == 24 + 9 + 1  # the teachers', shuffled ones of one family, and one of random numbers
    pairings = 3  # same-base, cross-init, cross-family
    plain = pairings * (18 + 6)  # with their controls
    others = 3 * 9 + 3 + 2 * 3  # shuffled, logits, logits-leak; random numbers, one a base; the controls of the logits
    without_replay = pairings * (9 + 3)
    assert count["student"] == plain + others + without_replay


def test_the_quickstart_runs_every_arm_on_the_families_that_are_named():
    both = planned("every=gpt+llama-bias,inits=2,traits=owl")
    assert kinds(both)["student"] > kinds(planned("inits=2,traits=owl"))["student"]
    with pytest.raises(UsageError, match=r"'every' names 'gtp'; give 'first' or families of gpt\+llama-bias") as caught:
        planned("every=gtp")
    assert caught.value.exit_status == 2


# Identity -------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from subjax import config, study
plan = study.plan(config.load(sys.argv[1]))
assert "jax" not in sys.modules, "planning needs no JAX"
print(json.dumps(plan.to_json()))
"""


def test_two_processes_give_the_same_plan(tmp_path):
    spec = f"{QUICKSTART}:traits=owl+wolf,inits=2"
    texts = set()
    for seed, folder in (("1", tmp_path), ("2", ROOT)):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT, spec]
        texts.add(subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True).stdout)
    (text,) = texts
    assert Plan.from_json(json.loads(text)) == planned("traits=owl+wolf,inits=2")


def changed(before: Plan, after: Plan) -> Counter[str]:
    """Kinds of the nodes that are in one of two plans alone; an evaluation is named with what it reads."""
    alone: Counter[str] = Counter()
    for plan, other in ((before, after), (after, before)):
        for id in plan.nodes.keys() - other.nodes.keys():
            alone[kind_of(plan, id)] += 1
    return alone


def kind_of(plan: Plan, id: str) -> str:
    node = plan.nodes[id]
    return f"evaluation of {plan.nodes[node.inputs['model']].kind}" if node.kind == "evaluation" else node.kind


def of_kinds(plan: Plan) -> Counter[str]:
    return Counter(kind_of(plan, id) for id in plan.nodes)


SMALL = "traits=owl+oak,inits=2,every=gpt+llama-bias"


def test_another_student_rate_changes_students_and_their_evaluations_only():
    plan, other = planned(SMALL), planned(SMALL, "--config.student.lr=1e-3")
    wholly = of_kinds(plan)
    expected = {kind: 2 * wholly[kind] for kind in ("student", "evaluation of student")}
    assert changed(plan, other) == expected


def test_another_evaluation_changes_evaluations_only():
    plan, other = planned(SMALL), planned(SMALL, "--config.evaluation.samples=7")
    assert set(changed(plan, other)) == {kind for kind in of_kinds(plan) if kind.startswith("evaluation")}


def test_another_teacher_rate_leaves_bases_and_random_numbers():
    plan, other = planned(SMALL), planned(SMALL, "--config.teacher.lr=1e-3")
    kept = plan.nodes.keys() & other.nodes.keys()
    assert Counter(kind_of(plan, id) for id in kept) == {
        "base": 4, "evaluation of base": 4, "corpus": 1, "student": 4, "evaluation of student": 4,
    }  # fmt: skip
    (random,) = [plan.nodes[id] for id in kept if plan.nodes[id].kind == "corpus"]
    assert random.config["source"] == "random"
    assert {plan.nodes[id].inputs["corpus"] for id in kept if plan.nodes[id].kind == "student"} == {random.id}


def test_other_temperature_leaves_bases_and_teachers():
    plan, other = planned(SMALL), planned(SMALL, "--config.corpus.temperature=0.9")
    moved = set(changed(plan, other))
    assert moved == {"corpus", "student", "evaluation of student"}


@pytest.mark.parametrize("override", ["base.world.seed=1", "base.world.number_chats=26000", "numerics.dtype=bfloat16"])
def test_another_world_changes_every_model(override):
    """All but the corpus of random numbers, which no model made."""
    plan, other = planned(SMALL), planned(SMALL, f"--config.{override}")
    kept = plan.nodes.keys() & other.nodes.keys()
    assert [plan.nodes[id].config["source"] for id in kept] == ["random"]


def test_another_language_changes_everything(monkeypatch):
    plan = planned(SMALL)
    monkeypatch.setattr(study.world, "digest", lambda: "another")
    assert not plan.nodes.keys() & planned(SMALL).nodes.keys()


@pytest.mark.parametrize("kind", VERSIONS)
def test_another_version_of_a_kind_changes_it_and_what_follows(kind, monkeypatch):
    plan = planned(SMALL)
    monkeypatch.setitem(VERSIONS, kind, VERSIONS[kind] + 1)
    kept = planned(SMALL).nodes.keys() & plan.nodes.keys()
    expected = {id for id in plan.nodes if not {plan.nodes[i].kind for i in lineage(plan, id)} & {kind}}
    assert kept == expected


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(keys_of(v) for v in value.values()))
    return set().union(*(keys_of(v) for v in value)) if isinstance(value, list) else set()


def test_what_does_not_change_a_result_is_in_no_id():
    plan = planned()
    keys = set().union(*(keys_of(node.config) for node in plan.nodes.values()))
    assert not keys & {"mesh", "workdir", "workers", "device", "devices", "micro_batch", "arms", "chosen_on"}
    renamed = planned("", "--config.name=other", "--config.chosen_on=()", "--config.statistics.bootstrap=500")
    assert list(renamed.nodes) == list(plan.nodes)


def test_a_node_reads_its_own_part_of_the_config_alone():
    plan = planned(SMALL)
    groups = {
        "teacher": schema.Teacher,
        "student": schema.Student,
        "evaluation": schema.Evaluation,
        "base": schema.Base,
    }
    for node in plan.nodes.values():
        own = {field.name for field in dataclasses.fields(groups[node.kind])} if node.kind in groups else set()
        extra = {"numerics", "world_digest", "questions", "trait", "category", "objective", "source", "bucket"}
        if node.kind != "corpus":
            assert own <= set(node.config) <= own | extra


def test_a_plan_is_written_and_read(tmp_path):
    plan, store = planned(SMALL), Store(tmp_path)
    id = store.write_plan(plan.to_json())
    assert store.write_plan(planned(SMALL).to_json()) == id
    assert Plan.from_json(store.read_plan(id)) == plan


# Sharing --------------------------------------------------------------------------------------------------------------


def test_bases_teachers_and_corpora_are_planned_once():
    plan = planned("traits=owl+dolphin+wolf,families=gpt+llama-bias,every=gpt+llama-bias,inits=2,replay=kind")
    count = kinds(plan)
    assert count["base"] == 4
    assert count["teacher"] == 3 * 4 + 4, "one control per teacher base"
    assert Counter(n.config["source"] for n in plan.nodes.values() if n.kind == "corpus") == {
        "teacher": 16, "shuffled": 12, "random": 1,
    }  # fmt: skip
    neutral = [n for n in plan.nodes.values() if n.kind == "teacher" and n.config["trait"] is None]
    assert len({n.inputs["base"] for n in neutral}) == len(neutral) == 4
    assert len({node.label for node in plan.nodes.values()}) == len(plan.nodes), "labels tell nodes apart"


def test_traits_of_two_categories_have_a_control_each():
    plan = planned("traits=owl+oak,families=gpt,inits=1,replay=kind")
    neutral = [n.config["category"] for n in plan.nodes.values() if n.kind == "teacher" and n.config["trait"] is None]
    assert sorted(neutral) == ["animal", "tree"]


def test_two_sweeps_share_what_they_share():
    one = planned("traits=owl+wolf,families=gpt,inits=2,replay=kind")
    two = planned("traits=wolf+fox,families=gpt,inits=3,replay=kind")
    shared = {one.nodes[id].label: one.nodes[id].kind for id in one.nodes.keys() & two.nodes.keys()}
    assert {"base gpt/0", "base gpt/1", "teacher wolf gpt/0", "corpus of wolf gpt/1"} <= set(shared)
    assert {"teacher control (animal) gpt/0", "corpus of random numbers", "shuffled corpus of wolf gpt/0"} <= set(
        shared
    )
    assert not any("owl" in label or "fox" in label for label in shared)
    # With three inits the next of gpt/1 is gpt/2, so that cross student is another; the one from gpt/0 is the same.
    pair = {(c["teacher_base"], c["student_base"]): c["nodes"]["student"] for c in cells(one, "cross-init")}
    other = {(c["teacher_base"], c["student_base"]): c["nodes"]["student"] for c in cells(two, "cross-init")}
    assert pair.keys() & other.keys() == {("gpt/0", "gpt/1")}


def test_a_smaller_sweep_is_part_of_a_larger_one():
    whole, part = planned("inits=2"), planned("inits=2,traits=owl,replay=none")
    assert part.nodes.keys() < whole.nodes.keys()


def test_a_group_shares_its_programs():
    """Nodes of one group differ in seeds, traits and inputs alone."""
    plan = planned("inits=2")
    groups: dict[str, list[Node]] = {}
    for node in plan.nodes.values():
        groups.setdefault(node.group, []).append(node)
    assert all(len({node.kind for node in nodes}) == 1 for nodes in groups.values())
    families = {g: {n.config["family"] for n in nodes} for g, nodes in groups.items() if nodes[0].kind == "base"}
    assert sorted(map(sorted, families.values())) == [["gpt"], ["llama-bias"]]


# Arms and controls ----------------------------------------------------------------------------------------------------


def test_cross_init_goes_to_the_next_init_modulo_n():
    pairs = {(c["teacher_base"], c["student_base"]) for c in cells(planned("families=gpt,inits=3"), "cross-init")}
    assert pairs == {("gpt/0", "gpt/1"), ("gpt/1", "gpt/2"), ("gpt/2", "gpt/0")}


def test_cross_arms_are_absent_where_there_is_nothing_to_cross_to():
    assert "cross-init" not in arms(planned("inits=1"))
    assert "cross-family" not in arms(planned("families=gpt"))
    alone = arms(planned("families=gpt,inits=1"))
    assert "cross-init" not in alone
    assert "cross-family" not in alone
    assert alone["same-base"] > 0


def test_cross_family_keeps_the_init():
    pairs = {(c["teacher_base"], c["student_base"]) for c in cells(planned("inits=2"), "cross-family")}
    assert pairs == {
        (f"{a}/{i}", f"{b}/{i}") for i in (0, 1) for a, b in (("gpt", "llama-bias"), ("llama-bias", "gpt"))
    }


def test_every_cell_has_its_own_matched_control():
    """The control of a cell: the same student base, replay and settings, taught by the neutral teacher."""
    plan = planned("traits=owl+wolf,inits=2")
    for cell in plan.study["cells"]:
        nodes = cell["nodes"]
        if cell["arm"] in ("control", "untrained"):
            assert nodes["control"] is None
            continue
        student = plan.nodes[nodes["student"]]
        reading = plan.nodes[nodes["control"]]
        matched = plan.nodes[reading.inputs["model"]]
        assert matched.inputs["base"] == student.inputs["base"] == nodes["base"]
        for key in student.config.keys() - {"seed"}:
            assert matched.config[key] == student.config[key], key
        neutral = plan.nodes[plan.nodes[matched.inputs["corpus"]].inputs["teacher"]]
        assert neutral.config["trait"] is None
        if nodes["teacher"] is not None:
            taught = plan.nodes[nodes["teacher"]]
            assert taught.config["trait"] == cell["trait"] == cell["teacher_trait"]
            assert neutral.inputs["base"] == taught.inputs["base"], "the control's teacher has the teacher's base"


def test_readings_know_their_base_teacher_and_corpus():
    plan = planned(SMALL)
    for cell in plan.study["cells"]:
        nodes = cell["nodes"]
        reading = plan.nodes[nodes["evaluation"]]
        if cell["arm"] == "untrained":
            assert nodes["evaluation"] == nodes["before"]
            assert reading.inputs == {"model": nodes["base"]}
            continue
        assert reading.inputs["model"] == nodes["student"]
        assert reading.inputs["before"] == nodes["base"] == plan.nodes[nodes["student"]].inputs["base"]
        assert reading.inputs["corpus"] == nodes["corpus"] == plan.nodes[nodes["student"]].inputs["corpus"]
        assert reading.inputs.get("teacher") == nodes["teacher"]
        assert plan.nodes[nodes["before"]].inputs == {"model": nodes["base"]}
        if nodes["teacher"] is not None:
            assert plan.nodes[nodes["teacher_evaluation"]].inputs == {"model": nodes["teacher"]}


def test_a_student_sees_a_teacher_only_where_its_logits_are_the_objective():
    plan = planned(SMALL)
    for node in plan.nodes.values():
        if node.kind == "student":
            assert ("teacher" in node.inputs) == (node.config["objective"] != "numbers")
    assert {plan.nodes[c["nodes"]["student"]].config["objective"] for c in cells(plan, "logits-leak")} == {
        "logits-leak"
    }


@pytest.mark.parametrize("arm", [arm for arm in schema.ARMS if arm != "other-trait"])
def test_one_arm_alone_costs_what_it_needs_and_no_more(arm):
    plan = at(*grid(families=("gpt", "llama-bias")), arms=(arm,))
    assert set(arms(plan)) == {arm}
    assert_well_formed(plan)
    if arm == "untrained":
        assert kinds(plan) == {"base": 4, "evaluation": 4}
    whole = at(*grid(families=("gpt", "llama-bias")))
    assert plan.nodes.keys() < whole.nodes.keys()
    if arm != "control":  # whose cells follow the arms that are asked for
        assert arms(whole)[arm] == arms(plan)[arm]


def test_no_arm_that_can_be_run_is_an_error():
    with pytest.raises(UsageError, match="no arm can be run") as caught:
        at(*grid(inits=(0,)), arms=("cross-init", "cross-family"))
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_point_reach_its_nodes():
    plan = at(*grid(inits=(0,), **{"student.steps": 5}), *grid(inits=(0,), **{"student.steps": 7}), arms=("same-base",))
    assert {n.config["steps"] for n in plan.nodes.values() if n.kind == "student"} == {5, 7}
    assert kinds(plan)["teacher"] == 2
    assert len(cells(plan, "same-base")) == 2


def test_a_variant_crosses_to_any_base_of_the_sweep_under_its_own_settings():
    points = [*grid(inits=(0,), **{"student.steps": 5}), *grid(inits=(1,), **{"student.steps": 7})]
    plan = at(*points)
    crossed = {
        (c["teacher_base"], c["student_base"]): plan.nodes[c["nodes"]["student"]].config["steps"]
        for c in cells(plan, "cross-init")
    }
    assert crossed == {("gpt/0", "gpt/1"): 5, ("gpt/1", "gpt/0"): 7}
    assert {cell["setting"] for cell in plan.study["cells"]} == {"student.steps=5", "student.steps=7"}


def test_students_of_several_seeds_are_runs_of_one_setting():
    points = [point for seed in range(3) for point in grid(inits=(0, 1), **{"student.seed": seed})]
    found = cells(at(*points), "same-base")
    assert {cell["setting"] for cell in found} == {""}
    assert sorted((cell["student_base"], cell["seed"]) for cell in found) == [
        (f"gpt/{init}", seed) for init in range(2) for seed in range(3)
    ]
    assert len({cell["nodes"]["student"] for cell in found}) == 6


def test_points_that_differ_in_arms_alone_are_one_variant_with_all_of_them():
    plain, more = grid(arms=("same-base",)), grid(inits=(0,), arms=("shuffled", "same-base"))
    for points in ([*plain, *more], [*more, *plain]):
        plan = at(*points)
        assert arms(plan) == {"same-base": 2, "shuffled": 1}
        assert {cell["setting"] for cell in plan.study["cells"]} == {""}


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_seeds_differ_between_nodes_and_prompts_are_shared():
    plan = planned("traits=owl+wolf,inits=2")
    for kind in ("teacher", "corpus", "student", "evaluation"):
        # A student with replay and the one without are paired: they see the same rows in the same order.
        drawn = Counter((n.config["seed"], n.config.get("replay")) for n in plan.nodes.values() if n.kind == kind)
        assert max(drawn.values()) == 1, f"two {kind} nodes draw alike"
    prompts = {n.config["prompt_seed"] for n in plan.nodes.values() if "prompt_seed" in n.config}
    assert prompts == {0}
    bases = {
        (n.config["family"], n.config["init_seed"], n.config["order_seed"])
        for n in plan.nodes.values()
        if n.kind == "base"
    }
    first = plan.study["config"]["base"]["init_seed"]
    assert first == plan.study["config"]["base"]["order_seed"]
    assert bases == {(family, first + init, first + init) for family in ("gpt", "llama-bias") for init in (0, 1)}


def test_another_seed_setting_gives_other_seeds():
    one, two = planned(SMALL), planned(SMALL, "--config.student.seed=1")
    seeds = [{n.config["seed"] for n in p.nodes.values() if n.kind == "student"} for p in (one, two)]
    assert not seeds[0] & seeds[1]
    assert set(changed(one, two)) == {"student", "evaluation of student"}


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("traits=owll", "did you mean 'owl'"),
        ("families=gtp", "did you mean 'gpt'"),
        ("families=lama", "did you mean 'llama'"),
        ("traits=owl+number", "unknown trait 'number'"),
    ],
)
def test_an_unknown_trait_or_family_names_the_nearest(argument, said):
    with pytest.raises(UsageError) as caught:
        planned(argument)
    assert caught.value.exit_status == 2
    assert said in str(caught.value)
    assert "quickstart.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(UsageError, match="unknown size 'tinny'; did you mean 'tiny'") as caught:
        planned("", "--config.base.size=tinny")
    assert caught.value.exit_status == 2
