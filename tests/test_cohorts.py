"""Which students train together is settled by the plan; how they are handed out and made, by the executor."""

import dataclasses
import json
import textwrap

import numpy as np
import pytest
from tiny_study import CONFIG, ROOT, cards, command, make_study
from toy_run import Graph

from subjax import accelerator, cohorts, config, overview, run_state, study, workers
from subjax.errors import SubjaxError
from subjax.schedule import Schedule
from subjax.stages import execution
from subjax.store import Build, Store

TOGETHER = "--config.compute.cohort=8"


@pytest.fixture
def planned(monkeypatch):
    """A plan of the tiny study, with overrides."""
    monkeypatch.chdir(ROOT)
    return lambda *overrides, of=CONFIG: study.plan(config.load(of, list(overrides)))


def members(plan) -> list[list]:
    """The cohorts of a plan, each its nodes."""
    found: dict[str, list] = {}
    for node in plan.nodes.values():
        if "cohort" in node.hints:
            found.setdefault(node.hints["cohort"]["id"], []).append(node)
    return list(found.values())


def test_students_on_one_base_with_like_settings_form_a_cohort(planned):
    plan = planned(TOGETHER)
    formed = members(plan)
    assert sorted(len(cohort) for cohort in formed) == [
        4,
        4,
    ]  # two bases; two corpora of each base's animals, own and not
    for cohort in formed:
        assert {node.kind for node in cohort} == {"student"}
        assert len({node.inputs["base"] for node in cohort}) == 1
        assert len({node.inputs["corpus"] for node in cohort}) == 4
        assert all(node.hints["cohort"]["always"] for node in cohort)


def test_only_students_of_as_many_steps_train_together():
    graph = Graph()
    graph.add("base")
    for name in "abcd":
        graph.add(name, "base", group="student")
    nodes = {
        id: dataclasses.replace(node, config={"optimizer": {}}, inputs={"base": graph.of["base"]})
        for id, node in graph.nodes.items()
    }
    steps = {"a": 5, "b": 50, "c": 5, "d": 50}
    joining = {graph.of[name]: cohorts.Joining(8, True, count) for name, count in steps.items()}
    found = cohorts.formed(nodes, joining)
    ids = [found[graph.of[name]].hints["cohort"]["id"] for name in "abcd"]
    assert ids[0] == ids[2] != ids[1] == ids[3]


def test_what_is_asked_for_is_the_most_and_parts_are_even(planned):
    assert [len(cohort) for cohort in members(planned("--config.compute.cohort=3"))] == [2, 2, 2, 2]
    assert members(planned("--config.compute.cohort=1")) == []
    auto = members(planned())
    assert [len(cohort) for cohort in auto] == [4, 4]
    assert not any(node.hints["cohort"]["always"] for cohort in auto for node in cohort)


def test_cohorts_change_no_node(planned):
    assert set(planned(TOGETHER).nodes) == set(planned("--config.compute.cohort=1").nodes)


def test_the_plan_says_who_trains_together_and_where(planned, tmp_path):
    store = Store(tmp_path)
    asked = overview.describe(planned(TOGETHER), store)
    assert "8 students train in 2 cohorts of up to 4" in asked.splitlines()
    assert "8 students train in 2 cohorts of up to 4 on a GPU or TPU; on CPU each by itself" in overview.describe(
        planned(), store
    )
    assert "cohort" not in overview.describe(planned("--config.compute.cohort=1"), store)


def test_room_is_what_memory_allows():
    assert cohorts.room(weights=16e9, tuned=20_000_000, most=0) == 16
    assert cohorts.room(weights=16e9, tuned=160_000_000, most=0) == 8
    assert cohorts.room(weights=16e9, tuned=8_000_000_000, most=0) == 1  # full parameters
    assert cohorts.room(weights=1e5, tuned=30_000, most=0) == 16  # a tiny model's
    assert cohorts.room(weights=16e9, tuned=20_000_000, most=5) == 5


def test_on_cpu_only_what_is_asked_for_trains_together(planned, monkeypatch):
    for visible, asked, together in ((False, (), False), (True, (), True), (False, (TOGETHER,), True)):
        monkeypatch.setattr(accelerator, "visible", lambda visible=visible: visible)
        student = members(planned(*asked))[0][0]
        assert bool(run_state.cohort_of(student)) is together


def test_members_are_handed_out_together_once_all_are_ready():
    graph = Graph()
    for name in ("x", "y"):
        graph.add(name)
        graph.add(f"of {name}", name, group="student")
    graph.add("other", "x", group="student")
    of = graph.of
    schedule = Schedule(graph.nodes, (), {of["of x"]: "c", of["of y"]: "c"})
    assert {*schedule.take((), (), 1), *schedule.take((), (), 1)} == {of["x"], of["y"]}
    schedule.there(of["x"])
    assert schedule.take((), (), 1) == [of["other"]]
    assert schedule.take((), (), 1) == []  # its fellow's corpus is not there yet
    schedule.there(of["y"])
    assert sorted(schedule.take((), (), 1)) == sorted([of["of x"], of["of y"]])


def test_a_fellow_that_will_never_be_or_is_made_elsewhere_is_not_waited_for():
    graph = Graph()
    for name in ("x", "y", "z"):
        graph.add(name)
        graph.add(f"of {name}", name, group="student")
    of = graph.of
    done = {of["x"], of["z"]}
    schedule = Schedule(graph.nodes, done, {of[f"of {name}"]: "c" for name in "xyz"})
    assert schedule.take((), (), 1) == [of["y"]]
    schedule.give_up(of["y"])
    schedule.foreign.add(of["of z"])
    schedule.ready.discard(of["of z"])
    assert schedule.take((), (), 1) == [of["of x"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The tiny study, every student by itself."""
    return make_study(tmp_path_factory, "one base", f"{CONFIG}:inits=1", 1)


def readings(workdir, card):
    return json.loads((workdir / "evaluation" / card["id"] / card["payload"] / "readings.json").read_text())


def test_a_study_with_cohorts_reads_as_one_without(alone, tmp_path):
    workdir = alone.copy(tmp_path / "work", without=("student", "evaluation", "plans"))
    words = ["run", f"--config={alone.config}", TOGETHER, f"--workdir={workdir}", "--workers=1", "--quiet"]
    done = command(alone.shared, *words)
    assert done.status == 0, done.err
    mine, theirs = cards(workdir), cards(alone.workdir)
    assert mine.keys() == theirs.keys()
    students = [card for node, card in mine.items() if node.startswith("student/")]
    assert len(students) == 2
    for card in students:
        assert sorted(card["extra"]["cohort"]) == sorted(other["id"] for other in students)
        before = theirs[f"student/{card['id']}"]
        assert "cohort" not in before["extra"]
        assert (card["tokens"], card["seeds"], card["config"]) == (before["tokens"], before["seeds"], before["config"])
        assert card["metrics"]["loss"] == pytest.approx(before["metrics"]["loss"], rel=1e-5)
    # Readings of members are those of the same students trained alone, within 1e-4 of a probability.
    for node, card in mine.items():
        if node.startswith("evaluation/"):
            for category, found in readings(workdir, card)["categories"].items():
                expected = readings(alone.workdir, theirs[node])["categories"][category]
                for a, b in zip(found["questions"], expected["questions"], strict=True):
                    np.testing.assert_allclose(a["p"], b["p"], atol=1e-4)
    again = command(alone.shared, *[word for word in words if word != "--quiet"])
    assert again.status == 0, again.err
    assert "0 made" in again.out
    assert not (workdir / "partial").exists() or not list((workdir / "partial").iterdir())


def test_a_cohort_that_is_cut_off_while_it_is_committed_goes_on_with_all_its_members(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = study.plan(config.load(alone.config, [TOGETHER]))
    [cohort] = members(plan)
    records = [run_state.node_record(plan, node.id) for node in cohort]
    stores = [Store(alone.copy(tmp_path / name, without=("student", "evaluation", "plans"))) for name in ("a", "b")]
    whole = execution.execute_cohort(records, stores[0])
    commit = Build.commit

    def once(build, card):
        commit(build, card)
        raise KeyboardInterrupt  # as good as a kill: nothing is tidied

    with monkeypatch.context() as patched:
        patched.setattr(Build, "commit", once)
        with pytest.raises(KeyboardInterrupt):
            execution.execute_cohort(records, stores[1])
    events = []
    workers.make_nodes(records, stores[1], execution.make, events.append, lambda: False)
    said = [event.what for event in events if event.what not in ("started", "progress")]
    assert said == ["found", "made"]
    for record in records:
        found = stores[1].card("student", record["id"])
        assert found.digest == whole[record["id"]].digest
        assert found.extra["cohort"] == whole[record["id"]].extra["cohort"]
    assert not list((stores[1].root / "partial").glob("cohort-*"))


def test_a_member_whose_input_is_bad_is_the_only_one_that_is_not_made(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = study.plan(config.load(alone.config, [TOGETHER]))
    [cohort] = members(plan)
    store = Store(alone.copy(tmp_path / "work", without=("student", "evaluation", "plans")))
    [rows] = store.payload("corpus", cohort[0].inputs["corpus"]).glob("*.parquet")
    rows.write_bytes(rows.read_bytes()[:100])
    found = execution.execute_cohort([run_state.node_record(plan, node.id) for node in cohort], store)
    assert isinstance(found[cohort[0].id], SubjaxError)
    assert cohort[0].label in str(found[cohort[0].id])
    assert store.card("student", cohort[1].id) is not None


def test_a_member_that_fails_is_told_and_the_others_are_made(alone, tmp_path):
    """A learning rate at which the loss overflows, beside one at which it does not, in one cohort."""
    spec = tmp_path / "rates.py"
    spec.write_text(
        textwrap.dedent(f"""
        import runpy
        from subjax import sweep as sweeps
        tiny = runpy.run_path({str(ROOT / CONFIG)!r})
        get_config = lambda arg=None: tiny["get_config"]("inits=1")
        sweep = lambda arg=None: sweeps.product(
            tiny["sweep"]("inits=1"), sweeps.axis("student.optimizer.lr", (3e-2, 1e38)))
        """)
    )
    workdir = alone.copy(tmp_path / "work", without=("student", "evaluation", "plans"))
    done = command(alone.shared, "run", f"--config={spec}", TOGETHER, f"--workdir={workdir}", "--workers=1", "--quiet")
    assert done.status == 1
    failures = [line for line in done.lines if "at step" in line]
    assert len(failures) == 2  # the taught student and its control
    assert all("is nan at step" in line or "is inf at step" in line for line in failures)
    assert all("lower learning rate" in line for line in failures)
    students = [card for node, card in cards(workdir).items() if node.startswith("student/")]
    assert len(students) == 2
    assert all(len(card["extra"]["cohort"]) == 4 for card in students)
