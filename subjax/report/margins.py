"""Pretrained models by log-odds margin: every way of asking as a plot and as rows of one table."""

from typing import Any

from subjax.report import lineage, style, svg, words
from subjax.report.plots import Line, dot_plot, ends, everything, values
from subjax.report.svg import Plot
from subjax.report.tables import Cell, counted, numeric, ranged, table

_WAYS = {
    "forced": "the answer's beginning given",
    "plain": "a free one-word answer",
    "numbers": "behind a row of numbers, the answer's beginning given",
    "numbers-plain": "behind a row of numbers, a free one-word answer",
    "choice": "a multiple choice",
}
INTRO = (
    "<p>The log-odds margin is the log of the trait's probability over that of all other candidates of its category, "
    "in nats, a mean over questions. It moves where a share near its ends does not. A difference is taken from the "
    "student of a control teacher that was made from the same seeds. Intervals are for one comparison each; the "
    "corrected ones hold for all arms and settings of one way of asking and trait at once.</p>"
)


def part(results: dict[str, Any]) -> dict[str, Any]:
    """The results' margins; empty where the study has none."""
    return words.mapping(results.get("readings"))


def title(way: Any) -> str:
    """A way of asking in words: `numbers:bare` is `numbers: behind a row of numbers, …, no system prompt`."""
    name, _, bare = words.clean(way).partition(":")
    told = _WAYS.get(name, name)
    return f"{name}: {told}{', no system prompt' if bare else ''}"


def figures(results: dict[str, Any]) -> list[Plot]:
    """For each way of asking the differences from control, run by run."""
    found = words.records(part(results).get("summaries"))
    drawn = (_figure(results, way) for way in dict.fromkeys(s.get("way") for s in found))
    return [plot for plot in drawn if plot is not None]


def _figure(results: dict[str, Any], way: Any) -> Plot | None:
    rows = words.records(part(results).get("rows"))
    lines = []
    for s in words.records(part(results).get("summaries")):
        if s.get("way") != way or words.finite(s.get("minus_control")) is None:
            continue
        nodes = set(s.get("nodes") or ())
        mine = [r for r in rows if r.get("way") == way and r.get("node") in nodes and r.get("trait") == s.get("trait")]
        colour = style.arm_colour(str(s.get("arm")))
        bar = ends(s, "minus_control", "minus_control")
        lines.append(Line(_label(s), colour, values([r.get("minus_control") for r in mine]), bar))
    if not everything(lines):
        return None
    name = f"margin-{svg.slug(str(way))}"
    figure = svg.draw(name, lambda: dot_plot(lines, "margin minus control's, nats", 0.0, "no difference"))
    told = "; ".join(f"{line.label}: {words.estimate(*line.bar, signed=True)}" for line in lines)
    caption = "Point: a student. Dot and line: mean over independent trials (runs, or bases), interval."
    return Plot(name, title(way), caption, f"{title(way)}. {told}", figure)


def _label(summary: dict[str, Any]) -> str:
    parts = (words.cell_label(summary), summary.get("trait"))
    return ", ".join(words.clean(part) for part in parts if part)


def summaries(results: dict[str, Any], anchors: dict[tuple[str, ...], str]) -> str:
    """The table of all margins; empty where there are none."""
    found = words.records(part(results).get("summaries"))
    body = [
        (
            Cell(_label(s), "k"), Cell(s.get("way"), "k"), counted(s.get("n")), numeric(s.get("margin")),
            numeric(s.get("margin_teacher")),
            ranged(s.get("lift"), s.get("lift_low"), s.get("lift_high"), signed=True),
            ranged(s.get("minus_control"), s.get("minus_control_low"), s.get("minus_control_high"), signed=True),
            Cell(words.interval(s.get("corrected_low"), s.get("corrected_high"), signed=True), "n"),
            Cell(words.probability(s.get("p_value")), "n"), numeric(s.get("smallest_detectable")),
            numeric(s.get("share")), numeric(s.get("share_sampled")),
            Cell("", html=lineage.link(s, anchors)),
        )
        for s in found
    ]  # fmt: skip
    heads = (
        "arm", "asked", "n", "margin", "its teacher's", "lift", "minus control", "corrected", "p",
        "seen with 80 % power", "share", "share sampled", "lineage",
    )  # fmt: skip
    notes = [s.get("words") for s in found]
    return table("Log-odds margins, nats", heads, body, notes) if body else ""
