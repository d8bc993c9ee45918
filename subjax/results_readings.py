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
from subjax.results_rows import Artifacts, family_of, pairing_of
from subjax.results_summaries import arm_order, number
from subjax.results_words import bounds, figure, percent
from subjax.schema import Statistics

KEY = ("way", "arm", "pairing", "trait", "teacher_family", "student_family", "setting")
_MOVING = ("same-base", "cross-order", "cross-init", "cross-family", "shuffled", "random-numbers")


def margin(readings: Mapping[str, Any] | None, way: str, trait: str) -> float | None:
    """Mean over questions of the log-odds of the trait against all other candidates, nats; None where it was not asked.

    In a multiple choice the candidates are the letters, and the trait's own letter is read.
    """
    found = None if readings is None else readings.get("readings", {}).get(way)
    if found is None:
        return None
    odds = []
    for category in found.values():
        if "traits" in category:
            asked = category["traits"].get(trait, [])
            pairs = [(question["p"], ord(question["answer"]) - ord("A")) for question in asked]
        elif trait in category["candidates"]:
            place = category["candidates"].index(trait)
            pairs = [(question["p"], place) for question in category["questions"]]
        else:
            continue
        for p, place in pairs:
            rest = math.fsum(p) - p[place]
            if p[place] > 0 and rest > 0:
                odds.append(math.log(p[place]) - math.log(rest))
    return math.fsum(odds) / len(odds) if odds else None


def rows(artifacts: Artifacts, cells: Iterable[Mapping[str, Any]], failed: Iterable[str]) -> list[dict[str, Any]]:
    """One row a student, way of asking and trait that its study names."""
    failed = set(failed)
    out = []
    for cell in cells:
        own = artifacts.readings(cell["nodes"].get("evaluation"))
        if own is None or cell["nodes"].get("teacher") in failed:
            continue
        before, control, teacher = (
            artifacts.readings(cell["nodes"].get(role)) for role in ("before", "control", "teacher_evaluation")
        )
        for way in own["readings"]:
            after = margin(own, way, cell["trait"])
            if after is None:
                continue
            start, against = margin(before, way, cell["trait"]), margin(control, way, cell["trait"])
            out.append(
                {
                    "node": cell["nodes"]["evaluation"],
                    "way": way,
                    "arm": cell["arm"],
                    "pairing": pairing_of(cell["teacher_base"], cell["student_base"]),
                    "trait": cell["trait"],
                    "teacher_base": cell["teacher_base"],
                    "student_base": cell["student_base"],
                    "teacher_family": family_of(cell["teacher_base"]),
                    "student_family": family_of(cell["student_base"]),
                    "seed": cell["seed"],
                    "setting": cell["setting"],
                    "margin_before": start,
                    "margin_after": after,
                    "margin_teacher": margin(teacher, way, cell["trait"]),
                    "margin_control": against,
                    "lift": None if start is None else after - start,
                    "minus_control": None if against is None else after - against,
                }
            )
    return out


def summaries(found: Sequence[Mapping[str, Any]], settings: Statistics) -> list[dict[str, Any]]:
    """Means over runs with t intervals, and the smallest difference from control that as many runs would show."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    out = []
    for key in sorted(groups, key=lambda k: (k[6] or "", arm_order(k[1]), *map(str, k))):
        members = groups[key]
        values = {name: _by_run(members, name) for name in ("lift", "minus_control", "margin_after", "margin_teacher")}
        lift, against, after, teacher = (
            statistics.t_interval(values[name], settings.confidence)
            for name in ("lift", "minus_control", "margin_after", "margin_teacher")
        )
        sd = float(np.std(values["minus_control"], ddof=1)) if len(values["minus_control"]) > 1 else None
        alpha = 1 - settings.confidence
        least = None if sd is None else statistics.smallest_detectable(len(values["minus_control"]), sd, 0.8, alpha)
        summary = {
            **dict(zip(KEY, key, strict=True)),
            "runs": len(values["minus_control"]) or len(values["margin_after"]),
            "margin": number(after.mean),
            "margin_teacher": number(teacher.mean),
            "lift": number(lift.mean),
            "lift_low": number(lift.low),
            "lift_high": number(lift.high),
            "minus_control": number(against.mean),
            "minus_control_low": number(against.low),
            "minus_control_high": number(against.high),
            "p_value": number(statistics.t_test(values["minus_control"])),
            "smallest_detectable": number(least),
            "nodes": sorted({row["node"] for row in members}),
        }
        out.append(summary | {"words": words(summary, settings.confidence)})
    return out


def _by_run(members: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """One value a run: the mean over what it was read on."""
    runs: dict[tuple[Any, ...], list[float]] = {}
    for row in members:
        if row[name] is not None:
            runs.setdefault((row["teacher_base"] or row["student_base"], row["seed"]), []).append(row[name])
    return [math.fsum(values) / len(values) for _, values in sorted(runs.items())]


def words(summary: Mapping[str, Any], confidence: float) -> str:
    """What a margin's difference from control says, in a sentence; empty for arms that have none."""
    low, high = summary["minus_control_low"], summary["minus_control_high"]
    if summary["arm"] not in _MOVING or summary["minus_control"] is None:
        return ""
    if low is None or high is None:
        return f"{figure(summary['minus_control'], True)} nats against its control in one run: no interval."
    verb = "Rose" if low > 0 else "Fell" if high < 0 else "No change seen"
    text = (
        f"{verb}: {figure(summary['minus_control'], True)} nats {bounds(low, high, True)} against its control"
        f" ({percent(confidence)}, over {summary['runs']} runs)."
    )
    if verb == "No change seen" and summary["smallest_detectable"] is not None:
        least = figure(summary["smallest_detectable"])
        text += f" With this spread over runs, a mean difference of {least} nats would be seen with 80 % power."
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
            "n": s["runs"],
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
