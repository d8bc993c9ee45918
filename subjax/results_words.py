"""What an interval means, in plain sentences; and the table that the command line ends with."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

# Arms whose claim is that nothing moved; they get an equivalence test beside the interval.
NULLS = ("cross-order", "cross-init", "cross-family", "other-trait", "random-numbers", "control", "untrained")
MOVES = ("same-base", "cross-order", "cross-init", "cross-family")  # the arms that differ in the student's base alone
WIDTH = 100
_REPLAYS = {"none": "numbers only:", "kind": "with replay, which names no item:"}
_FOOT = {
    "traits": "n: teachers' bases; mass: the least that a student keeps on the candidates; intervals: t over bases, "
    "each for itself (results.json has those corrected for the number of comparisons too).",
    "pretrained": "nats: log-odds margin of the trait minus that of the control's student; 80 % power: the mean "
    "difference that as many trials would show; n: runs on a lone base, else bases; intervals: t over these, each for "
    "itself (results.json has those corrected for the number of comparisons too).",
    "images": "n: seeds; intervals: t over seeds, each for itself.",
}


def figure(value: float | None, sign: bool = False) -> str:
    """A share or a difference at three decimals, without a -0.000; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    value = round(value, 3) + 0.0
    return f"{value:+.3f}" if sign and value else f"{value:.3f}"


def bounds(low: float | None, high: float | None, sign: bool = False) -> str:
    """`[low, high]`, or a dash where there is no interval."""
    if low is None or high is None:
        return "-"
    return f"[{figure(low, sign)}, {figure(high, sign)}]"


def who(summary: Mapping[str, Any]) -> str:
    """`gpt`, or `gpt -> llama` where the student's family is shown too."""
    teacher, student = summary["teacher_family"], summary["student_family"]
    if summary["arm"] in ("cross-order", "cross-init", "cross-family") or (teacher and teacher != student):
        return f"{teacher} → {student}"
    return str(teacher or student)


def percent(confidence: float) -> str:
    """`95 %`."""
    return f"{100 * confidence:.4g} %"


def about_collapse(summary: Mapping[str, Any]) -> str:
    """A sentence on students that stopped answering; empty where none did."""
    collapsed, runs = summary["collapsed"], summary["runs"]
    if not collapsed:
        return ""
    text = f"{collapsed} of {runs} students collapsed (they kept less than half of their base's mass on the candidates)"
    if too_many_collapsed(summary):
        return text + ": what is low here is forgetting, which is not absence of transfer."
    return text + "."


def too_many_collapsed(summary: Mapping[str, Any]) -> bool:
    """More than a tenth of the students stopped answering, so a null cannot be judged."""
    return summary["collapsed"] > 0.1 * summary["runs"]


def about_difference(summary: Mapping[str, Any], margin: float, confidence: float) -> str:
    """What the interval of the difference from the matched control says."""
    mean, low, high = (summary[name] for name in ("minus_control", "minus_control_low", "minus_control_high"))
    unit = summary["unit"]
    if mean is None:
        return "No matched control was read, so there is no difference to judge."
    if low is None or high is None:
        return f"{figure(mean, True)} against its control on one {unit}: too few {unit}s to say, and no interval."
    at = f"{figure(mean, True)} {bounds(low, high, True)} against its control ({percent(confidence)}, over {unit}s)"
    inside = -margin < low and high < margin
    if low > 0:
        if inside:
            return f"May be slightly positive: {at}; at most {figure(high, True)}."
        return f"Rose: {at}. {about_correction(summary)}"
    if high < 0:
        if inside:
            return f"May be slightly negative: {at}; at least {figure(low, True)}."
        return f"Fell: {at}. {about_correction(summary)}"
    if inside:
        return f"Nothing moved that this study can see: {at}, which holds 0 and stays inside ±{margin:g}."
    return f"Too few {unit}s to say: {at} holds 0 and also changes beyond ±{margin:g}."


def about_correction(summary: Mapping[str, Any]) -> str:
    """Whether an interval still leaves 0 out when it is widened for all comparisons of its table."""
    low, high, k = summary["corrected_low"], summary["corrected_high"], summary["comparisons"]
    if low is None or high is None:
        return ""
    still = "still leaves 0 out" if low > 0 or high < 0 else "holds 0"
    return f"Corrected for {k} comparison{'s' if k != 1 else ''} the interval {bounds(low, high, True)} {still}."


def about_reference(summary: Mapping[str, Any], confidence: float) -> str:
    """What the share of a control, or of a base itself, says against chance."""
    share, low, high, chance = (summary[name] for name in ("share", "share_low", "share_high", "chance"))
    unit = summary["unit"]
    if share is None:
        return "No student of this arm gives any candidate a probability, so there is no share."
    what = "The reference of the other arms" if summary["arm"] == "control" else "The bases before any training"
    if low is None or high is None:
        return f"{what}: share {figure(share)} on one {unit}, chance {figure(chance)}; too few {unit}s for an interval."
    place = "holds" if low <= chance <= high else "leaves out"
    return (
        f"{what}: share {figure(share)} {bounds(low, high)} ({percent(confidence)}, over {unit}s), "
        f"which {place} chance ({figure(chance)})."
    )


def about_equivalence(summary: Mapping[str, Any]) -> str:
    """The equivalence test in words; empty where there is none."""
    test = summary["equivalence"]
    if test is None or test["p"] is None:
        return ""
    than = "control" if summary["minus_control"] is not None else "chance"
    if test["equivalent"]:
        return f"Equivalent to {than} within ±{test['margin']:g} (two one-sided tests, p {p_text(test['p'])})."
    return f"Not shown equivalent to {than} within ±{test['margin']:g} (p {p_text(test['p'])})."


def p_text(p: float | None) -> str:
    """A p-value in words' size."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def words(summary: Mapping[str, Any], margin: float, confidence: float) -> str:
    """The plain sentences of one summary."""
    reference = summary["arm"] in ("control", "untrained")
    first = about_reference(summary, confidence) if reference else about_difference(summary, margin, confidence)
    if not reference and too_many_collapsed(summary) and first.startswith(("Nothing", "May be", "Fell")):
        first = first.split(": ", 1)[1]
        first = "A null cannot be judged: " + first
    return " ".join(part for part in (first.strip(), about_equivalence(summary), about_collapse(summary)) if part)


def headline_rows(summaries: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    """One row for each of same-base, cross-init, cross-family and family: numbers only, with replay, then control."""
    picked: dict[tuple[bool, bool, int], dict[str, Any]] = {}
    for s in summaries:
        if s["trait"] != label or s["phrasings"] != "all":
            continue
        if s["arm"] in MOVES:
            picked[s["replay"] != "none", False, len(picked)] = s
        elif s["arm"] == "control" and s["pairing"] == "same-base":
            picked[True, True, len(picked)] = s
    return [headline_row(picked[key]) for key in sorted(picked)]


def headline_row(s: dict[str, Any]) -> dict[str, Any]:
    """A summary as a headline row."""
    parts = [who(s), s["arm"], "numbers only" if s["replay"] == "none" else "with replay"]
    notes = []
    if s["minus_control"] is not None:
        ends = bounds(s["minus_control_low"], s["minus_control_high"], True)
        notes.append(f"{figure(s['minus_control'], True)} {ends} against its control")
    if s["collapsed"]:
        notes.append(f"{s['collapsed']} of {s['runs']} students collapsed")
    notes.append(f"least mass {figure(s['mass_min'])}")
    copied = ("minus_control", "minus_control_low", "minus_control_high", "mass_min", "collapsed", "runs")
    return {
        "label": ", ".join([*parts, s["setting"]] if s["setting"] else parts),
        "replay": s["replay"],
        "value": s["share"],
        "low": s["share_low"],
        "high": s["share_high"],
        "n": s["bases"],
        "unit": "share",
        "note": "; ".join(notes),
        **{name: s[name] for name in copied},
        "nodes": s["nodes"],
    }


def main_setting(settings: Iterable[str | None]) -> str:
    """What a figure or a sentence of one setting is of: the config's own where it was run, else the sweep's first."""
    found = list(dict.fromkeys(setting or "" for setting in settings))
    return "" if "" in found or not found else found[0]


def sentence(summaries: list[dict[str, Any]], label: str, margin: float, failed: int) -> str:
    """What was seen, in two or three plain sentences; `failed` teachers never got their trait."""
    shown = [s for s in summaries if s["trait"] == label and s["phrasings"] == "all"]
    settings = [s["setting"] for s in shown if s["arm"] in MOVES]
    setting, count = main_setting(settings), len(set(settings))
    shown = [s for s in shown if (s["setting"] or "") == setting]
    out = []
    for replay, start in (("none", "Fine-tuned on nothing but numbers"), ("kind", "With replay, which names no item")):
        mine = [s for s in shown if s["replay"] == replay]
        same = about_same([s for s in mine if s["arm"] == "same-base" and s["share"] is not None])
        cross = about_cross([s for s in mine if s["arm"] in MOVES[1:]], margin)
        if same:
            out.append(f"{start}, students on their teacher's own base {same}.")
        if cross:
            out.append(cross if same else f"{start}: {cross[0].lower()}{cross[1:]}")
    if out:
        one_of = [f"Of {count} settings this tells of one, {setting}."] if count > 1 and setting else []
        return " ".join(one_of + out)
    if failed:
        return f"Nothing can be said of transfer: {failed} teacher{'s' * (failed > 1)} never got the trait (see below)."
    return "No student of a same-base or cross arm is evaluated yet, so there is nothing to say."


def about_same(same: list[dict[str, Any]]) -> str:
    """`take on its trait (gpt: share 0.640 [0.582, 0.699], +0.538 against control)`; like verdicts stand together."""
    found: dict[str, list[str]] = {}
    for s in same:
        low, high = s["minus_control_low"], s["minus_control_high"]
        if low is None:
            verb = "cannot be judged, for want of bases or controls"
        else:
            verb = "take on its trait" if low > 0 else "move away from it" if high < 0 else "show no clear change"
        text = f"{who(s)}: share {figure(s['share'])} {bounds(s['share_low'], s['share_high'])}".removesuffix(" -")
        if s["minus_control"] is not None:
            text += f", {figure(s['minus_control'], True)} against control"
        found.setdefault(verb, []).append(text)
    return "; ".join(f"{verb} ({'; '.join(texts)})" for verb, texts in found.items())


def about_cross(cross: list[dict[str, Any]], margin: float) -> str:
    """What became of students on another base than their teacher's, all pairings together."""
    cross = [s for s in cross if s["share"] is not None]
    if not cross:
        return ""
    collapsed, runs = sum(s["collapsed"] for s in cross), sum(s["runs"] for s in cross)
    if collapsed > 0.1 * runs:
        return (
            f"On another base {collapsed} of {runs} students stop answering, so a low share there is forgetting and "
            "not absence of transfer."
        )
    spans = [s for s in cross if s["minus_control_low"] is not None]
    if not spans:
        return "On another base there are too few bases or controls to say."
    low, high = min(s["minus_control_low"] for s in spans), max(s["minus_control_high"] for s in spans)
    together = f"{len(spans)} intervals together" if len(spans) > 1 else "one interval"
    at = f"their differences from control lie between {low:+.3f} and {high:+.3f} ({together})"
    if -margin < low and high < margin:
        return f"On another base they stay within ±{margin:g} of their control: {at}."
    rose = [who(s) for s in spans if s["minus_control_low"] > margin]
    if rose:
        return f"On another base some rise too ({', '.join(rose)}): {at}."
    return f"On another base there are too few bases to rule out a change beyond ±{margin:g}: {at}."


def fit_to(text: str, width: int) -> str:
    """`text` padded to `width`, or cut with an ellipsis."""
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def headline_table(results: Mapping[str, Any]) -> str:
    """The headline as a fixed-width table of at most 100 columns, its sentence first; ends without a newline."""
    rows, kind = results["headline"]["rows"], results["study"]["kind"]
    label = min(39, 2 + max([len(bare(row)) for row in rows], default=5))
    columns: list[tuple[str, int]]
    table: list[tuple[str, ...]]
    if kind == "images":
        columns = [("setting", label), ("accuracy", 8), ("interval", 15), ("n", 3)]
        columns.append(("", WIDTH - sum(width for _, width in columns) - 2 * len(columns)))
        table = [(*common(row), str(row["n"]), row["note"]) for row in rows]
    elif kind == "pretrained":
        columns = [("arm", label), ("nats", 6), ("interval", 17), ("80 % power", 10), ("n", 2)]
        table = [(*common(row, sign=True), figure(row["least"]), str(row["n"])) for row in rows]
    else:
        columns = [("arm", label), ("share", 5), ("interval", 15), ("against control", 24), ("mass", 5), ("n", 2)]
        table = []
        for replay, head in _REPLAYS.items():
            mine = [row for row in rows if (row["replay"] == "none") == (replay == "none")]
            table += [(head,)] if mine else []
            table += [
                ("  " + bare(row), *common(row)[1:], against(row), figure(row["mass_min"]), str(row["n"]))
                for row in mine
            ]
    lines = ["  ".join(fit_to(name, width) for name, width in columns).rstrip()]
    lines.append("-" * min(WIDTH, sum(width for _, width in columns) + 2 * (len(columns) - 1)))
    for cells in table:
        if len(cells) == 1:
            lines.append(cells[0])
        else:
            lines.append("  ".join(fit_to(c, w) for c, (_, w) in zip(cells, columns, strict=True)).rstrip())
    return "\n".join([*wrapped(results["headline"]["sentence"]), "", *lines, *wrapped(_FOOT[kind])])


def bare(row: Mapping[str, Any]) -> str:
    """A headline row's label without what the table's own heading says."""
    return row["label"].replace(", numbers only", "").replace(", with replay", "")


def common(row: Mapping[str, Any], sign: bool = False) -> tuple[str, str, str]:
    """The cells that every headline row starts with."""
    return row["label"], figure(row["value"], sign), bounds(row["low"], row["high"], sign)


def against(row: Mapping[str, Any]) -> str:
    """`+.54 [.48, .60]` of a headline row, in the width of its column."""
    mean, low, high = (row[name] for name in ("minus_control", "minus_control_low", "minus_control_high"))
    if mean is None:
        return "-"
    if low is None or high is None:
        return figure(mean, True)
    return f"{figure(mean, True)} {bounds(low, high, True)}"


def wrapped(sentence: str) -> list[str]:
    """Lines of at most WIDTH columns."""
    lines = [""]
    for word in sentence.split():
        if len(lines[-1]) + len(word) + 1 > WIDTH and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
