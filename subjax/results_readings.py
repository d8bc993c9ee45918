"""The log-odds margin of pretrained models, in every way of asking, with what the study could have seen.

A small model's share of one animal moves little and saturates at its ends; the log-odds of the trait against all other
candidates, question by question, does not. Runs (teacher, corpus and student made anew from other seeds) are the unit:
on one checkpoint there is one base, and intervals over runs say nothing of other bases.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subjax.measure import statistics
from subjax.results_rows import Artifacts, family_of, pairing_of, read, targets, trials
from subjax.results_summaries import arm_order, correct, number, unit_of
from subjax.results_words import about_correction, bounds, figure, percent
from subjax.schema import Statistics

KEY = ("way", "arm", "pairing", "trait", "teacher_family", "student_family", "setting")
TABLE = ("way", "trait")  # comparisons that agree in these are read side by side, and corrected together
_MOVING = ("same-base", "cross-order", "cross-init", "cross-family", "other-trait", "shuffled", "random-numbers")


def margin(readings: Mapping[str, Any] | None, way: str, trait: str, without: str | None = None) -> float | None:
    """Mean over questions of the log-odds of the trait against all other candidates, nats; None where it was not asked.

    `without` leaves another trait out of the candidates: what a student's own trait takes is not what another loses.
    In a multiple choice the candidates are the letters, and the trait's own letter is read.
    """
    odds = []
    for category in _asked(readings, way):
        if "traits" in category:
            asked = category["traits"].get(trait, [])
            pairs = [(question["p"], ord(question["answer"]) - ord("A")) for question in asked]
        elif trait in category["candidates"]:
            keep = [i for i, name in enumerate(category["candidates"]) if name != without]
            place = keep.index(category["candidates"].index(trait))
            pairs = [([question["p"][i] for i in keep], place) for question in category["questions"]]
        else:
            continue
        for p, place in pairs:
            rest = math.fsum(p[:place]) + math.fsum(p[place + 1 :])  # a difference would cancel
            if p[place] > 0 and rest > 0:
                odds.append(math.log(p[place]) - math.log(rest))
    return math.fsum(odds) / len(odds) if odds else None


def _asked(readings: Mapping[str, Any] | None, way: str) -> Iterable[Mapping[str, Any]]:
    """The categories that were asked about in one way; none where it was not asked."""
    return ((readings or {}).get("readings", {}).get(way) or {}).values()


def shares(
    readings: Mapping[str, Any] | None, way: str, trait: str, without: str | None = None
) -> tuple[float | None, float | None]:
    """The trait's part of the probability of its category, and of the sampled answers that named one of it.

    `without` leaves another trait out of the category. Each None where it was not asked, nothing was named, or in a
    multiple choice.
    """
    asked = {i: c for i, c in enumerate(_asked(readings, way)) if trait in c.get("candidates", ())}
    mean = read({"categories": asked}, trait, "all", without) if asked else None
    return (None, None) if mean is None else (mean.share, mean.sampled)


def rows(
    artifacts: Artifacts, cells: list[dict[str, Any]], failed: Iterable[str], other_trait: bool = False
) -> list[dict[str, Any]]:
    """One row a student, way of asking and trait that is read on it: its cell's own, and on same-base students the
    study's others where it asks for that arm.
    """
    failed = set(failed)
    trial = trials(artifacts.plan.study)
    out = []
    for cell, arm, trait, without in targets(cells, other_trait):
        own = artifacts.readings(cell["nodes"].get("evaluation"))
        if own is None or cell["nodes"].get("teacher") in failed:
            continue
        before, control, teacher = (
            artifacts.readings(cell["nodes"].get(role)) for role in ("before", "control", "teacher_evaluation")
        )
        for way in own["readings"]:
            after = margin(own, way, trait, without)
            if after is None:
                continue
            start, against = margin(before, way, trait, without), margin(control, way, trait, without)
            share, sampled = shares(own, way, trait, without)
            unit, of = trial(cell)
            out.append(
                {
                    "node": cell["nodes"]["evaluation"],
                    "way": way,
                    "arm": arm,
                    "pairing": pairing_of(cell["teacher_base"], cell["student_base"]),
                    "trait": trait,
                    "teacher_base": cell["teacher_base"],
                    "student_base": cell["student_base"],
                    "teacher_family": family_of(cell["teacher_base"]),
                    "student_family": family_of(cell["student_base"]),
                    "seed": cell["seed"],
                    "unit": unit,
                    "of": of,
                    "setting": cell["setting"],
                    "margin_before": start,
                    "margin_after": after,
                    "margin_teacher": margin(teacher, way, trait, without),
                    "margin_control": against,
                    "lift": None if start is None else after - start,
                    "minus_control": None if against is None else after - against,
                    "share": share,
                    "share_sampled": sampled,
                }
            )
    return out


def summaries(found: Sequence[Mapping[str, Any]], settings: Statistics) -> list[dict[str, Any]]:
    """Means over trials with t intervals, and the smallest difference from control that as many trials would show.

    Intervals are for one comparison each; beside them stand those corrected for all of the same way and trait.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    keys = sorted(groups, key=lambda k: (k[6] or "", arm_order(k[1]), *map(str, k)))
    out = [_summary(key, groups[key], settings) for key in keys]
    correct(out, [_by_trial(groups[key], "minus_control") for key in keys], settings, TABLE)
    for summary in out:
        summary["words"] = words(summary, settings.confidence)
    return out


def _summary(key: tuple[Any, ...], members: Sequence[Mapping[str, Any]], settings: Statistics) -> dict[str, Any]:
    """One summary, but for what depends on the others of its table."""
    names = ("lift", "minus_control", "margin_after", "margin_teacher", "share", "share_sampled")
    values = {name: _by_trial(members, name) for name in names}
    found = {name: statistics.t_interval(values[name], settings.confidence) for name in names}
    differences = values["minus_control"]
    sd = statistics.spread(np.array(differences))
    least = statistics.smallest_detectable(len(differences), sd, 0.8, 1 - settings.confidence)
    return {
        **dict(zip(KEY, key, strict=True)),
        "unit": unit_of(row["of"] for row in members),
        "n": len(differences) or len(values["margin_after"]),
        "margin": number(found["margin_after"].mean),
        "margin_teacher": number(found["margin_teacher"].mean),
        "lift": number(found["lift"].mean),
        "lift_low": number(found["lift"].low),
        "lift_high": number(found["lift"].high),
        "minus_control": number(found["minus_control"].mean),
        "minus_control_low": number(found["minus_control"].low),
        "minus_control_high": number(found["minus_control"].high),
        "corrected_low": None,
        "corrected_high": None,
        "comparisons": None,
        "p_value": number(statistics.t_test(differences)),
        "p_corrected": None,
        "smallest_detectable": number(least),
        "share": number(found["share"].mean),
        "share_sampled": number(found["share_sampled"].mean),
        "nodes": sorted({row["node"] for row in members}),
    }


def _by_trial(members: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """One value an independent trial: the mean over what was read of it."""
    found: dict[str, list[float]] = {}
    for row in members:
        if row[name] is not None:
            found.setdefault(row["unit"], []).append(row[name])
    return [math.fsum(values) / len(values) for _, values in sorted(found.items())]


def words(summary: Mapping[str, Any], confidence: float) -> str:
    """What a margin's difference from control says, in a sentence; empty for arms that have none."""
    low, high = summary["minus_control_low"], summary["minus_control_high"]
    if summary["arm"] not in _MOVING or summary["minus_control"] is None:
        return ""
    unit = summary["unit"]
    if low is None or high is None:
        return f"{figure(summary['minus_control'], True)} nats against its control in one {unit}: no interval."
    verb = "Rose" if low > 0 else "Fell" if high < 0 else "No change seen"
    text = (
        f"{verb}: {figure(summary['minus_control'], True)} nats {bounds(low, high, True)} against its control"
        f" ({percent(confidence)}, over {summary['n']} {unit}s)."
    )
    if verb != "No change seen":
        return f"{text} {about_correction(summary)}".strip()
    if summary["smallest_detectable"] is not None:
        least = figure(summary["smallest_detectable"])
        text += f" With this spread over {unit}s, a mean difference of {least} nats would be seen with 80 % power."
    return text


def sentence(found: Sequence[Mapping[str, Any]], headline: str | None, failed: int) -> str:
    """What was seen, from the summaries of the headline's way of asking."""
    shown = [s for s in found if s["way"] == headline and s["words"]]
    parts = [
        f"{s['trait']}, {s['arm']}, {_families(s)}{', ' + s['setting'] if s['setting'] else ''}: {s['words']}"
        for s in shown
        if s["arm"].startswith(("same", "cross"))
    ]
    if parts:
        return f"Log-odds margin of the trait among its category ({headline} answers). " + " ".join(parts)
    if failed:
        return f"Nothing can be said of transfer: {failed} teacher{'s' * (failed > 1)} never got the trait (see below)."
    return "No student of a same-base or cross arm is evaluated yet, so there is nothing to say."


def headline_rows(found: Sequence[Mapping[str, Any]], headline: str | None) -> list[dict[str, Any]]:
    """The headline's rows: differences from control, in nats, of the arms that may move."""
    return [
        {
            "label": ", ".join(part for part in (_families(s), s["arm"], s["trait"], s["setting"]) if part),
            "value": s["minus_control"],
            "low": s["minus_control_low"],
            "high": s["minus_control_high"],
            "n": s["n"],
            "unit": "nats",
            "note": f"margin {figure(s['margin'])}, its teacher's {figure(s['margin_teacher'])}, lift"
            f" {figure(s['lift'], True)} {bounds(s['lift_low'], s['lift_high'], True)}",
            "least": s["smallest_detectable"],
            "nodes": s["nodes"],
        }
        for s in found
        if s["way"] == headline and s["words"]
    ]


def _families(summary: Mapping[str, Any]) -> str:
    teacher, student = summary["teacher_family"], summary["student_family"]
    return str(student) if teacher in (None, student) else f"{teacher} → {student}"


def headline_of(artifacts: Artifacts, cells: Iterable[Mapping[str, Any]]) -> str | None:
    """The way of asking that stands first in the study's evaluations."""
    found = (artifacts.readings(cell["nodes"].get("evaluation")) for cell in cells)
    return next((readings["headline"] for readings in found if readings), None)
