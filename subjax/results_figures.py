"""What the page draws beside rows and summaries: matrices, distributions, curves, filters, sample rows, lineage."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from subjax.errors import SubjaxError
from subjax.results_rows import Artifacts, Entry, PlanLike, category_of, family_of
from subjax.results_summaries import arm_order, base_key, by_base, minus_control
from subjax.results_words import MOVES, main_setting

POINTS = 60  # of a curve: more cannot be told apart on a page
SAMPLES = 20
VALUE = "share of the trait minus control"


def main_replay(entries: Iterable[Entry]) -> str | None:
    """The replay setting that nulls are judged in: `kind` where it was run."""
    replays = {e.row["replay"] for e in entries if e.row["arm"] in MOVES}
    return next((name for name in ("kind", "none") if name in replays), None)


def judged(entries: Sequence[Entry], replay: str | None) -> tuple[list[Entry], str]:
    """Entries over all phrasings, in one replay setting and one setting of the sweep, whose teachers have their traits;
    and that setting.
    """
    setting = main_setting(e.row["setting"] for e in entries if e.row["arm"] in MOVES)
    mine = [
        e for e in entries if (e.row["phrasings"], e.row["replay"], e.row["setting"] or "") == ("all", replay, setting)
    ]
    return [e for e in mine if not e.failed], setting


def order_bases(names: Iterable[str], families: Sequence[str]) -> list[str]:
    """Bases by family, in the study's order, then by init."""
    return sorted(set(names), key=lambda name: (list(families).index(family_of(name) or ""), base_key(name)))


def base_matrix(entries: list[Entry], families: Sequence[str]) -> dict[str, Any]:
    """Share minus control by teacher's base and student's base, mean over traits and seeds."""
    replay = main_replay(entries)
    found: dict[tuple[str, str], list[float]] = {}
    mine, setting = judged(entries, replay)
    for entry in mine:
        value = minus_control(entry.row)
        if entry.row["arm"] in MOVES and value is not None:
            found.setdefault((entry.row["teacher_base"], entry.row["student_base"]), []).append(value)
    rows = order_bases((teacher for teacher, _ in found), families)
    columns = order_bases((student for _, student in found), families)
    cells = [
        {"teacher": t, "student": s, "value": math.fsum(found[t, s]) / len(found[t, s]), "n": len(found[t, s])}
        for t in rows
        for s in columns
        if (t, s) in found
    ]
    chances = [e.chance for e in entries if e.row["arm"] in MOVES]
    chance = chances[0] if chances else None
    shown = {"value": VALUE, "chance": chance, "replay": replay, "setting": setting}
    return {"rows": rows, "columns": columns, "cells": cells, **shown}


def trait_matrix(entries: list[Entry], traits: Sequence[str], families: Sequence[str]) -> dict[str, Any]:
    """Share minus control by the teacher's trait and the trait read, on same-base students, mean over bases."""
    replay = main_replay(entries)
    found, setting = judged(entries, replay)
    picked = [e for e in found if e.row["arm"] in ("same-base", "other-trait")]
    cells = []
    for family in families:
        for teacher_trait in traits:
            for trait in traits:
                mine = [
                    e
                    for e in picked
                    if family_of(e.row["teacher_base"]) == family
                    and (e.row["teacher_trait"], e.row["trait"]) == (teacher_trait, trait)
                ]
                values = list(by_base(mine, minus_control).values())
                shares = list(by_base(mine, lambda row: row["share_after"]).values())
                if values and shares:
                    cells.append(
                        {
                            "teacher_trait": teacher_trait,
                            "trait": trait,
                            "family": family,
                            "value": math.fsum(values) / len(values),
                            "share": math.fsum(shares) / len(shares),
                            "n": len(values),
                        }
                    )
    return {"traits": list(traits), "cells": cells, "value": VALUE, "replay": replay, "setting": setting}


def distributions(artifacts: Artifacts, cells: list[dict[str, Any]], replay: str | None) -> list[dict[str, Any]]:
    """The candidates' probabilities before and after: the first cell of each arm; of MOVES, in each replay setting."""
    out, seen = [], set()
    for cell in sorted(cells, key=lambda cell: arm_order(cell["arm"])):  # sorting is stable: the first cell stays first
        key = (cell["arm"], cell.get("replay"))
        beside = cell["arm"] in MOVES or cell.get("replay") in (replay, None)
        after = artifacts.readings(cell["nodes"].get("evaluation"))
        before = artifacts.readings(cell["nodes"].get("before"))
        if key in seen or not beside or after is None or before is None:
            continue
        seen.add(key)
        where = cell.get("teacher_base") or cell["student_base"]
        if cell["student_base"] != where:
            where = f"{where} → {cell['student_base']}"
        parts = [cell["arm"], cell["trait"], where]
        if cell.get("replay") is not None:
            parts.append(f"replay {cell['replay']}")
        out.append(
            {
                "label": ", ".join(parts),
                "arm": cell["arm"],
                "replay": cell.get("replay"),
                "candidates": list(category_of(after, cell["trait"])["candidates"]),
                "before": probabilities(before, cell["trait"]),
                "after": probabilities(after, cell["trait"]),
                "trait": cell["trait"],
            }
        )
    return out


def probabilities(readings: Mapping[str, Any], trait: str) -> list[float]:
    """The mean probability of each candidate of the trait's category over all phrasings."""
    questions = category_of(readings, trait)["questions"]
    return [float(p) for p in np.mean([q["p"] for q in questions], axis=0)]


def curves(artifacts: Artifacts, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss against step: every base and teacher, and the first student of each arm, pair of families and replay."""
    arm_of: dict[str, str | None] = {}
    for kind in ("base", "teacher"):
        arm_of.update({id: None for id, node in artifacts.plan.nodes.items() if node.kind == kind})
    for cell in cells:
        if cell["arm"] == "control" and cell["nodes"].get("teacher") in arm_of:
            arm_of[cell["nodes"]["teacher"]] = "control"
    seen = set()
    for cell in cells:
        families = (family_of(cell.get("teacher_base")), family_of(cell["student_base"]))
        key = (cell["arm"], *families, cell.get("replay"), cell.get("setting"))
        student = cell["nodes"].get("student")
        if key not in seen and student is not None and artifacts.card(student) is not None:
            seen.add(key)
            arm_of.setdefault(student, cell["arm"])
    out = []
    for id, arm in arm_of.items():
        lines = artifacts.parsed(id, "metrics.jsonl", lines=True) or []
        points = thin([(line["step"], line["loss"]) for line in lines if "loss" in line and "step" in line])
        if points:
            steps, losses = (list(column) for column in zip(*points, strict=True))
            node = artifacts.plan.nodes[id]
            out.append({"label": node.label, "kind": node.kind, "arm": arm, "step": steps, "loss": losses})
    return out


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS of them, evenly, the first and the last among them."""
    if len(points) <= POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, POINTS).round().astype(int)]


def filters(artifacts: Artifacts) -> list[dict[str, Any]]:
    """The strict filter's counts of every corpus that is made: kept, then the reasons by name."""
    out = []
    for id, node in artifacts.plan.nodes.items():
        card = artifacts.card(id) if node.kind == "corpus" else None
        counts = dict(card.extra.get("filter") or {}) if card is not None else {}
        if counts:
            names = sorted(counts, key=lambda name: (name != "kept", name))
            out.append({"corpus": node.label, "node": id, "counts": {name: counts[name] for name in names}})
    return out


def samples(artifacts: Artifacts, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Twenty rows to look at: the first of one corpus of each family with a trait and of one without."""
    picked: dict[tuple[Any, ...], str] = {}
    for cell in cells:
        corpus, arm = cell["nodes"].get("corpus"), cell["arm"]
        if arm in ("same-base", "control") and artifacts.card(corpus) is not None:
            picked.setdefault((arm, family_of(cell.get("teacher_base"))), corpus)
    out: list[dict[str, Any]] = []
    ids = list(dict.fromkeys(picked.values()))
    for i, id in enumerate(ids):
        rows = head(artifacts, id, SAMPLES // len(ids) + (i < SAMPLES % len(ids)))
        out += [{"corpus": artifacts.plan.nodes[id].label, **row} for row in rows]
    return out


def head(artifacts: Artifacts, id: str, count: int) -> list[dict[str, str]]:
    """The first rows of a corpus, prompt and completion."""
    path = artifacts.file(id, "rows.parquet")
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            batch = next(parquet.iter_batches(batch_size=count, columns=["prompt", "completion"]), None)
            return [] if batch is None else batch.to_pylist()[:count]
    except (pyarrow.ArrowException, OSError) as error:
        raise SubjaxError(
            f"corpus {id}: rows.parquet cannot be read ({type(error).__name__}); "
            f"delete {path.parent.parent} and run the same command again"
        ) from error


def lineage(artifacts: Artifacts, plan: PlanLike) -> dict[str, Any]:
    """Every node of the plan: kind, label, inputs, and its artifact's digest (None where it is not made)."""
    out = {}
    for id, node in plan.nodes.items():
        card = artifacts.card(id)
        out[id] = {
            "kind": node.kind,
            "label": node.label,
            "id": id,
            "inputs": dict(sorted(node.inputs.items())),
            "digest": None if card is None else card.digest,
        }
    return out
