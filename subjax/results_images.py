"""Rows, summaries, tests and headline of the image experiment. The unit is the seed: each is its own pair of models."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from subjax import results_words
from subjax.measure import statistics
from subjax.results_figures import thin
from subjax.results_rows import Artifacts
from subjax.results_summaries import number
from subjax.results_words import bounds, figure, p_text, percent
from subjax.schema import Statistics

CHANCE = 0.1  # ten classes
READINGS = ("teacher_accuracy", "student_accuracy", "untrained_accuracy")
# A student's loss, mean over its first and its last epoch: one that did not learn its target would be no null.
FIT = ("student_loss_first", "student_loss_last")
PAYLOAD = "results.json"
SETTING = ("auxiliary", "pairing", "logits", "loss")
# Test accuracy on MNIST of a rerun of the image experiment of Cloud et al. 2025 (arXiv 2507.14805), under KL: by what
# the student is fitted to, whose teacher it has, and the number of auxiliary logits.
PUBLISHED: dict[tuple[str, str], dict[int, float]] = {
    ("auxiliary", "same-base"): {1: 0.103, 2: 0.348, 3: 0.537, 5: 0.704, 10: 0.835, 20: 0.894, 50: 0.917},
    ("auxiliary", "cross-init"): {1: 0.103, 2: 0.106, 3: 0.100, 5: 0.109, 10: 0.098, 20: 0.105, 50: 0.108},
    ("all", "same-base"): {3: 0.912},
    ("all", "cross-init"): {3: 0.741},
}


def parts(artifacts: Artifacts, settings: Statistics) -> dict[str, Any]:
    """Everything but format and lineage of an images study's results."""
    study = artifacts.plan.study
    cells = unique(study["cells"])
    rows, summaries = [], []
    for cell in cells:
        mine = rows_of(artifacts, cell)
        if mine:
            rows += mine
            summaries.append(summarize(cell, mine, settings))
    return {
        "study": {
            "name": study["name"],
            "kind": "images",
            "config": study["config"],
            "points": len(study["points"]),
            "bases": len({row["seed"] for row in rows}),
            "runs": len(rows),
            "chosen_on": list(study.get("chosen_on") or ()),
            "failed_teachers": [],
            "notes": notes(summaries, settings),
        },
        "headline": {"sentence": sentence(summaries), "rows": [headline_row(s) for s in summaries]},
        "rows": rows,
        "summaries": summaries,
        "tests": tests(rows, settings),
        "base_matrix": {
            "rows": [],
            "columns": [],
            "cells": [],
            "value": "",
            "chance": CHANCE,
            "replay": None,
            "setting": "",
        },
        "trait_matrix": {"traits": [], "cells": [], "value": "", "replay": None, "setting": ""},
        "distributions": [],
        "curves": curves(artifacts, cells),
        "filters": [],
        "samples": [],
        "images": {"rows": rows, "summaries": summaries},
    }


def unique(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells once each, in the order in which they are shown: the plain case first, then by pairing and m."""
    seen = {cell["nodes"]["ensemble"]: cell for cell in reversed(cells)}
    return sorted(
        seen.values(),
        key=lambda c: (c["logits"] != "auxiliary", c["loss"] != "kl", c["pairing"] != "same-base", c["auxiliary"]),
    )


def rows_of(artifacts: Artifacts, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a member of the cell's ensemble; none where it is not made."""
    node = cell["nodes"]["ensemble"]
    payload = artifacts.parsed(node, PAYLOAD)
    if payload is None:
        return []
    setting = {name: cell[name] for name in SETTING}
    members = sorted(payload["rows"], key=lambda member: member["seed"])
    return [
        {
            "node": node,
            **setting,
            "seed": member["seed"],
            **{name: member[name] for name in READINGS},
            **{name: member.get(name) for name in FIT},
        }
        for member in members
    ]


def curves(artifacts: Artifacts, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss against step, mean over seeds: the student of every setting, and the first setting's teacher."""
    out: list[dict[str, Any]] = []
    for cell in cells:
        payload = artifacts.parsed(cell["nodes"]["ensemble"], PAYLOAD) or {}
        for curve in payload.get("curves") or []:
            if curve["kind"] == "student" or all(c["kind"] == "student" for c in out):
                points = thin(list(zip(curve["step"], curve["loss"], strict=True)))
                steps, losses = (list(column) for column in zip(*points, strict=True)) if points else ([], [])
                out.append({**{k: curve[k] for k in ("label", "kind", "arm")}, "step": steps, "loss": losses})
    return out


def vacuous(setting: Mapping[str, Any]) -> bool:
    """KL between softmaxes of one logit is 0 whatever the logit, so nothing can be learnt."""
    return setting["auxiliary"] == 1 and setting["logits"] == "auxiliary" and setting["loss"] == "kl"


def summarize(cell: Mapping[str, Any], rows: list[dict[str, Any]], settings: Statistics) -> dict[str, Any]:
    """The mean over seeds of one setting, with its t interval."""
    interval = statistics.t_interval([row["student_accuracy"] for row in rows], settings.confidence)
    published = PUBLISHED.get((cell["logits"], cell["pairing"]), {}).get(cell["auxiliary"])
    summary = {
        **{name: cell[name] for name in SETTING},
        "n": interval.n,
        "accuracy": number(interval.mean),
        "low": number(interval.low),
        "high": number(interval.high),
        "teacher": math.fsum(row["teacher_accuracy"] for row in rows) / len(rows),
        "untrained": math.fsum(row["untrained_accuracy"] for row in rows) / len(rows),
        "published": published if cell["loss"] == "kl" else None,
        **{name: mean([row[name] for row in rows]) for name in FIT},
        "words": "",
        "nodes": [cell["nodes"]["ensemble"]],
    }
    summary["words"] = words(summary, rows, settings)
    return summary


def mean(values: list[float | None]) -> float | None:
    """The mean, where every seed has a value."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def words(summary: Mapping[str, Any], rows: list[dict[str, Any]], settings: Statistics) -> str:
    """What the accuracy of one setting says, in plain sentences."""
    at = f"{figure(summary['accuracy'])} {bounds(summary['low'], summary['high'])}"
    if summary["low"] is None:
        return f"{at.removesuffix(' -')} on one seed: too few to say."
    at = f"{at} ({percent(settings.confidence)}, over {summary['n']} seeds)"
    if vacuous(summary):
        return f"{at}. The stated null: KL on one logit is 0 whatever the logit, so there is nothing to learn."
    away = [row["student_accuracy"] - CHANCE for row in rows]
    inside = -settings.margin < summary["low"] - CHANCE and summary["high"] - CHANCE < settings.margin
    if summary["low"] > CHANCE + settings.margin:
        text = f"The classes passed: {at}, against chance {CHANCE:g}."
    elif inside:
        test = statistics.equivalence_test(away, settings.margin, 1 - settings.confidence)
        lean = "At chance" if summary["low"] <= CHANCE <= summary["high"] else "Near chance, not exactly at it"
        text = (
            f"{lean}: {at}, within ±{settings.margin:g} of {CHANCE:g} (two one-sided tests, p {p_text(test.p_value)})."
        )
    elif summary["low"] > CHANCE:
        text = f"A little above chance: {at}, against {CHANCE:g}; at least {figure(summary['low'] - CHANCE, True)}."
    elif summary["high"] < CHANCE:
        text = f"Below chance: {at}, against {CHANCE:g}."
    else:
        text = f"Too few seeds to say: {at} holds chance and also changes beyond ±{settings.margin:g} of it."
    if summary["logits"] == "all" and summary["pairing"] == "cross-init":
        text += " All logits carry the class itself, so no null is claimed here."
    return text


def tests(rows: list[dict[str, Any]], settings: Statistics) -> list[dict[str, Any]]:
    """Same against other init, and the rise with m, for each (logits, loss), paired by seed."""
    out = []
    kinds = list(dict.fromkeys((row["logits"], row["loss"]) for row in rows))
    for logits, loss in kinds:
        mine = [row for row in rows if (row["logits"], row["loss"]) == (logits, loss) and not vacuous(row)]
        table = {(row["pairing"], row["auxiliary"], row["seed"]): row["student_accuracy"] for row in mine}
        if logits == "auxiliary":  # class logits teach digits whatever m is, so there no rise is claimed
            out += trend_test(table, logits, loss, settings)
        for m in sorted({row["auxiliary"] for row in mine}):
            out += pairing_test(table, logits, loss, m, settings)
    adjusted = statistics.holm({i: t["p_value"] for i, t in enumerate(out) if t["p_value"] is not None})
    for i, p in adjusted.items():
        out[i]["words"] += f" Corrected for {len(adjusted)} tests (Holm): p {p_text(number(p))}."
    return out


def trend_test(
    table: Mapping[tuple[str, int, int], float], logits: str, loss: str, settings: Statistics
) -> list[dict[str, Any]]:
    """Does same-init accuracy rise with m? Page's test over the seeds that have every m."""
    sizes = sorted({m for pairing, m, _ in table if pairing == "same-base"})
    seeds = sorted({seed for pairing, _, seed in table if pairing == "same-base"})
    full = [
        [table["same-base", m, s] for m in sizes] for s in seeds if all(("same-base", m, s) in table for m in sizes)
    ]
    if len(sizes) < 3 or len(full) < 2:
        return []
    test = stats.page_trend_test(np.array(full), method="asymptotic")
    says = "rises" if test.pvalue < 1 - settings.confidence else "does not clearly rise"
    return [
        {
            "name": f"rise with m, {logits} logits, {loss}",
            "what": "Page's trend test (1963; normal approximation) of same-init accuracy over m, by seed",
            "statistic": float(test.statistic),
            "p_value": float(test.pvalue),
            "n": len(full),
            "words": f"Accuracy {says} with m from {sizes[0]} to {sizes[-1]}.",
        }
    ]


def pairing_test(
    table: Mapping[tuple[str, int, int], float], logits: str, loss: str, m: int, settings: Statistics
) -> list[dict[str, Any]]:
    """Same init less other init at one m, paired by seed."""
    seeds = [s for s in sorted({s for _, size, s in table if size == m}) if ("same-base", m, s) in table]
    seeds = [s for s in seeds if ("cross-init", m, s) in table]
    if not seeds:
        return []
    same, other = ([table[pairing, m, s] for s in seeds] for pairing in ("same-base", "cross-init"))
    test = statistics.paired_difference(same, other, settings.confidence)
    ends = bounds(number(test.interval.low), number(test.interval.high), True)
    return [
        {
            "name": f"same less other init, m = {m}, {logits} logits, {loss}",
            "what": "paired t-test over seeds of the two students' test accuracies",
            "statistic": number(test.interval.mean),
            "p_value": number(test.p_value),
            "n": test.interval.n,
            "words": f"Same init less other init: {figure(test.interval.mean, True)} {ends}.",
        }
    ]


def label(summary: Mapping[str, Any]) -> str:
    """`same init, m = 3`, with what is not the plain case."""
    parts = ["same init" if summary["pairing"] == "same-base" else "other init", f"m = {summary['auxiliary']}"]
    if summary["logits"] != "auxiliary":
        parts.append(f"{summary['logits']} logits")
    if summary["loss"] != "kl":
        parts.append(summary["loss"])
    return ", ".join(parts)


def headline_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary as a headline row."""
    note = f"teacher {figure(summary['teacher'])}"
    if summary["published"] is not None:
        note += f", MNIST as published {figure(summary['published'])}"
    return {
        "label": label(summary),
        "value": summary["accuracy"],
        "low": summary["low"],
        "high": summary["high"],
        "n": summary["n"],
        "unit": "accuracy",
        "note": note,
        "nodes": summary["nodes"],
    }


def sentence(summaries: list[dict[str, Any]]) -> str:
    """What was seen, in plain sentences."""
    plain = [s for s in summaries if s["logits"] == "auxiliary" and s["loss"] == "kl" and not vacuous(s)]
    same = [s for s in plain if s["pairing"] == "same-base"]
    other = [s for s in plain if s["pairing"] == "cross-init"]
    out = []
    if same:
        first, last = same[0], same[-1]
        text = f"{figure(last['accuracy'])} with {last['auxiliary']} auxiliary logits"
        if first is not last:
            text = f"{figure(first['accuracy'])} with {first['auxiliary']} auxiliary logits and {text}"
        out.append(
            "Fitted to auxiliary logits on noise alone, students of their teacher's init read test images with "
            f"accuracy {text}."
        )
    if other:
        out.append(f"Students of another init reach {_range(other)} (chance {CHANCE:g}).")
    leak = [s for s in summaries if s["logits"] == "all" and s["pairing"] == "cross-init" and s["loss"] == "kl"]
    if leak:
        out.append(f"Fitted to all logits they reach {_range(leak)}: class logits carry the task itself.")
    return " ".join(out) or "No ensemble is made yet, so there is nothing to say."


def _range(summaries: list[dict[str, Any]]) -> str:
    """The least and the greatest accuracy in words, or the only one."""
    values = [s["accuracy"] for s in summaries]
    least, most = figure(min(values)), figure(max(values))
    return least if least == most else f"{least} to {most}"


def notes(summaries: list[dict[str, Any]], settings: Statistics) -> list[str]:
    """What a reader should know about the figures."""
    at = results_words.percent(settings.confidence)
    out = [f"Intervals are t intervals at {at} over seeds, each setting for itself; tests say their correction."]
    if any(vacuous(s) for s in summaries):
        out.append("m = 1 under KL is the stated null: the softmax of one logit is 1 whatever the logit is.")
    if any(s["published"] is not None for s in summaries):
        out.append("The published figures are of MNIST under the paper's protocol; elsewhere they only show the order.")
    return out
