"""results.json and results.csv: every figure that a report shows, computed once, from the artifacts of a plan alone.

The same artifacts give the same bytes: nothing here reads a clock, a path or the order in which work was done.
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from subjax import results_figures as figures
from subjax import results_images, results_readings, results_summaries, results_words
from subjax.errors import SubjaxError
from subjax.files import write_over, writing
from subjax.measure import statistics
from subjax.results_rows import (
    Artifacts,
    Entry,
    PlanLike,
    StoreLike,
    base_of,
    entries,
    failed_teachers,
    failing_share,
    family_of,
    traits_of,
    unique,
)
from subjax.results_words import headline_table
from subjax.schema import Statistics

__all__ = ["FORMAT", "compute", "headline_table", "smallest_lift", "write"]

FORMAT = 1
DIGITS = 9  # significant digits of a float: beyond them no reading differs, and text stays short


def compute(plan: PlanLike, store: StoreLike) -> dict[str, Any]:
    """The results of a study as a JSON-ready dict (format 1), from whatever of its plan is made.

    Nodes that are missing leave out their rows, and are named in `study.notes`. Raises SubjaxError when a payload that
    is read is damaged.
    """
    artifacts = Artifacts(plan, store)
    settings = Statistics(**plan.study["statistics"])
    kind = plan.study["kind"]
    if kind not in ("traits", "pretrained", "images"):
        raise SubjaxError(
            f"plan: a study of kind {kind!r} is unknown; this version knows traits, pretrained and images"
        )
    found = results_images.parts(artifacts, settings) if kind == "images" else trait_parts(artifacts, settings)
    results = {"format": FORMAT, **found}
    results["study"]["notes"] += missing(artifacts)
    results["lineage"] = figures.lineage(artifacts, plan)
    return rounded(results)


def write(plan: PlanLike, store: StoreLike) -> epath.Path:
    """Compute the results and put results.json and results.csv into <workdir>/report, each atomically.

    Returns the path of results.json. Raises SubjaxError as `compute`, and StoreError when it cannot be written.
    """
    results = compute(plan, store)
    folder = epath.Path(store.root) / "report"
    path = folder / "results.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_over(folder / "results.csv", as_csv(results["rows"]))
        write_over(path, json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def smallest_lift(
    units: int, settings: Statistics, comparisons: int = 1, unit: str = "base", in_sds: bool = False
) -> tuple[float | None, str]:
    """The smallest lift that so many units can show, with a sentence for the plan; None where none can.

    80 % power at 1 - confidence, two-sided. In share, the SD over units as the settings expect it; or `in_sds`, where
    nothing is known of it. `comparisons` > 1 asks that it stand after Bonferroni's correction too.
    """
    alpha = 1 - statistics.corrected_confidence(settings.confidence, comparisons)
    sd = 1.0 if in_sds else settings.expected_sd
    lift = results_summaries.number(statistics.smallest_detectable(units, sd, 0.8, alpha))
    if lift is None:
        return None, f"{units} {unit}{'s' * (units != 1)}: too few for an interval; two give one, three a useful one"
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    what = f"a mean difference of {lift:.2f} SDs over {unit}s" if in_sds else f"a mean lift of {lift:.3f}"
    expected = "" if in_sds else f", if its SD over {unit}s is {sd:g}"
    return lift, (
        f"{units} {unit}s show {what} or more with 80 % power at {results_words.percent(settings.confidence)} "
        f"confidence{corrected}{expected}"
    )


def trait_parts(artifacts: Artifacts, settings: Statistics) -> dict[str, Any]:
    """Everything but format and lineage, for a study of traits."""
    study = artifacts.plan.study
    cells = unique(study["cells"])
    traits = traits_of(cells)
    families = list(dict.fromkeys(family_of(c.get("teacher_base") or c["student_base"]) or "" for c in cells))
    families += [f for f in dict.fromkeys(family_of(c["student_base"]) or "" for c in cells) if f not in families]
    chosen_on = list(study.get("chosen_on") or ())
    other_trait = "other-trait" in arms_of(study)
    everything = entries(artifacts, cells, other_trait, chosen_on)
    failed = failed_teachers(artifacts, cells)
    pretrained = study["kind"] == "pretrained"
    summaries = results_summaries.summaries(everything, traits, families, settings)
    matrices = results_summaries.trait_matrices(artifacts, cells, traits, failed) if len(traits) > 1 else {}
    tests = results_summaries.diagonal_tests(matrices, settings)
    tests += results_summaries.unseen_tests(everything, families, settings)
    label = results_summaries.mean_label(traits)
    margins = margin_parts(artifacts, cells, failed, other_trait, settings)
    return {
        "study": {
            "name": study["name"],
            "kind": study["kind"],
            "config": study["config"],
            "points": len(study["points"]),
            "bases": len({base_of(cell) for cell in cells}),
            "runs": len({e.row["node"] for e in everything if e.row["arm"] != "untrained"}),
            "chosen_on": chosen_on,
            "failed_teachers": [artifacts.plan.nodes[id].label for id in failed],
            "notes": trait_notes(everything, summaries, traits, other_trait, chosen_on, failed, artifacts, settings)
            + list(study.get("notes", ())),
        },
        "headline": {
            "sentence": margins["sentence"] or results_words.sentence(summaries, label, settings.margin, len(failed)),
            "rows": margins["headline"] if pretrained else results_words.headline_rows(summaries, label),
        },
        "readings": margins["readings"],
        "rows": [entry.row for entry in everything],
        "summaries": summaries,
        "tests": tests,
        "base_matrix": figures.base_matrix(everything, families),
        "trait_matrix": figures.trait_matrix(everything, traits, families),
        "distributions": figures.distributions(artifacts, cells, figures.main_replay(everything)),
        "curves": figures.curves(artifacts, cells),
        "filters": figures.filters(artifacts),
        "samples": figures.samples(artifacts, cells),
        "images": None,
    }


def margin_parts(
    artifacts: Artifacts,
    cells: list[dict[str, Any]],
    failed: Mapping[str, float],
    other_trait: bool,
    settings: Statistics,
) -> dict[str, Any]:
    """What a study of pretrained models has beside: every way of asking, and a headline read by log-odds margin."""
    if artifacts.plan.study["kind"] != "pretrained":
        return {"sentence": "", "headline": [], "readings": None}
    rows = results_readings.rows(artifacts, cells, failed, other_trait)
    margins = results_readings.summaries(rows, settings)
    first = results_readings.headline_of(artifacts, cells)
    return {
        "sentence": results_readings.sentence(margins, first, len(failed)),
        "headline": results_readings.headline_rows(margins, first),
        "readings": {"headline": first, "rows": rows, "summaries": margins},
    }


def arms_of(study: Mapping[str, Any]) -> set[str]:
    """The arms that the study asks for, at any point of its sweep."""
    arms = set(study["config"].get("arms") or ())
    for point in study["points"]:
        arms.update(point.get("arms") or ())
    return arms


def trait_notes(
    everything: list[Entry],
    summaries: list[dict[str, Any]],
    traits: list[str],
    other_trait: bool,
    chosen_on: list[str],
    failed: Mapping[str, float],
    artifacts: Artifacts,
    settings: Statistics,
) -> list[str]:
    """What a reader should know about the study's figures, one sentence each."""
    at = results_words.percent(settings.confidence)
    over = {
        "run": "over runs, made anew from other seeds; on one checkpoint they say nothing of others.",
        "base": "over the teachers' bases; runs on one base are averaged first.",
    }
    notes = [f"Intervals are t intervals at {at} {over[of]}" for of in sorted({entry.of for entry in everything})] + [
        "Corrected intervals (Bonferroni) and p-values (Holm) hold for all comparisons with control of one trait, "
        "phrasings, replay and setting at once; the others are for one comparison.",
    ]
    if any(e.row["replay"] == "kind" for e in everything):
        notes.append("Replay asks for the right category over the training phrasings; it names no item of it.")
    if len({entry.unit for entry in everything}) == 1:
        of = everything[0].of
        notes.append(f"There is one {of}: no interval can be given, whatever the number of students on it.")
    if other_trait and len(traits) == 1:
        notes.append("The study has one trait, so no other trait is read and no diagonal tested.")
    if chosen_on:
        left = any(not entry.chosen for entry in everything)
        told = "tests without these cells stand beside" if left else "there are no other cells to test"
        notes.append(f"Settings were chosen on {', '.join(chosen_on)}; {told}.")
    for id, share in failed.items():
        label, least = artifacts.plan.nodes[id].label, failing_share(artifacts.plan)
        notes.append(
            f"{label} has a held-out share of {share:.3f}, under {least:g}: failed, left out of the summaries."
        )
    unjudged = sum(s["minus_control"] is None for s in summaries if s["arm"] not in ("control", "untrained"))
    if unjudged:
        notes.append(f"{unjudged} summaries have no matched control, so they show shares alone.")
    return notes + mixed(everything)


def mixed(everything: list[Entry]) -> list[str]:
    """A note when rows that look alike come from different students: a sweep over a setting that rows do not name."""
    names = ("arm", "trait", "teacher_trait", "teacher_base", "student_base", "seed", "replay", "phrasings", "setting")
    seen: dict[tuple[Any, ...], set[str]] = {}
    for entry in everything:
        seen.setdefault(tuple(entry.row[name] for name in names), set()).add(entry.row["node"])
    alike = sum(len(nodes) > 1 for nodes in seen.values())
    if not alike:
        return []
    return [f"{alike} groups of rows differ only in a setting that rows do not name; the summaries average over it."]


def missing(artifacts: Artifacts) -> list[str]:
    """One note a kind of node that is planned and not made."""
    absent: dict[str, list[str]] = {}
    for id, node in artifacts.plan.nodes.items():
        if artifacts.card(id) is None:
            absent.setdefault(node.kind, []).append(node.label)
    notes = []
    for kind, labels in absent.items():
        shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
        notes.append(f"Not made, {len(labels)} of kind {kind}: {shown}; the rows that need them are missing.")
    return notes


def rounded(value: Any) -> Any:
    """`value` with floats at 9 significant digits, tuples as lists and NaN and infinities as None, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") + 0.0 if math.isfinite(value) else None
    return value


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV (RFC 4180 but for the line ends, which are newlines); what does not apply is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["node"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
