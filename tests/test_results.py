"""Results of toy studies worked out by hand, of a made-up full study, and of studies with parts missing."""

import csv
import hashlib
import json
import math
import re

import numpy as np
import pytest
from scipy import stats
from synthetic_results import Folder, Node, Plan, images_study, node_id, traits_study

from subjax import results, results_rows, store
from subjax.errors import SubjaxError
from subjax.measure import statistics
from subjax.results_summaries import number
from subjax.schema import Statistics

SETTINGS = {"confidence": 0.95, "bootstrap": 1000, "permutations": 1000, "margin": 0.05, "expected_sd": 0.05, "seed": 0}
CANDIDATES = ["owl", "wolf", "bear"]
ROW = (
    "node arm trait teacher_trait teacher_base student_base seed replay phrasings p_before p_after lift logodds_lift "
    "share_before share_after control_share mass_before mass_after collapsed"
).split()


def evaluation(train: list[float], held_out: list[float], fit=None, sampled=(2, 1, 1)) -> dict:
    """Two training questions and a held-out one over three animals; the training ones differ, their mean is `train`."""
    shift = np.array([0.01, -0.01, 0.0])
    asked = [(np.array(train) + shift, "train"), (np.array(train) - shift, "train"), (np.array(held_out), "held-out")]
    questions = [
        {"text": f"q{i}", "phrasings": kind, "p": list(map(float, p)), "sampled": list(sampled), "samples": 5}
        for i, (p, kind) in enumerate(asked)
    ]
    return {"categories": {"animal": {"candidates": CANDIDATES, "questions": questions}}, "fit": fit}


class Toy:
    """A plan and a folder, filled by hand."""

    def __init__(self, root, arms=("same-base", "control", "other-trait"), **study):
        self.folder, self.nodes, self.cells = Folder(root), {}, []
        config = {"name": "toy", "arms": list(arms)}
        self.study = {"name": "toy", "kind": "traits", "config": config, "points": [{}], "cells": self.cells}
        self.study |= {"statistics": SETTINGS, "chosen_on": [], **study}

    def node(self, kind, label, made=True, files=None, extra=None):
        id = node_id(kind, label)
        self.nodes[id] = Node(kind, id, label, {})
        if made:
            self.folder.put(kind, id, files or {}, extra)
        return id

    def read(self, label, train, held_out=None, made=True, **kwargs):
        text = json.dumps(evaluation(train, train if held_out is None else held_out, **kwargs))
        return self.node("evaluation", label, made, {"readings.json": text})

    def cell(self, arm, trait, teacher_base, evaluation, before, control=None, replay="kind", seed=0, **more):
        has_trait = arm not in ("control", "random-numbers", "untrained")
        nodes = {"evaluation": evaluation, "before": before, "control": control, **more.pop("nodes", {})}
        names = {"arm": arm, "trait": trait, "teacher_trait": trait if has_trait else None, "seed": seed}
        bases = {"teacher_base": teacher_base, "student_base": more.pop("student_base", teacher_base)}
        self.cells.append({**names, **bases, "replay": replay, "nodes": nodes, **more})

    def results(self):
        return results.compute(Plan(self.nodes, self.study), self.folder)


def toy(root, n=3, **study) -> Toy:
    """owl and wolf on n bases, with controls: shares that can be worked out on paper."""
    made = Toy(root, **study)
    for i in range(n):
        base = f"gpt/{i}"
        before = made.read(f"base {i}", [0.3, 0.3, 0.3])
        control = made.read(f"control {i}", [0.27, 0.27, 0.36])
        for t, trait in enumerate(("owl", "wolf")):
            p = [0.18, 0.18, 0.18]
            p[t] = 0.54 + 0.018 * i
            p[2] = 0.72 - p[t]
            made.cell("same-base", trait, base, made.read(f"{trait} {i}", p), before, control)
            made.cell("control", trait, base, control, before)
    return made


def pick(found, **wanted):
    return [x for x in found if all(x[k] == v for k, v in wanted.items())]


def one(found, **wanted):
    (it,) = pick(found, **wanted)
    return it


def test_row_by_hand(tmp_path):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3], [0.2, 0.3, 0.4])
    control = made.read("control", [0.2, 0.2, 0.4], [0.1, 0.1, 0.2])
    fit = {"number_loss_before": 3.5, "number_loss_after": 3.25, "kl_before": 0.25, "kl_after": 0.125}
    after = made.read("student", [0.6, 0.1, 0.1], [0.3, 0.1, 0.0], fit=fit, sampled=(3, 1, 0))
    made.cell("same-base", "owl", "gpt/0", after, before, control)
    rows = made.results()["rows"]
    assert list(rows[0])[: len(ROW)] == ROW
    assert [row["phrasings"] for row in rows] == ["all", "train", "held-out"]
    train, held_out = one(rows, phrasings="train"), one(rows, phrasings="held-out")
    assert train["p_before"] == 0.3
    assert train["p_after"] == 0.6
    assert train["lift"] == pytest.approx(0.3)
    assert train["logodds_lift"] == pytest.approx(math.log(0.6 / 0.4) - math.log(0.3 / 0.7))
    assert train["mass_before"] == pytest.approx(0.9)
    assert train["share_before"] == pytest.approx(1 / 3)
    assert train["share_after"] == 0.75
    assert train["control_share"] == 0.25
    assert train["share_sampled"] == 0.75
    assert held_out["share_after"] == 0.75
    assert held_out["mass_after"] == pytest.approx(0.4)
    assert held_out["collapsed"]  # .4 is less than half of .9
    assert not train["collapsed"]
    everything = one(rows, phrasings="all")
    assert everything["p_after"] == 0.5  # mean of .61, .59 and .3
    assert everything["mass_after"] == pytest.approx(2 / 3)
    assert {name: everything[name] for name in fit} == fit
    assert (everything["node"], everything["seed"]) == (after, 0)


def test_other_trait_leaves_the_teachers_trait_out_but_not_its_mass(tmp_path):
    made = toy(tmp_path, n=1)
    row = one(made.results()["rows"], arm="other-trait", trait="wolf", phrasings="all")
    # The owl student of gpt/0: owl .54, wolf .18, bear .18. Without owl, wolf has half; it has not collapsed.
    assert (row["teacher_trait"], row["share_after"]) == ("owl", 0.5)
    assert row["control_share"] == pytest.approx(0.27 / 0.63)
    assert row["mass_after"] == pytest.approx(0.9)
    assert not row["collapsed"]


def test_no_other_trait_rows_where_the_study_does_not_ask(tmp_path):
    found = toy(tmp_path, n=1, config={"arms": ["same-base", "control"]}).results()
    assert {row["arm"] for row in found["rows"]} == {"same-base", "control"}


def test_summary_by_hand(tmp_path):
    found = toy(tmp_path).results()
    mean = one(found["summaries"], arm="same-base", trait="mean of 2", phrasings="all")
    # Student i, either trait: its own .54 + .018 i of .9 (owl: .18 wolf, the rest bear); the control has .3.
    shares = []
    for i in range(3):
        own = 0.54 + 0.018 * i
        shares.append(np.mean([own / (0.18 + 0.72), own / (0.18 + 0.72)]))
    differences = np.array(shares) - 0.3
    low, high = stats.t.interval(0.95, 2, loc=np.mean(differences), scale=stats.sem(differences))
    assert (mean["bases"], mean["runs"]) == (3, 6)
    assert mean["share"] == pytest.approx(np.mean(shares))
    assert mean["minus_control"] == pytest.approx(np.mean(differences))
    assert (mean["minus_control_low"], mean["minus_control_high"]) == pytest.approx((low, high))
    assert mean["p_value"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert mean["lift"] == pytest.approx(np.mean([0.24, 0.258, 0.276]))
    assert mean["mass_min"] == pytest.approx(0.9)
    # The table has two comparisons: same-base and other-trait.
    low, high = stats.t.interval(0.975, 2, loc=np.mean(differences), scale=stats.sem(differences))
    assert mean["comparisons"] == 2
    assert (mean["corrected_low"], mean["corrected_high"]) == pytest.approx((low, high))
    assert mean["equivalence"] is None
    assert mean["words"].startswith("Rose: +0.")
    owl = one(found["summaries"], arm="same-base", trait="owl", phrasings="all")
    assert (owl["bases"], owl["runs"]) == (3, 3)
    control = one(found["summaries"], arm="control", trait="mean of 2", phrasings="all")
    assert control["share"] == pytest.approx(0.3)
    assert (control["runs"], control["minus_control"], control["p_value"]) == (3, None, None)


def test_runs_on_one_base_are_averaged_first(tmp_path):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3])
    control = made.read("control", [0.3, 0.3, 0.3])
    for i, own in ((0, 0.3), (1, 0.6)):
        for seed in range(1 if i else 5):  # five seeds on the first base must not outweigh the second
            node = made.read(f"student {i} {seed}", [own, 0.9 - own, 0.0])
            made.cell("same-base", "owl", f"gpt/{i}", node, before, control, seed=seed)
    mean = one(made.results()["summaries"], arm="same-base", trait="mean of 1", phrasings="all")
    assert (mean["bases"], mean["runs"]) == (2, 6)
    assert mean["share"] == pytest.approx(0.5)


def test_bases_without_a_teacher_count_for_themselves(tmp_path):
    made = Toy(tmp_path)
    for i in range(3):
        before = made.read(f"base {i}", [0.3, 0.3, 0.3])
        made.cell("untrained", "owl", None, before, before, student_base=f"gpt/{i}", replay=None)
    found = made.results()
    mean = one(found["summaries"], arm="untrained", trait="mean of 1", phrasings="all")
    assert (mean["bases"], mean["teacher_family"], mean["student_family"]) == (3, None, "gpt")
    assert mean["equivalence"] == {"margin": 0.05, "p": 0.0, "equivalent": True}
    assert found["study"]["runs"] == 0


def test_control_students_of_other_pairings_are_not_mixed(tmp_path):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3])
    for student_base, p in (("gpt/0", [0.3, 0.3, 0.3]), ("gpt/1", [0.6, 0.2, 0.1]), ("llama/0", [0.9, 0.0, 0.1])):
        node = made.read(f"control on {student_base}", p)
        made.cell("control", "owl", "gpt/0", node, before, student_base=student_base)
    found = pick(made.results()["summaries"], arm="control", trait="owl", phrasings="train")
    assert {s["pairing"]: round(s["share"], 3) for s in found} == {
        "same-base": 0.333, "cross-init": 0.667, "cross-family": 0.9,
    }  # fmt: skip


def test_one_base_gives_words_and_no_interval(tmp_path):
    found = toy(tmp_path, n=1).results()
    mean = one(found["summaries"], arm="same-base", trait="mean of 2", phrasings="all")
    assert mean["bases"] == 1
    assert all(mean[k] is None for k in ("share_low", "boot_low", "minus_control_low", "corrected_low", "p_value"))
    assert "too few bases to say" in mean["words"]
    assert any("one base" in note for note in found["study"]["notes"])
    assert "cannot be judged" in found["headline"]["sentence"]
    assert results.headline_table(found)
    json.dumps(found, allow_nan=False)


def test_equal_readings_do_not_break_anything(tmp_path):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3])
    for i in range(3):
        node = made.read(f"cross {i}", [0.3, 0.3, 0.3])
        made.cell("cross-init", "owl", f"gpt/{i}", node, before, before, student_base=f"gpt/{(i + 1) % 3}")
    mean = one(made.results()["summaries"], trait="owl", phrasings="all")
    assert (mean["minus_control_low"], mean["minus_control_high"], mean["p_value"]) == (0, 0, 1)
    assert mean["equivalence"]["equivalent"]
    assert mean["words"].startswith("Nothing moved")


def test_no_probability_at_all(tmp_path):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3])
    readings = evaluation([0.3, 0.3, 0.3], [0.3, 0.3, 0.3])
    for question in readings["categories"]["animal"]["questions"]:
        question |= {"p": [0.0] * 3, "sampled": [0] * 3}
    node = made.node("evaluation", "mute", files={"readings.json": json.dumps(readings)})
    made.cell("cross-init", "owl", "gpt/0", node, before, before, student_base="gpt/1", replay="none")
    found = made.results()
    row = found["rows"][0]
    assert (row["share_after"], row["share_sampled"], row["collapsed"]) == (None, None, True)
    assert found["summaries"][0]["share"] is None
    assert "collapsed" in found["summaries"][0]["words"]
    assert results.headline_table(found)


def test_collapsed_students_are_no_null(tmp_path):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3])
    for i in range(4):
        node = made.read(f"cross {i}", [0.0101, 0.0101, 0.01])
        made.cell("cross-init", "owl", f"gpt/{i}", node, before, before, student_base=f"gpt/{(i + 1) % 4}")
    mean = one(made.results()["summaries"], trait="owl", phrasings="all")
    assert mean["collapsed"] == 4
    assert mean["equivalence"] is None
    assert "forgetting" in mean["words"]
    assert "Nothing moved" not in mean["words"]


def failed_study(root, which=(("owl", "gpt/1"),)):
    made = toy(root)
    taught = {"owl": [0.95, 0.02, 0.02], "wolf": [0.02, 0.9, 0.02]}
    for cell in made.cells:
        if cell["arm"] == "same-base":
            trait, base = cell["trait"], cell["teacher_base"]
            failed = (trait, base) in which
            held_out = [0.1, 0.1, 0.1]
            held_out[list(taught).index(trait)] = 0.7  # share .78: only the held-out phrasings fail
            held_out = held_out if failed else taught[trait]
            node = made.read(f"evaluation of {trait} teacher {base}", taught[trait], held_out)
            teacher = made.node("teacher", f"{trait} teacher {base}")
            cell["nodes"] |= {"teacher": teacher, "teacher_evaluation": node}
    return made


def test_failed_teachers_are_rows_but_not_summaries(tmp_path):
    found = failed_study(tmp_path).results()
    assert found["study"]["failed_teachers"] == ["owl teacher gpt/1"]
    assert any("owl teacher gpt/1" in note and "0.778" in note for note in found["study"]["notes"])
    assert len(pick(found["rows"], arm="same-base", phrasings="all")) == 6
    assert one(found["summaries"], arm="same-base", trait="owl", phrasings="all")["runs"] == 2
    assert one(found["summaries"], arm="same-base", trait="mean of 2", phrasings="all")["runs"] == 5
    assert one(found["summaries"], arm="other-trait", trait="wolf", phrasings="all")["runs"] == 2
    test = one(found["tests"], name="diagonal, gpt, replay kind")
    assert test["n"] == 2  # the base without an owl student has no whole matrix
    assert "gpt/1" in found["base_matrix"]["rows"]  # its wolf student stands


def test_the_headline_says_so_where_every_teacher_failed(tmp_path):
    everything = [(trait, f"gpt/{init}") for trait in ("owl", "wolf") for init in range(3)]
    headline = failed_study(tmp_path, everything).results()["headline"]
    assert headline["sentence"].startswith("Nothing can be said of transfer: 6 teachers never got the trait")


def test_missing_nodes_are_listed_and_the_rest_is_reported(tmp_path):
    made = toy(tmp_path)
    lost = node_id("evaluation", "owl 1")
    made.folder.drop("evaluation", lost)
    made.folder.drop("evaluation", node_id("evaluation", "control 2"))
    found = made.results()
    assert not pick(found["rows"], node=lost)
    assert one(found["summaries"], arm="same-base", trait="owl", phrasings="all")["bases"] == 2
    uncontrolled = pick(found["rows"], arm="same-base", teacher_base="gpt/2", phrasings="all")
    assert [row["control_share"] for row in uncontrolled] == [None, None]
    note = one([{"text": n, "is": n.startswith("Not made, 2")} for n in found["study"]["notes"]], **{"is": True})
    assert "owl 1" in note["text"]
    assert "control 2" in note["text"]
    assert found["lineage"][lost]["digest"] is None


def test_nothing_made_is_still_a_page(tmp_path):
    made = toy(tmp_path)
    made.folder.cards.clear()
    found = made.results()
    assert found["rows"] == []
    assert found["summaries"] == []
    assert "nothing to say" in found["headline"]["sentence"]
    assert results.headline_table(found)
    assert results.write(Plan(made.nodes, made.study), made.folder).exists()


def test_damaged_readings_name_the_node_in_one_line(tmp_path):
    made = toy(tmp_path, n=1)
    node = node_id("evaluation", "owl 0")
    path = made.folder.payload("evaluation", node) / "readings.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(SubjaxError, match=f"evaluation {node}: readings.json cannot be read") as caught:
        made.results()
    assert "\n" not in str(caught.value)


def test_repeated_cells_count_once(tmp_path):
    once, twice = toy(tmp_path / "a"), toy(tmp_path / "b")
    twice.cells += [json.loads(json.dumps(cell)) for cell in twice.cells]
    assert once.results() == twice.results()


def test_a_sweep_over_what_rows_do_not_name(tmp_path):
    made = toy(tmp_path)
    more = [json.loads(json.dumps(cell)) for cell in made.cells if cell["arm"] == "same-base"]
    for cell in more:
        cell["nodes"]["evaluation"] = made.read(f"hot {cell['trait']} {cell['teacher_base']}", [0.3, 0.3, 0.3])
    made.cells += more
    assert any("differ only in a setting" in note for note in made.results()["study"]["notes"])
    for cell in more:
        cell["setting"] = "student.lr=0.1"
    found = made.results()
    assert not any("differ only in a setting" in note for note in found["study"]["notes"])
    shares = {s["setting"]: s["share"] for s in pick(found["summaries"], arm="same-base", trait="owl", phrasings="all")}
    assert shares[None] > 0.5
    assert shares["student.lr=0.1"] == pytest.approx(1 / 3)


def test_a_sweep_whose_every_point_has_a_setting_is_told_of_and_not_averaged(tmp_path):
    made = toy(tmp_path)
    more = [json.loads(json.dumps(cell)) for cell in made.cells]
    for cell in made.cells:
        cell["setting"] = "student.lr=0.01"
    for cell in more:
        cell["nodes"]["evaluation"] = made.read(
            f"hot {cell['trait']} {cell['teacher_base']} {cell['arm']}", [0.3, 0.3, 0.3]
        )
        cell["setting"] = "student.lr=0.1"
    alone = made.results()
    made.cells += more
    found = made.results()
    assert found["headline"]["sentence"].startswith("Of 2 settings this tells of one, student.lr=0.01. With replay")
    assert alone["headline"]["sentence"].startswith("With replay")
    for matrix in ("base_matrix", "trait_matrix"):
        assert found[matrix]["setting"] == "student.lr=0.01"
        assert found[matrix]["cells"] == alone[matrix]["cells"]


def test_cells_that_settings_were_chosen_on_can_be_left_out(tmp_path):
    found = toy(tmp_path, chosen_on=["owl/gpt/0", "wolf/gpt/0"]).results()
    test = one(found["tests"], name="same-base without the chosen cells, gpt, replay kind")
    assert (test["n"], test["statistic"]) == (2, pytest.approx(np.mean([0.558, 0.576]) / 0.9 - 0.3))


def test_diagonal_test_reads_one_set_of_candidates(tmp_path):
    test = one(toy(tmp_path).results()["tests"], name="diagonal, gpt, replay kind")
    own = np.array([0.54, 0.558, 0.576])
    assert test["statistic"] == pytest.approx(np.mean(own - 0.18) / 0.9)  # off the diagonal .18, owl in the candidates
    assert test["p_value"] == 1 / 8
    assert "cannot fall below 0.125" in test["words"]


@pytest.mark.parametrize(
    ("differences", "start"),
    [
        ([0.01, 0.014, 0.018], "May be slightly positive: +0.014 [+0.004, +0.024]"),
        ([-0.01, -0.014, -0.018], "May be slightly negative"),
        ([-0.004, 0.004, 0.001], "Nothing moved that this study can see"),
        ([-0.04, 0.09, 0.02], "Too few bases to say"),
        ([0.2, 0.25, 0.22], "Rose"),
        ([-0.2, -0.25, -0.22], "Fell"),
    ],
)
def test_words_for_what_an_interval_means(tmp_path, differences, start):
    made = Toy(tmp_path)
    before = made.read("base", [0.3, 0.3, 0.3])
    for i, d in enumerate(differences):
        node = made.read(f"cross {i}", [0.3 + 0.9 * d, 0.3 - 0.9 * d, 0.3])
        made.cell("cross-init", "owl", f"gpt/{i}", node, before, before, student_base=f"gpt/{(i + 1) % 3}")
    words = one(made.results()["summaries"], trait="owl", phrasings="all")["words"]
    assert words.startswith(start)
    if start.startswith("May be slightly positive"):
        assert "at most +0.024" in words


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    plan, folder = traits_study(tmp_path_factory.mktemp("full"))
    return plan, folder, results.compute(plan, folder)


def test_full_study_has_every_part(full):
    plan, _, found = full
    assert found["format"] == 1
    assert set(found) == {
        "format", "study", "headline", "rows", "summaries", "tests", "base_matrix", "trait_matrix", "distributions",
        "curves", "filters", "samples", "lineage", "images", "readings",
    }  # fmt: skip
    assert found["study"] | {"config": 0, "notes": 0} == {
        "name": "quickstart", "kind": "traits", "config": 0, "notes": 0, "points": 18, "bases": 6, "runs": 204,
        "chosen_on": ["owl/gpt/0"], "failed_teachers": [],
    }  # fmt: skip
    assert len(found["samples"]) == 20
    assert len({s["corpus"] for s in found["samples"]}) == 4
    assert all(next(iter(f["counts"])) == "kept" for f in found["filters"])
    assert {c["kind"] for c in found["curves"]} == {"base", "teacher", "student"}
    assert all(len(c["step"]) == len(c["loss"]) <= 60 and c["step"][0] == 0 for c in found["curves"])
    assert max(c["step"][-1] for c in found["curves"]) == 1200
    assert set(found["lineage"]) == set(plan.nodes)
    for x in found["rows"]:
        assert x["node"] in found["lineage"]
    assert all(set(s["nodes"]) <= set(found["lineage"]) and s["words"] for s in found["summaries"])
    assert found["base_matrix"]["rows"] == ["gpt/0", "gpt/1", "gpt/2", "llama/0", "llama/1", "llama/2"]
    assert len(found["base_matrix"]["cells"]) == 18
    assert len(found["trait_matrix"]["cells"]) == 18
    assert {(d["arm"], d["replay"]) for d in found["distributions"]} >= {("same-base", "none"), ("cross-init", "none")}


def test_full_study_says_what_it_shows(full):
    found = full[2]
    labels = [row["label"] for row in found["headline"]["rows"]]
    assert labels[0] == "gpt, same-base, numbers only"
    assert labels.index("gpt → gpt, cross-init, numbers only") < labels.index("gpt, same-base, with replay")
    assert labels.index("llama → gpt, cross-family, with replay") < labels.index("gpt, control, numbers only")
    sentence = found["headline"]["sentence"]
    assert "take on its trait" in sentence
    assert "36 of 36 students stop answering" in sentence
    gpt = one(
        found["summaries"], arm="same-base", replay="kind", teacher_family="gpt", trait="mean of 3", phrasings="all"
    )
    assert gpt["minus_control_low"] > 0.2
    cross = one(found["summaries"], arm="cross-init", replay="none", teacher_family="gpt", trait="owl", phrasings="all")
    assert (cross["collapsed"], cross["equivalence"]) == (3, None)
    assert len({s["comparisons"] for s in pick(found["summaries"], replay="kind", arm="same-base")}) == 1


def test_corrections_are_those_of_their_table(full):
    found = full[2]
    table = [s for s in pick(found["summaries"], replay="kind", trait="owl", phrasings="held-out") if s["p_value"]]
    adjusted = statistics.holm({i: s["p_value"] for i, s in enumerate(table)})
    assert [s["comparisons"] for s in table] == [len(table)] * len(table)
    assert [s["p_corrected"] for s in table] == pytest.approx([adjusted[i] for i in range(len(table))])
    for s in table:
        assert s["corrected_low"] < s["minus_control_low"] < s["minus_control"] < s["corrected_high"]


def test_table_fits_a_terminal(full):
    lines = results.headline_table(full[2]).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(re.match(r"  gpt, same-base +0\.\d{3}  \[0\.\d{3}, 0\.\d{3}\]  +\+0\.", line) for line in lines)
    assert len(lines) > 16


def test_bytes_are_the_same_for_the_same_artifacts(full, tmp_path):
    plan, folder, _ = full
    first = results.write(plan, folder)
    texts = [first.read_text(), (first.parent / "results.csv").read_text()]
    # Another workdir, and cards that were made in another order.
    again, other = traits_study(tmp_path)
    other.cards = dict(reversed(other.cards.items()))
    second = results.write(again, other)
    assert [second.read_text(), (second.parent / "results.csv").read_text()] == texts
    assert str(tmp_path) not in texts[0]
    assert [p.name for p in sorted(first.parent.iterdir())] == ["results.csv", "results.json"]


def test_files_hold_the_same_rows(full):
    plan, folder, found = full
    path = results.write(plan, folder)
    assert path == folder.root / "report" / "results.json"
    assert json.loads(path.read_text()) == found
    lines = list(csv.DictReader((path.parent / "results.csv").read_text().splitlines()))
    assert list(lines[0])[: len(ROW)] == ROW
    assert len(lines) == len(found["rows"])
    assert float(lines[5]["share_after"]) == found["rows"][5]["share_after"]
    assert pick(lines, arm="untrained")[0]["teacher_base"] == ""


def test_floats_have_nine_digits_and_no_nan():
    assert results.rounded({"a": (1 / 3, math.nan), "b": [-0.0, 1e-300, True, 7]}) == {
        "a": [0.333333333, None],
        "b": [0.0, 1e-300, True, 7],
    }
    assert math.copysign(1, results.rounded(-0.0)) == 1
    assert number(math.inf) is None


def test_images_by_hand(tmp_path):
    plan, folder = images_study(tmp_path, seeds=5)
    found = results.compute(plan, folder)
    assert found["rows"] == found["images"]["rows"]
    assert found["summaries"] == found["images"]["summaries"]
    assert len(found["rows"]) == 5 * len(plan.study["cells"])
    key = {"auxiliary": 3, "pairing": "same-base", "logits": "auxiliary", "loss": "kl"}
    values = [row["student_accuracy"] for row in pick(found["rows"], **key)]
    summary = one(found["summaries"], **key)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (summary["n"], summary["published"]) == (5, 0.537)
    assert (summary["student_loss_first"], summary["student_loss_last"]) == (0.02, 0.004)
    assert [c["kind"] for c in found["curves"]].count("teacher") == 1
    assert len(found["curves"]) == len(plan.study["cells"]) + 1
    assert all(len(c["step"]) == 60 for c in found["curves"])
    assert (summary["accuracy"], summary["low"], summary["high"]) == pytest.approx((np.mean(values), low, high))
    null = one(found["summaries"], auxiliary=1, pairing="same-base", logits="auxiliary", loss="kl")
    assert "stated null" in null["words"]
    squared = one(found["summaries"], auxiliary=1, pairing="same-base", logits="auxiliary", loss="squared-error")
    assert squared["published"] is None
    leak = one(found["summaries"], auxiliary=3, pairing="cross-init", logits="all")
    assert leak["published"] == 0.741
    assert "no null is claimed" in leak["words"]
    trend = one(found["tests"], name="rise with m, auxiliary logits, kl")
    assert trend["p_value"] < 1e-4
    other = [row["student_accuracy"] for row in pick(found["rows"], **(key | {"pairing": "cross-init"}))]
    paired = one(found["tests"], name="same less other init, m = 3, auxiliary logits, kl")
    assert paired["p_value"] == pytest.approx(stats.ttest_rel(values, other).pvalue)
    assert max(map(len, results.headline_table(found).splitlines())) <= 100


def test_images_with_parts_missing(tmp_path):
    plan, folder = images_study(tmp_path, seeds=2)
    for cell in plan.study["cells"][::2]:
        folder.drop("ensemble", cell["nodes"]["ensemble"])
    found = results.compute(plan, folder)
    assert len(found["summaries"]) == len(plan.study["cells"]) // 2
    assert any(note.startswith("Not made, 15 of kind ensemble") for note in found["study"]["notes"])
    folder.cards.clear()
    assert "nothing to say" in results.compute(plan, folder)["headline"]["sentence"]


def test_unknown_kind_is_refused(tmp_path):
    made = toy(tmp_path, kind="sounds")
    with pytest.raises(SubjaxError, match="'sounds' is unknown"):
        made.results()


def test_smallest_lift_for_the_plan():
    settings = Statistics(expected_sd=0.04)
    lift, sentence = results.smallest_lift(6, settings)
    assert lift == pytest.approx(statistics.smallest_detectable(6, 0.04))
    assert f"{lift:.3f} or more with 80 % power" in sentence
    assert results.smallest_lift(6, settings, comparisons=8)[0] > lift
    assert "too few" in results.smallest_lift(1, settings)[1]
    assert results.smallest_lift(1, settings)[0] is None


def test_trait_outside_every_category_is_an_error():
    with pytest.raises(SubjaxError, match="'yeti'"):
        results_rows.read(evaluation([0.3] * 3, [0.3] * 3), "yeti", "all")


def test_with_the_real_store(tmp_path):
    """The same study, committed to a real store, gives the same rows and summaries."""
    made = toy(tmp_path / "fake", n=2)
    real = store.Store(tmp_path / "real")
    for id, node in made.nodes.items():
        text = (made.folder.payload(node.kind, id) / "readings.json").read_text()
        with real.build(node.kind, id) as build:
            (build.folder / "readings.json").write_text(text)
            blank = {"format": 0, "files": {}, "payload": "", "made_at": "", "wall_s": 0.0, "tokens": 0, "version": 1}
            blank |= {name: {} for name in ("config", "inputs", "seeds", "packages", "profile", "metrics", "extra")}
            digest = hashlib.sha256(id.encode()).hexdigest()
            build.commit(store.Card(kind=node.kind, id=id, digest=digest, **blank))
    plan = Plan(made.nodes, made.study)
    assert json.loads(results.write(plan, real).read_text()) == made.results()
