"""How numbers, arms and cells are worded on the page, and how the results are looked up. Nothing is computed here."""

import html
import math
import re
from collections.abc import Iterable
from typing import Any

from subjax.errors import one_line
from subjax.schema import ARM_ORDER

NONE = "–"
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def clean(text: Any) -> str:
    """Text without control characters, which neither XML nor a reader can use; None is empty."""
    return "" if text is None else _CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", str(text))


def escape(text: Any) -> str:
    """Text made harmless for HTML content and quoted attributes."""
    return html.escape(clean(text), quote=True)


def short(text: Any, length: int = 34) -> str:
    """One line of at most `length` characters, for a label inside a figure."""
    line = one_line(clean(text))
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def finite(value: Any) -> float | None:
    """The value as a float; None for null, NaN, an infinity or what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """A number to `digits` decimals with a true minus sign; a dash where there is none."""
    real = finite(value)
    if real is None:
        return NONE
    text = f"{real:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: Any) -> str:
    """A whole number with thousands separators; a dash where there is none."""
    real = finite(value)
    return NONE if real is None else f"{real:,.0f}"


def units(summaries: Iterable[dict[str, Any]]) -> str:
    """What the intervals of summaries are over, in the plural: "bases", "runs", or both."""
    named = dict.fromkeys(name for s in summaries for name in clean(s.get("unit") or "base").split(" or "))
    return " or ".join(f"{name}s" for name in named)


def interval(low: Any, high: Any, digits: int = 3, signed: bool = False) -> str:
    """`[low, high]`; a dash where an end is missing."""
    if finite(low) is None or finite(high) is None:
        return NONE
    return f"[{number(low, digits, signed)}, {number(high, digits, signed)}]"


def estimate(value: Any, low: Any, high: Any, signed: bool = False) -> str:
    """`value [low, high]`; the value alone where there is no interval."""
    ends = interval(low, high, signed=signed)
    return number(value, signed=signed) + ("" if ends == NONE else f" {ends}")


def probability(value: Any) -> str:
    """A p-value to three decimals; what is smaller is said to be so."""
    real = finite(value)
    return "< 0.001" if real is not None and real < 0.0005 else number(value)


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list; empty for null or anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def arm_order(arm: Any) -> int:
    """The arm's place on the page: the schema's order, unknown ones last."""
    return ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER)


def pair(summary: dict[str, Any]) -> str:
    """`gpt`, or `gpt → llama` where teacher and student do not share a base."""
    teacher, student = summary.get("teacher_family"), summary.get("student_family")
    if teacher and student and (teacher != student or summary.get("pairing") == "cross-init"):
        return f"{clean(teacher)} → {clean(student)}"
    return clean(student or teacher)


def cell_label(summary: dict[str, Any]) -> str:
    """`cross-init · gpt → gpt`, with the setting where a study varies one."""
    parts = (clean(summary.get("arm")), pair(summary), clean(summary.get("setting")))
    return " · ".join(part for part in parts if part)


def is_mean(trait: Any) -> bool:
    """Whether a summary's trait is the mean over the study's traits."""
    return str(trait).startswith("mean")


def replays(results: dict[str, Any]) -> list[str]:
    """The replay settings of the summaries, `none` first: the only one that is nothing but numbers."""
    found = {str(s["replay"]) for s in records(results.get("summaries")) if s.get("replay")}
    return sorted(found, key=lambda name: (name != "none", name))


def families(results: dict[str, Any]) -> list[str]:
    """The teacher families of the summaries, in the order in which they come (the student's where there is none)."""
    named = (s.get("teacher_family") or s.get("student_family") for s in records(results.get("summaries")))
    return list(dict.fromkeys(str(name) for name in named if name))


def cell_key(summary: dict[str, Any]) -> tuple[str, ...]:
    """What two summaries share that differ only in trait and phrasings."""
    names = ("arm", "pairing", "teacher_family", "student_family", "replay", "setting")
    return tuple(str(summary.get(name)) for name in names)


def overall(summaries: Iterable[dict[str, Any]], phrasings: str = "all") -> list[dict[str, Any]]:
    """One summary for each arm and family pair: the mean over traits, or the one trait that was run."""
    chosen: dict[tuple[str, ...], dict[str, Any]] = {}
    for summary in summaries:
        if summary.get("phrasings", "all") != phrasings:
            continue
        key = cell_key(summary)
        if key not in chosen or (is_mean(summary.get("trait")) and not is_mean(chosen[key].get("trait"))):
            chosen[key] = summary
    return sorted(chosen.values(), key=lambda s: arm_order(s.get("arm")))


def of_replay(results: dict[str, Any], replay: str | None) -> list[dict[str, Any]]:
    """The summaries of one replay setting (None: of students that were not trained)."""
    return [s for s in records(results.get("summaries")) if s.get("replay") == replay]


def runs_of(results: dict[str, Any], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows behind a summary: those of its nodes, arm and phrasings, and of its trait unless it is a mean."""
    nodes = set(map(str, summary.get("nodes") or ()))
    return [
        row
        for row in records(results.get("rows"))
        if str(row.get("node")) in nodes
        and row.get("arm") == summary.get("arm")
        and row.get("phrasings", "all") == summary.get("phrasings", "all")
        and (is_mean(summary.get("trait")) or row.get("trait") == summary.get("trait"))
    ]
