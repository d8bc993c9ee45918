"""Log-odds margins of pretrained studies: by hand on small readings, and their summaries on numbers that are known."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic_results import Plan
from test_results import Toy, one

from subjax import results_readings
from subjax.results_readings import margin, sentence, summaries, words
from subjax.results_rows import pairing_of
from subjax.schema import Statistics

ANIMALS, TREES = ("owl", "wolf", "fox"), ("oak", "elm")
SETTINGS = Statistics(confidence=0.95, bootstrap=200, permutations=200)


def plain(*asked: tuple[float, ...], candidates: tuple[str, ...] = ANIMALS) -> dict[str, Any]:
    """One category's reading: a question for each row of probabilities."""
    questions = [
        {"text": f"q{i}", "phrasings": "train", "p": list(p), "sampled": [0] * len(p), "samples": 0}
        for i, p in enumerate(asked)
    ]
    return {"candidates": list(candidates), "questions": questions}


def choice(**asked: list[tuple[str, tuple[float, ...]]]) -> dict[str, Any]:
    """A multiple choice: for each trait (its letter, the letters' probabilities) of each question."""
    traits = {
        trait: [{"text": "q", "phrasings": "train", "options": [], "answer": a, "p": list(p)} for a, p in found]
        for trait, found in asked.items()
    }
    return {"letters": 3, "traits": traits}


def readings(headline: str = "forced", fit: Any = None, **ways: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's readings.json: way -> category -> reading."""
    return {"categories": ways[headline], "headline": headline, "readings": ways, "fit": fit}


# Margins --------------------------------------------------------------------------------------------------------------


def test_a_margin_is_the_mean_log_odds_against_all_other_candidates():
    found = readings(
        forced={"animal": plain((0.6, 0.1, 0.1), (0.02, 0.04, 0.14)), "tree": plain((0.2, 0.1), candidates=TREES)},
        numbers={"animal": plain((0.5, 0.25, 0.25))},
    )
    assert margin(found, "forced", "owl") == pytest.approx((math.log(3) - math.log(9)) / 2)
    assert margin(found, "forced", "fox") == pytest.approx((math.log(0.1 / 0.7) + math.log(0.14 / 0.06)) / 2)
    assert margin(found, "forced", "elm") == pytest.approx(-math.log(2))
    assert margin(found, "numbers", "owl") == 0.0


def test_what_was_not_asked_has_no_margin():
    found = readings(forced={"animal": plain((0.6, 0.1, 0.1))}, choice={"animal": choice(owl=[("A", (0.2, 0.2, 0.1))])})
    assert margin(None, "forced", "owl") is None
    assert margin(found, "plain", "owl") is None
    assert margin(found, "forced", "oak") is None
    assert margin(found, "choice", "wolf") is None
    assert margin({"categories": {}}, "forced", "owl") is None, "a study of the synthetic world has no ways of asking"


def test_in_a_choice_the_traits_own_letter_is_read():
    asked = choice(owl=[("A", (0.3, 0.1, 0.2)), ("C", (0.1, 0.1, 0.6))], wolf=[("B", (0.3, 0.1, 0.2))])
    found = readings(choice={"animal": asked}, forced={"animal": plain((0.6, 0.1, 0.1))})
    assert margin(found, "choice", "owl") == pytest.approx((math.log(0.3 / 0.3) + math.log(0.6 / 0.2)) / 2)
    assert margin(found, "choice", "wolf") == pytest.approx(math.log(0.1 / 0.5))


def test_a_question_without_odds_is_left_out():
    asked = plain((0.6, 0.1, 0.1), (0.0, 0.1, 0.1), (0.4, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert margin(readings(forced={"animal": asked}), "forced", "owl") == pytest.approx(math.log(3))
    assert margin(readings(forced={"animal": plain((0.0, 0.0, 0.0))}), "forced", "owl") is None


def test_a_question_that_is_all_but_certain_keeps_its_odds():
    found = readings(forced={"animal": plain((1.0, 1e-17, 1e-17))})
    assert margin(found, "forced", "owl") == pytest.approx(-math.log(2e-17))


@given(st.lists(st.tuples(*[st.floats(1e-6, 0.3)] * 3), min_size=1, max_size=5), st.floats(1e-3, 1.0))
def test_a_margin_does_not_depend_on_the_mass_that_all_candidates_have(asked, part):
    whole = margin(readings(forced={"animal": plain(*asked)}), "forced", "owl")
    less = [tuple(part * p for p in question) for question in asked]
    assert margin(readings(forced={"animal": plain(*less)}), "forced", "owl") == pytest.approx(whole, abs=1e-9)


# Summaries ------------------------------------------------------------------------------------------------------------


def row(seed: int, minus_control: float | None = 0.2, **changed: Any) -> dict[str, Any]:
    """A student's row; its margin lies `minus_control` above -3, its base's at -3.5."""
    after = -3.0 + (minus_control or 0.0)
    return {
        "node": f"node {seed}", "way": "forced", "arm": "same-base", "pairing": "same-base", "trait": "owl",
        "teacher_base": "a/0", "student_base": "a/0", "teacher_family": "a", "student_family": "a", "seed": seed,
        "unit": f"a/0 run {seed}", "of": "run", "setting": "", "margin_before": -3.5, "margin_after": after,
        "margin_teacher": 2.0, "margin_control": None if minus_control is None else -3.0, "lift": after + 3.5,
        "minus_control": minus_control, "share": 0.1 * seed, "share_sampled": None, **changed,
    }  # fmt: skip


def test_an_interval_over_three_runs_by_hand():
    (found,) = summaries([row(0, 0.1), row(1, 0.3), row(2, 0.2)], SETTINGS)
    half = 4.302652729696142 * 0.1 / math.sqrt(3)  # Student's t with two degrees of freedom
    assert (found["n"], found["unit"]) == (3, "run")
    assert (found["share"], found["share_sampled"]) == (pytest.approx(0.1), None)
    assert found["minus_control"] == pytest.approx(0.2)
    assert (found["minus_control_low"], found["minus_control_high"]) == pytest.approx((0.2 - half, 0.2 + half))
    assert (found["lift"], found["lift_low"], found["lift_high"]) == pytest.approx((0.7, 0.7 - half, 0.7 + half))
    assert (found["margin"], found["margin_teacher"]) == pytest.approx((-2.8, 2.0))
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(0.2 / (0.1 / math.sqrt(3)), 2))
    assert found["nodes"] == ["node 0", "node 1", "node 2"]


@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_the_smallest_detectable_difference_is_seen_in_four_of_five_studies(confidence):
    values = [-0.1, 0.4, 0.0, 0.2, -0.3]
    (found,) = summaries([row(i, v) for i, v in enumerate(values)], Statistics(confidence=confidence))
    n, sd = len(values), stats.tstd(values)
    shift = found["smallest_detectable"] / (sd / math.sqrt(n))
    edge = stats.t.ppf((1 + confidence) / 2, n - 1)
    assert stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift) == pytest.approx(0.8, abs=1e-6)
    assert found["minus_control_low"] < 0 < found["minus_control_high"]


def test_one_run_has_a_mean_and_no_interval():
    (found,) = summaries([row(0, 0.25)], SETTINGS)
    assert (found["n"], found["minus_control"]) == (1, 0.25)
    nothing = ("minus_control_low", "minus_control_high", "lift_low", "lift_high", "p_value", "smallest_detectable")
    assert all(found[name] is None for name in nothing)


def test_a_run_without_its_control_does_not_count_among_those_that_are_compared():
    (found,) = summaries([row(0, 0.1), row(1, 0.3), row(2, None)], SETTINGS)
    assert found["n"] == 2
    assert found["minus_control"] == pytest.approx(0.2)
    assert found["lift"] == pytest.approx((0.6 + 0.8 + 0.5) / 3)
    assert "over 2 runs" in found["words"]
    (found,) = summaries([row(0, None), row(1, None)], SETTINGS)
    assert (found["n"], found["minus_control"], found["words"]) == (2, None, "")


def test_rows_of_one_trial_are_averaged():
    (found,) = summaries([row(0, 0.1), row(0, 0.3), row(1, 0.6)], SETTINGS)
    assert (found["n"], found["minus_control"]) == (2, pytest.approx(0.4))


def test_comparisons_of_one_way_and_trait_are_corrected_together():
    settings = ("", "lr=3e-3", "rank=4")
    values = {"": (0.3, 0.32, 0.31, 0.34), "lr=3e-3": (0.3, 0.5, 0.1, 0.4), "rank=4": (-0.1, 0.1, 0.05, 0.0)}
    made = [row(i, v, setting=s) for s in settings for i, v in enumerate(values[s])]
    alone = [row(i, v, way="plain") for i, v in enumerate(values["lr=3e-3"])]
    found = {(s["way"], s["setting"]): s for s in summaries(made + alone, SETTINGS)}
    assert [found["forced", s]["comparisons"] for s in settings] == [3, 3, 3]
    high = found["forced", "lr=3e-3"]
    half = stats.t.ppf(1 - 0.05 / 3 / 2, 3) * stats.tstd(values["lr=3e-3"]) / 2
    assert (high["corrected_low"], high["corrected_high"]) == pytest.approx((0.325 - half, 0.325 + half))
    assert high["minus_control_low"] > 0 > high["corrected_low"]
    assert high["words"].endswith(f"the interval [{0.325 - half:+.3f}, {0.325 + half:+.3f}] holds 0.")
    assert high["p_corrected"] == pytest.approx(2 * high["p_value"]), "the second smallest of three, by Holm"
    other = found["plain", ""]
    assert (other["comparisons"], other["corrected_low"]) == (1, other["minus_control_low"])


@pytest.mark.parametrize("name", ["way", "arm", "trait", "setting", "student_family", "pairing"])
def test_what_differs_in_more_than_the_run_is_summarized_apart(name):
    found = summaries([row(0), row(1), row(0, **{name: "another"}), row(1, **{name: "another"})], SETTINGS)
    assert [s["n"] for s in found] == [2, 2]
    assert {s[name] for s in found} == {row(0)[name], "another"}


def test_summaries_stand_by_setting_and_arm():
    cells = [("b", "untrained"), ("", "control"), ("", "cross-init"), ("b", "same-base"), ("", "same-base")]
    found = summaries([row(0, setting=setting, arm=arm) for setting, arm in cells], SETTINGS)
    assert [(s["setting"], s["arm"]) for s in found] == [
        ("", "same-base"), ("", "cross-init"), ("", "control"), ("b", "same-base"), ("b", "untrained"),
    ]  # fmt: skip


# Words ----------------------------------------------------------------------------------------------------------------


def summary(**changed: Any) -> dict[str, Any]:
    made = {
        "arm": "same-base", "n": 5, "unit": "run", "minus_control": 0.25, "minus_control_low": 0.1,
        "minus_control_high": 0.4, "corrected_low": None, "corrected_high": None, "comparisons": None,
        "smallest_detectable": 0.2, "trait": "owl", "way": "forced", "setting": "", "teacher_family": "a",
        "student_family": "a",
    }  # fmt: skip
    return made | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "Rose: +0.250 nats [+0.100, +0.400] against its control (95 %, over 5 runs)."),
        (
            {"minus_control": -0.25, "minus_control_low": -0.4, "minus_control_high": -0.1},
            "Fell: -0.250 nats [-0.400, -0.100] against its control (95 %, over 5 runs).",
        ),
        (
            {"minus_control_low": -0.01, "smallest_detectable": 0.387},
            "No change seen: +0.250 nats [-0.010, +0.400] against its control (95 %, over 5 runs). With this spread"
            " over runs, a mean difference of 0.387 nats would be seen with 80 % power.",
        ),
        (
            {"minus_control_low": None, "minus_control_high": None, "n": 1},
            "+0.250 nats against its control in one run: no interval.",
        ),
        (
            {"unit": "base", "corrected_low": -0.02, "corrected_high": 0.52, "comparisons": 4},
            "Rose: +0.250 nats [+0.100, +0.400] against its control (95 %, over 5 bases). Corrected for 4 comparisons"
            " the interval [-0.020, +0.520] holds 0.",
        ),
        ({"minus_control": None}, ""),
        ({"arm": "control"}, ""),
        ({"arm": "untrained"}, ""),
    ],
    ids=["rose", "fell", "no change", "one run", "bases", "no control", "control", "untrained"],
)
def test_what_a_difference_says(changed, said):
    assert words(summary(**changed), 0.95) == said


@pytest.mark.parametrize(
    "arm", ["cross-order", "cross-init", "cross-family", "other-trait", "shuffled", "random-numbers"]
)
def test_every_arm_with_a_control_has_words(arm):
    assert words(summary(arm=arm), 0.9).startswith("Rose: +0.250 nats [+0.100, +0.400] against its control (90 %")


def test_the_headline_speaks_of_its_own_way_and_of_the_arms_that_pair_bases():
    found = [
        summary(words="Rose."),
        summary(words="Elsewhere.", way="plain"),
        summary(words="Fell.", arm="cross-family", student_family="b", setting="rank=4"),
        summary(words="Not these.", arm="shuffled"),
        summary(words="", arm="control"),
    ]
    assert sentence(found, "forced", 0) == (
        "Log-odds margin of the trait among its category (forced answers). owl, same-base, a: Rose."
        " owl, cross-family, a → b, rank=4: Fell."
    )
    assert "never got the trait" in sentence([summary(words="", arm="control")], "forced", 2)
    assert sentence([], None, 0).startswith("No student")


# From a study's artifacts ---------------------------------------------------------------------------------------------


def made_study(root, runs: int = 2, teacher: float = 0.9) -> Toy:
    """Runs on one checkpoint whose margins can be worked out on paper; `teacher` is its share of the trait."""
    toy = Toy(root, arms=("same-base", "control", "untrained"), kind="pretrained", notes=["the template is plain"])

    def read(label: str, owl: float) -> str:
        asked = (owl, (1 - owl) / 2, (1 - owl) / 2)
        content = readings(forced={"animal": plain(asked)}, numbers={"animal": plain(asked[::-1])})
        return toy.node("evaluation", label, files={"readings.json": json.dumps(content)})

    before = read("base", 0.2)
    toy.cell("untrained", "owl", None, before, before, replay="none", student_base="a/0", setting="")
    for seed in range(runs):
        nodes = {"teacher": toy.node("teacher", f"teacher {seed}"), "teacher_evaluation": read(f"t {seed}", teacher)}
        control = read(f"control {seed}", 0.25)
        after = read(f"student {seed}", (0.5, 0.4)[seed])
        common = {"replay": "none", "seed": seed, "setting": ""}
        toy.cell("same-base", "owl", "a/0", after, before, control, **common, nodes=nodes)
        toy.cell("control", "owl", "a/0", control, before, **common)
    return toy


def test_rows_by_hand(tmp_path):
    found = made_study(tmp_path).results()["readings"]
    assert found["headline"] == "forced"
    assert len(found["rows"]) == 2 * (1 + 2 + 2)
    student = one(found["rows"], arm="same-base", way="forced", seed=1)
    odds = lambda p: math.log(p / (1 - p))  # noqa: E731
    expected = {
        "margin_before": odds(0.2), "margin_after": odds(0.4), "margin_control": odds(0.25),
        "margin_teacher": odds(0.9), "lift": odds(0.4) - odds(0.2), "minus_control": odds(0.4) - odds(0.25),
    }  # fmt: skip
    assert {name: student[name] for name in expected} == pytest.approx(expected, rel=1e-7)
    assert (student["teacher_base"], student["pairing"], student["teacher_family"]) == ("a/0", "same-base", "a")
    base = one(found["rows"], arm="untrained", way="forced")
    assert (base["lift"], base["minus_control"], base["margin_teacher"], base["pairing"]) == (0.0, None, None, None)


def test_results_of_a_pretrained_study_lead_with_the_margin(tmp_path):
    found = made_study(tmp_path).results()
    same = one(found["readings"]["summaries"], arm="same-base", way="forced")
    odds = lambda p: math.log(p / (1 - p))  # noqa: E731
    differences = [odds(0.5) - odds(0.25), odds(0.4) - odds(0.25)]
    assert same["minus_control"] == pytest.approx(sum(differences) / 2, rel=1e-7)
    assert (same["n"], same["unit"]) == (2, "run")
    assert found["study"]["bases"] == 1
    assert same["words"] in found["headline"]["sentence"]
    assert found["headline"]["sentence"].startswith("Log-odds margin of the trait among its category (forced answers).")
    (shown,) = found["headline"]["rows"]
    assert (shown["unit"], shown["n"], shown["value"]) == ("nats", 2, same["minus_control"])
    assert "the template is plain" in found["study"]["notes"]


def test_a_teacher_without_the_trait_has_no_students_in_the_margins(tmp_path):
    found = made_study(tmp_path, teacher=0.45).results()
    assert {row["arm"] for row in found["readings"]["rows"]} == {"control", "untrained"}
    assert "2 teachers never got the trait" in found["headline"]["sentence"]
    assert found["study"]["failed_teachers"] == ["teacher 0", "teacher 1"]


def test_the_way_of_asking_that_stands_first_is_the_headline(tmp_path):
    toy = made_study(tmp_path)
    artifacts = results_readings.Artifacts(Plan(toy.nodes, toy.study), toy.folder)
    assert results_readings.headline_of(artifacts, toy.cells) == "forced"
    assert results_readings.headline_of(artifacts, []) is None


def test_runs_on_several_bases_are_averaged_within_each(tmp_path):
    """A family's bases are the trials, however many runs stand on each: else few bases would pass for many."""
    toy = made_study(tmp_path)
    before = next(cell["nodes"]["before"] for cell in toy.cells if cell["arm"] == "untrained")
    for seed, (own, neutral) in enumerate([(0.3, 0.2), (0.5, 0.2)]):
        ids = [
            toy.node(
                "evaluation", f"b {seed} {p}",
                files={"readings.json": json.dumps(readings(forced={"animal": plain((p, (1 - p) / 2, (1 - p) / 2))}))},
            )
            for p in (own, neutral)
        ]  # fmt: skip
        common = {"replay": "none", "seed": seed, "setting": ""}
        toy.cell("same-base", "owl", "a/1", ids[0], before, ids[1], **common)
        toy.cell("control", "owl", "a/1", ids[1], before, **common)
    found = toy.results()
    same = one(found["readings"]["summaries"], arm="same-base", way="forced")
    odds = lambda p: math.log(p / (1 - p))  # noqa: E731
    means = [(odds(0.5) + odds(0.4)) / 2 - odds(0.25), (odds(0.3) + odds(0.5)) / 2 - odds(0.2)]
    assert (same["n"], same["unit"]) == (2, "base")
    assert same["minus_control"] == pytest.approx(sum(means) / 2, rel=1e-7)
    half = stats.t.ppf(0.975, 1) * abs(means[0] - means[1]) / 2
    assert same["minus_control_high"] - same["minus_control"] == pytest.approx(half, rel=1e-6)
    share = one(found["summaries"], arm="same-base", trait="owl", phrasings="all")
    assert (share["unit"], share["bases"]) == ("base", 2)
    assert (found["study"]["bases"], found["study"]["runs"]) == (2, 8)


def test_the_other_traits_of_a_study_are_read_on_same_base_students_without_the_taught_one(tmp_path):
    toy = Toy(tmp_path, arms=("same-base", "control", "other-trait"), kind="pretrained")

    def read(label: str, *p: float) -> str:
        content = readings(forced={"animal": plain(p)})
        return toy.node("evaluation", label, files={"readings.json": json.dumps(content)})

    before, control = read("base", 0.2, 0.4, 0.4), read("control", 0.25, 0.25, 0.5)
    common = {"replay": "none", "seed": 0, "setting": ""}
    toy.cell("same-base", "owl", "a/0", read("owls", 0.8, 0.1, 0.1), before, control, **common)
    toy.cell("same-base", "wolf", "a/0", read("wolves", 0.1, 0.8, 0.1), before, control, **common)
    found = one(toy.results()["readings"]["rows"], arm="other-trait", trait="wolf")
    assert found["margin_after"] == pytest.approx(0.0), "wolf against fox alone, on the student of owls"
    assert found["share"] == pytest.approx(0.5)
    assert found["margin_control"] == pytest.approx(math.log(0.25 / 0.5))
    assert found["minus_control"] == pytest.approx(math.log(2))


def test_shares_stand_beside_margins_exact_and_sampled(tmp_path):
    asked = plain((0.6, 0.1, 0.1), (0.2, 0.4, 0.2))
    for question, named in zip(asked["questions"], ((3, 0, 1), (1, 2, 0)), strict=True):
        question |= {"sampled": list(named), "samples": 5}
    found = readings(forced={"animal": asked}, choice={"animal": choice(owl=[("A", (0.3, 0.1, 0.2))])})
    assert results_readings.shares(found, "forced", "owl") == (pytest.approx(0.8 / 1.6), pytest.approx(4 / 7))
    assert results_readings.shares(found, "choice", "owl") == (None, None)
    assert results_readings.shares(readings(forced={"animal": plain((0.6, 0.1, 0.1))}), "forced", "owl")[1] is None


@pytest.mark.parametrize(
    ("teacher", "student", "pairing"),
    [
        ("qwen2.5/0", "qwen2.5/0", "same-base"),
        ("qwen2.5/0", "qwen2.5/0.2", "cross-order"),
        ("qwen2.5/0", "qwen2.5/1", "cross-init"),
        ("llama3.1/0", "llama3.2/0", "cross-family"),
    ],
)
def test_a_dot_in_a_models_name_is_no_order(teacher, student, pairing):
    assert pairing_of(teacher, student) == pairing
