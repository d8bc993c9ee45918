"""From rows to summaries: one value a base, then intervals, tests and their correction, in one place for every arm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subjax import results_words
from subjax.measure import statistics
from subjax.results_rows import Artifacts, Entry, family_of, read, trials
from subjax.schema import ARM_ORDER, Statistics

KEY = ("arm", "pairing", "trait", "teacher_family", "student_family", "replay", "phrasings", "setting")


def replay_order(replay: str) -> tuple[int, str]:
    """Numbers only first, then category replay, then whatever else there is."""
    return {"none": 0, "kind": 1}.get(replay, 2), replay


def arm_order(arm: str) -> int:
    """An arm's place in the order in which arms are shown."""
    return ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER)


def number(value: float | None) -> float | None:
    """None for NaN and infinities, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(value)


def mean_label(traits: Sequence[str]) -> str:
    """The name of the mean over a study's traits."""
    return f"mean of {len(traits)}"


def by_base(members: Iterable[Entry], value: Callable[[dict[str, Any]], float | None]) -> dict[str, float]:
    """One value a base, bases in order: the mean over its runs (traits and seeds) that have a value."""
    values: dict[str, list[float]] = {}
    for entry in members:
        one = value(entry.row)
        if one is not None:
            values.setdefault(entry.unit, []).append(one)
    return {
        base: math.fsum(found) / len(found) for base, found in sorted(values.items(), key=lambda kv: base_key(kv[0]))
    }


def base_key(base: str) -> tuple[str, int, str]:
    """Orders `gpt/2` before `gpt/10`."""
    family, _, init = base.rpartition("/")
    return family, int(init) if init.isdigit() else -1, base


def minus_control(row: Mapping[str, Any]) -> float | None:
    """The student's share less that of its matched control; None where either is missing."""
    if row["share_after"] is None or row["control_share"] is None:
        return None
    return row["share_after"] - row["control_share"]


def groups(entries: Iterable[Entry], traits: Sequence[str]) -> dict[tuple[Any, ...], list[Entry]]:
    """Entries by the key of their summaries: each counts for its own trait and for the mean over traits."""
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        if entry.failed:
            continue
        row = entry.row
        families = (family_of(row["teacher_base"]), family_of(row["student_base"]))
        for label in (mean_label(traits), row["trait"]):
            key = (row["arm"], entry.pairing, label, *families, row["replay"], row["phrasings"], row["setting"])
            found.setdefault(key, []).append(entry)
    return found


def order(traits: Sequence[str], families: Sequence[str]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Sorts summary keys: the mean first, then by phrasings, replay, arm, families."""
    labels = [mean_label(traits), *traits]
    places = {name: i for i, name in enumerate(families)}

    def key(parts: tuple[Any, ...]) -> tuple[Any, ...]:
        arm, pairing, label, teacher, student, replay, phrasings, setting = parts
        return (
            labels.index(label),
            ("all", "train", "held-out").index(phrasings),
            setting or "",
            replay_order(replay or ""),
            arm_order(arm),
            ("same-base", "cross-order", "cross-init", "cross-family", None).index(pairing),
            places.get(teacher, -1),
            places.get(student, -1),
        )

    return key


def summarize(key: tuple[Any, ...], members: list[Entry], settings: Statistics) -> dict[str, Any]:
    """One summary, but for what depends on the other summaries of its table (see `correct`)."""
    shares = list(by_base(members, lambda row: row["share_after"]).values())
    lifts = list(by_base(members, lambda row: row["lift"]).values())
    odds = list(by_base(members, lambda row: row["logodds_lift"]).values())
    differences = list(by_base(members, minus_control).values())
    share = statistics.t_interval(shares, settings.confidence)
    boot = statistics.bootstrap_interval(shares, settings.confidence, settings.bootstrap, settings.seed)
    lift = statistics.t_interval(lifts, settings.confidence)
    against = statistics.t_interval(differences, settings.confidence)
    chance = math.fsum(e.chance for e in members) / len(members)
    rows = [entry.row for entry in members]
    summary = {
        **dict(zip(KEY, key, strict=True)),
        "unit": unit_of(entry.of for entry in members),
        "bases": len({entry.unit for entry in members}),
        "runs": len({row["node"] for row in rows}),
        "chance": chance,
        "share": number(share.mean),
        "share_low": number(share.low),
        "share_high": number(share.high),
        "boot_low": number(boot.low),
        "boot_high": number(boot.high),
        "minus_control": number(against.mean),
        "minus_control_low": number(against.low),
        "minus_control_high": number(against.high),
        "corrected_low": None,
        "corrected_high": None,
        "comparisons": None,
        "p_value": number(statistics.t_test(differences)),
        "p_corrected": None,
        "equivalence": None,
        "lift": number(lift.mean),
        "lift_low": number(lift.low),
        "lift_high": number(lift.high),
        "logodds_lift": number(statistics.t_interval(odds).mean),
        "mass_min": min(row["mass_after"] for row in rows),
        "collapsed": len({row["node"] for row in rows if row["collapsed"]}),
        "words": "",
        "nodes": sorted({row["node"] for row in rows}),
    }
    away = differences or [value - chance for value in shares]
    if key[0] in results_words.NULLS and settings.margin > 0 and not results_words.too_many_collapsed(summary):
        test = statistics.equivalence_test(away, settings.margin, 1 - settings.confidence)
        summary["equivalence"] = {"margin": settings.margin, "p": number(test.p_value), "equivalent": test.equivalent}
    return summary


def unit_of(units: Iterable[str]) -> str:
    """What an interval is over: "base" or "run"; "base or run" where a mean is over families that differ in it."""
    return " or ".join(sorted(set(units)))


TABLE = ("trait", "phrasings", "replay", "setting")


def correct(
    summaries: list[dict[str, Any]], values: list[list[float]], settings: Statistics, by: Sequence[str] = TABLE
) -> None:
    """Fill in what depends on the table: simultaneous intervals (Bonferroni) and p-values (Holm).

    A table is what is read side by side: summaries that agree in `by` (one trait or the mean, phrasings, replay and
    setting), all arms and families that have a control. `values` are each summary's differences from control, one a
    trial.
    """
    tables: dict[tuple[Any, ...], list[int]] = {}
    for i, summary in enumerate(summaries):
        if summary["p_value"] is not None:
            table = tuple(summary[name] for name in by)
            tables.setdefault(table, []).append(i)
    for members in tables.values():
        confidence = statistics.corrected_confidence(settings.confidence, len(members))
        adjusted = statistics.holm({i: summaries[i]["p_value"] for i in members})
        for i in members:
            interval = statistics.t_interval(values[i], confidence)
            summaries[i].update(
                corrected_low=number(interval.low),
                corrected_high=number(interval.high),
                comparisons=len(members),
                p_corrected=number(adjusted[i]),
            )


def summaries(
    entries: list[Entry], traits: Sequence[str], families: Sequence[str], settings: Statistics
) -> list[dict[str, Any]]:
    """All summaries of a study, in the order in which they are read."""
    found = groups(entries, traits)
    keys = sorted(found, key=order(traits, families))
    out = [summarize(key, found[key], settings) for key in keys]
    correct(out, [list(by_base(found[key], minus_control).values()) for key in keys], settings)
    for summary in out:
        summary["words"] = results_words.words(summary, settings.margin, settings.confidence)
    return out


def trait_matrices(
    artifacts: Artifacts, cells: list[dict[str, Any]], traits: Sequence[str], failed: Iterable[str]
) -> dict[tuple[Any, ...], np.ndarray]:
    """By (family, replay, setting): shares [bases, teacher's trait, trait read] of same-base students, mean over seeds.

    All entries are shares of the same candidates, none left out: relabelling teachers must not change what is read.
    """
    failed = set(failed)
    trial = trials(artifacts.plan.study)
    found: dict[tuple[Any, ...], dict[str, dict[tuple[int, int], list[float]]]] = {}
    for cell in cells:
        readings = artifacts.readings(cell["nodes"].get("evaluation"))
        if cell["arm"] != "same-base" or readings is None or cell["nodes"].get("teacher") in failed:
            continue
        key = (family_of(cell["teacher_base"]), cell.get("replay"), cell.get("setting"))
        base = found.setdefault(key, {}).setdefault(trial(cell)[0], {})
        for j, trait in enumerate(traits):
            mean = read(readings, trait, "all")
            if mean is not None and mean.share is not None:
                base.setdefault((traits.index(cell["teacher_trait"]), j), []).append(mean.share)
    out = {}
    for key, bases in found.items():
        array = np.full((len(bases), len(traits), len(traits)), np.nan)
        for b, base_name in enumerate(sorted(bases, key=base_key)):
            for (i, j), shares in bases[base_name].items():
                array[b, i, j] = math.fsum(shares) / len(shares)
        out[key] = array
    return out


def diagonal_tests(matrices: Mapping[tuple[Any, ...], np.ndarray], settings: Statistics) -> list[dict[str, Any]]:
    """The permutation test of each trait matrix."""
    out = []
    for family, replay, setting in sorted(matrices, key=lambda key: replay_order(key[1] or "")):
        array = matrices[family, replay, setting]
        test = statistics.permutation_test_diagonal(array, settings.permutations, settings.seed)
        name = ", ".join(str(part) for part in ("diagonal", family, f"replay {replay}", setting) if part is not None)
        how = f"all {test.relabellings} relabellings" if test.exact else f"{test.relabellings} drawn relabellings"
        alpha = 1 - settings.confidence
        if test.n == 0 or not math.isfinite(test.p_value):
            words = "No base has the students of every trait, so the diagonal cannot be tested."
        elif test.p_value < alpha:
            words = (
                f"A student's own teacher's trait rises above the other traits by {test.statistic:.3f} in share; over "
                f"{how} p {results_words.p_text(test.p_value)}."
            )
        else:
            least = 1 / test.relabellings
            few = f"; with {test.n} bases p cannot fall below {least:.3g}" if test.exact and least >= alpha else ""
            p = results_words.p_text(test.p_value)
            words = f"The trait of the own teacher does not stand out: p {p} over {how}{few}."
        out.append(
            {
                "name": name,
                "what": "mean share on the trait × trait diagonal minus off it, same-base students; "
                "teachers' labels permuted within each base",
                "statistic": number(test.statistic),
                "p_value": number(test.p_value),
                "n": test.n,
                "words": words,
            }
        )
    return out


def unseen_tests(entries: list[Entry], families: Sequence[str], settings: Statistics) -> list[dict[str, Any]]:
    """Same-base against control without the cells that settings were chosen on, where a family has such cells."""
    out = []
    picked = [e for e in entries if e.row["arm"] == "same-base" and e.row["phrasings"] == "all" and not e.failed]
    tables = dict.fromkeys((e.row["replay"] or "", e.row["setting"] or "") for e in picked)
    for replay, setting in sorted(tables, key=lambda table: replay_order(table[0])):
        for family in families:
            of = (family, replay, setting)
            mine = [
                e
                for e in picked
                if (family_of(e.row["teacher_base"]), e.row["replay"] or "", e.row["setting"] or "") == of
            ]
            rest = list(by_base((e for e in mine if not e.chosen), minus_control).values())
            if not any(e.chosen for e in mine) or not rest:
                continue
            interval = statistics.t_interval(rest, settings.confidence)
            ends = results_words.bounds(number(interval.low), number(interval.high), True)
            what = f"{results_words.figure(interval.mean, True)} {ends}"
            out.append(
                {
                    "name": ", ".join(
                        filter(None, ("same-base without the chosen cells", family, f"replay {replay}", setting))
                    ),
                    "what": "share minus control over bases, leaving out the cells that settings were chosen on",
                    "statistic": number(interval.mean),
                    "p_value": number(statistics.t_test(rest)),
                    "n": interval.n,
                    "words": f"{what} against control on the cells that no setting was chosen on.",
                }
            )
    return out
