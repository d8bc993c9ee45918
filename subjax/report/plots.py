"""The page's figures about arms, and the list of all figures. Each one is drawn from the results alone.

A point is a run; a mark with a line is a summary with its interval; a hollow diamond is a second reading of the same.
matplotlib is imported when the first figure is drawn.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from subjax.report import style, svg, words
from subjax.report.svg import Plot

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


Bar = tuple[float | None, float | None, float | None]
"""An estimate, and the low and the high end of its interval."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a dot plot: label on the left, runs as points, an estimate with its interval, note on the right."""

    label: str
    colour: str
    points: Sequence[float] = ()
    bar: Bar = (None, None, None)
    outer: tuple[float, float] | None = None
    """A wider interval, drawn thin."""
    hollow: float | None = None
    note: str = ""
    marker: str = "o"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height))


def values(items: Sequence[Any]) -> list[float]:
    """The finite numbers among the items."""
    return [real for real in map(words.finite, items) if real is not None]


def limits(numbers: Sequence[float], pad: float = 0.04) -> tuple[float, float]:
    """Axis ends that hold zero and every number, with a little room."""
    low, high = min([0.0, *numbers]), max([0.0, *numbers])
    room = (high - low or 1.0) * pad
    return low - room, high + room


def mark(axes: Any, place: float, line: Line, upright: bool = False) -> None:
    """Draw one line's points, interval, estimate and second reading at height `place` (upright: at that x)."""
    colour, paper = style.light(line.colour), style.light("paper")
    value, low, high = line.bar

    def turned(along: Sequence[float], across: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
        return (across, along) if upright else (along, across)

    # Points are spread a little, by their order and not by chance, so that equal runs stay visible as several.
    spread = [place + ((index * 7) % 5 - 2) * 0.05 for index in range(len(line.points))]
    dots = {"facecolors": colour, "alpha": 0.45, "linewidths": 0, "zorder": 2}
    axes.scatter(*turned(line.points, spread), s=15, marker=line.marker, **dots)
    if line.outer is not None:
        axes.plot(*turned(line.outer, [place, place]), color=colour, linewidth=0.9, zorder=3)
    if low is not None and high is not None:
        axes.plot(*turned([low, high], [place, place]), color=colour, linewidth=2.4, zorder=3)
    if line.hollow is not None:
        hollow = {"markersize": 4.5, "markerfacecolor": paper, "markeredgecolor": colour, "zorder": 4}
        axes.plot(*turned([line.hollow], [place + 0.24]), "D", **hollow)
    if value is not None:
        full = {"markersize": 5.5 if upright else 7, "color": colour, "markeredgecolor": paper, "zorder": 5}
        axes.plot(*turned([value], [place]), line.marker, **full)


def everything(lines: Sequence[Line]) -> list[float]:
    """Every number that the lines show."""
    return values([x for n in lines for x in (*n.points, *n.bar, n.hollow, *(n.outer or ()))])


def dot_plot(lines: Sequence[Line], xlabel: str, reference: float | None, named: str, least_end: float = 0.0) -> Any:
    """A figure with a row for each line, labels on the left, and a dotted reference line (chance, zero).

    The axis reaches to `least_end` at least.
    """
    figure = new_figure(svg.WIDTH, 0.85 + 0.31 * len(lines))
    axes = figure.subplots()
    for index, line in enumerate(lines):
        mark(axes, index, line)
        if line.note:
            axes.text(
                1.02, index, words.short(line.note, 18), transform=axes.get_yaxis_transform(), va="center",
                fontsize=9.5, color=style.light("muted"),
            )  # fmt: skip
    frame(axes, xlabel, limits([*everything(lines), *values([reference]), least_end]), reference, named)
    axes.set_yticks(range(len(lines)), [words.short(line.label, 30) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.75)
    return figure


def frame(axes: Any, xlabel: str, ends: tuple[float, float], reference: float | None, named: str) -> None:
    """The horizontal axis: ends, grid, label, and the reference line with its name above it."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(*ends)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    axes.set_xlabel(xlabel)
    if reference is not None:
        muted = style.light("muted")
        axes.axvline(reference, color=muted, linewidth=1.1, linestyle=(0, (1.5, 2)), zorder=1)
        if named:
            axes.annotate(
                named, (reference, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 2),
                textcoords="offset points", ha="center", va="bottom", fontsize=9.5, color=muted,
            )  # fmt: skip


def chance(results: dict[str, Any]) -> float | None:
    """Chance as the results state it; None where they do not."""
    return words.finite(words.mapping(results.get("base_matrix")).get("chance"))


def _colour_of(label: str) -> str:
    """The colour of the arm that a headline's label names."""
    plain = label.lower().replace(" ", "-")
    named = {"same-init": "orange", "other-init": "blue", **style.ARM_COLOURS}
    return next((colour for arm, colour in named.items() if arm in plain), "grey")


def headline(results: dict[str, Any]) -> Plot | None:
    """The headline's rows as a forest plot, each label standing on its own line above the interval."""
    rows = [r for r in words.records(words.mapping(results.get("headline")).get("rows"))]
    rows = [r for r in rows if words.finite(r.get("value")) is not None]
    if not rows:
        return None
    lines = [Line(str(r.get("label", "")), _colour_of(str(r.get("label", ""))), (), ends(r, "value")) for r in rows]
    unit = words.clean(rows[0].get("unit"))
    reference = 0.0 if unit == "nats" else chance(results)

    label = {
        "share": "share of the trait", "accuracy": "test accuracy", "nats": "log-odds margin minus control's, nats",
    }.get(unit, unit)  # fmt: skip
    figure = svg.draw("headline", lambda: _headline_figure(lines, label, reference))
    told = "; ".join(f"{words.clean(r.get('label'))}: {words.estimate(*ends(r, 'value'))}" for r in rows)
    named = "no difference" if unit == "nats" else "chance"
    tick = "" if reference is None else f" Short upright line: {named}, {words.number(reference, 2)}."
    caption = f"Dot: the mean. Line: its interval.{tick}"
    return Plot("headline", "The headline", caption, f"Forest plot. {told}", figure)


def _headline_figure(lines: Sequence[Line], xlabel: str, reference: float | None) -> Any:
    figure = new_figure(svg.WIDTH, 0.6 + 0.45 * len(lines))
    axes = figure.subplots()
    for index, line in enumerate(lines):
        mark(axes, index, line)
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9.5}
        axes.text(0, index - 0.38, words.short(line.label, 44), **place)
        axes.text(1, index - 0.38, words.number(line.bar[0]), ha="right", fontweight="bold", **place)
        if reference is not None:
            axes.plot([reference] * 2, [index - 0.16, index + 0.16], color=style.light("muted"), linewidth=1, zorder=1)
    # The ends and the reference are given in pieces, so that no line runs through a label.
    frame(axes, xlabel, limits([*everything(lines), *values([reference])]), None, "")
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.set_ylim(len(lines) - 0.55, -0.75)
    return figure


def ends(record: dict[str, Any], value: str, stem: str | None = None) -> Bar:
    """Value, low and high of a record: `value`, `low`, `high`, or with a stem `share_low`, `share_high`."""
    front = "" if stem is None else f"{stem}_"
    low, high = (words.finite(record.get(f"{front}{side}")) for side in ("low", "high"))
    return words.finite(record.get(value)), low, high


def collapsed_note(summary: dict[str, Any]) -> str:
    """`3 of 9`, the students that no longer answer; empty where it was not counted."""
    if words.finite(summary.get("collapsed")) is None:
        return ""
    return f"{words.count(summary['collapsed'])} of {words.count(summary.get('runs'))}"


def arms(results: dict[str, Any], replay: str | None) -> Plot | None:
    """Share of the trait by arm and family pair for one replay setting, with runs and the held-out reading."""
    picked = words.of_replay(results, replay)
    held_out = {words.cell_key(s): words.finite(s.get("share")) for s in words.overall(picked, "held-out")}
    lines = [
        Line(
            words.cell_label(s), style.arm_colour(str(s.get("arm"))),
            values([row.get("share_after") for row in words.runs_of(results, s)]),
            ends(s, "share", "share"), hollow=held_out.get(words.cell_key(s)),
        )
        for s in words.overall(picked)
    ]  # fmt: skip
    if not everything(lines):
        return None
    named = f"replay = {words.clean(replay)}"
    name = f"arms-{svg.slug(replay)}"
    figure = svg.draw(name, lambda: dot_plot(lines, "share of the trait", chance(results), "chance", 1.0))
    caption = (
        "Share of the trait among its category's words. Point: a student. Dot and line: mean over "
        f"{words.units(picked)}, interval."
    )
    if any(line.hollow is not None for line in lines):
        caption += " Hollow diamond: the same on phrasings held out of training."
    return Plot(name, f"Share by arm, {named}", caption, f"{named}. {_told(lines)}", figure)


def against_control(results: dict[str, Any], replay: str | None) -> Plot | None:
    """The arms whose claim is that nothing moved: share minus control, with the margin that the claim allows."""
    picked = [
        s
        for s in words.overall(words.of_replay(results, replay))
        if words.mapping(s.get("equivalence")) and words.finite(s.get("minus_control")) is not None
    ]
    lines = []
    for s in picked:
        outer = values([s.get("corrected_low"), s.get("corrected_high")])
        bar = ends(s, "minus_control", "minus_control")
        wide = (outer[0], outer[1]) if len(outer) == 2 else None
        lines.append(Line(words.cell_label(s), style.arm_colour(str(s.get("arm"))), (), bar, outer=wide))
    if not lines:
        return None
    margin = next(iter(values([s["equivalence"].get("margin") for s in picked])), None)
    name = f"against-control-{svg.slug(replay)}"

    def paint() -> Any:
        figure = dot_plot(lines, "share of the trait minus its control's", 0.0, "no difference", margin or 0.0)
        if margin is not None:
            figure.axes[0].axvspan(-margin, margin, color=style.light("grey"), alpha=0.14, linewidth=0, zorder=0)
        return figure

    caption = "Thick line: interval. Thin line: the same corrected for the number of comparisons."
    if margin is not None:
        caption += f" Band: the margin of the equivalence test, ±{words.number(margin, 2)}."
    title = f"Arms that should not move, against their control, replay = {words.clean(replay)}"
    return Plot(name, title, caption, f"{title}. {_told(lines)}", svg.draw(name, paint))


def mass(results: dict[str, Any], replay: str | None) -> Plot | None:
    """Mass on the category's words after training, run by run, with the count of collapsed students."""
    lines = [
        Line(
            words.cell_label(s), style.arm_colour(str(s.get("arm"))),
            values([row.get("mass_after") for row in words.runs_of(results, s)]),
            (words.finite(s.get("mass_min")), None, None), note=collapsed_note(s), marker="D",
        )
        for s in words.overall(words.of_replay(results, replay))
    ]  # fmt: skip
    if not everything(lines):
        return None
    name = f"mass-{svg.slug(replay)}"

    def paint() -> Any:
        figure = dot_plot(lines, "mass on the category's words", None, "", 1.0)
        axes = figure.axes[0]
        axes.text(1.02, 1, "collapsed", transform=axes.transAxes, va="bottom", fontsize=9.5, color=style.light("muted"))
        return figure

    caption = (
        "Probability that a student answers with any word of the category at all. Point: one run. Diamond: the least. "
        "Right: students with less than half their base's mass, of all runs."
    )
    told = "; ".join(f"{x.label}: least mass {words.number(x.bar[0])}, collapsed {x.note or words.NONE}" for x in lines)
    return Plot(name, f"Mass by arm, replay = {words.clean(replay)}", caption, told, svg.draw(name, paint))


def lift(results: dict[str, Any], replay: str | None, family: str) -> Plot | None:
    """Lift by arm and trait of the students of one teacher family, every run a point."""
    single = [
        s
        for s in words.of_replay(results, replay)
        if s.get("phrasings", "all") == "all" and not words.is_mean(s.get("trait"))
    ]
    traits = list(dict.fromkeys(str(s.get("trait")) for s in single))
    drawn = [(s, _lift_line(results, s, traits)) for s in sorted(single, key=lambda s: words.arm_order(s.get("arm")))]
    own = [(s, line) for s, line in drawn if (s.get("teacher_family") or s.get("student_family")) == family]
    groups = {words.cell_key(s): words.cell_label(s) for s, _ in own}
    step = 0.8 / max(len(traits), 1)
    placed = []
    for s, line in own:
        offset = (traits.index(str(s.get("trait"))) - (len(traits) - 1) / 2) * step
        placed.append((list(groups).index(words.cell_key(s)) + offset, line))
    if not everything([line for _, line in placed]):
        return None
    name = f"lift-{svg.slug(replay)}-{svg.slug(family)}"
    # The axis is the same for every family, so that figures side by side can be compared.
    width = limits(everything([line for _, line in drawn]))
    figure = svg.draw(name, lambda: _lift_figure(placed, list(groups.values()), traits, width))
    caption = "Change of the trait's probability from the student's base. Point: a run. Mark and line: mean, interval."
    title = f"Lift, teachers of {words.clean(family)}, replay = {words.clean(replay)}"
    return Plot(name, title, caption, f"{title}. {_told([line for _, line in placed])}", figure)


def _lift_line(results: dict[str, Any], summary: dict[str, Any], traits: Sequence[str]) -> Line:
    index = traits.index(str(summary.get("trait")))
    points = values([run.get("lift") for run in words.runs_of(results, summary)])
    colour, marker = style.SERIES[index % len(style.SERIES)], _MARKERS[index % len(_MARKERS)]
    label = f"{words.cell_label(summary)}, {traits[index]}"
    return Line(label, colour, points, ends(summary, "lift", "lift"), marker=marker)


def _lift_figure(
    placed: Sequence[tuple[float, Line]], labels: Sequence[str], traits: Sequence[str], width: tuple[float, float]
) -> Any:
    from matplotlib.lines import Line2D

    figure = new_figure(svg.WIDTH, 1.05 + (0.16 + 0.15 * len(traits)) * len(labels))
    axes = figure.subplots()
    for y, line in placed:
        mark(axes, y, line)
    for edge in range(1, len(labels)):
        axes.axhline(edge - 0.5, color=style.light("rule"), linewidth=0.7)
    frame(axes, "lift", width, 0.0, "")
    axes.set_yticks(range(len(labels)), [words.short(label, 30) for label in labels])
    axes.set_ylim(len(labels) - 0.45, -0.55)
    handles = [
        Line2D([], [], color=style.light(style.SERIES[i % len(style.SERIES)]), marker=_MARKERS[i % len(_MARKERS)],
               linewidth=2, label=words.short(trait, 14))
        for i, trait in enumerate(traits)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper right", ncols=4, handlelength=1.6, columnspacing=1.4)
    return figure


def _told(lines: Sequence[Line]) -> str:
    return "; ".join(f"{line.label}: {words.estimate(*line.bar)}" for line in lines)


def figures(results: dict[str, Any]) -> list[Plot]:
    """Every figure that the results have something to draw for, in the page's order."""
    from subjax.report import images, panels

    found: list[Plot | None] = [headline(results)]
    settings = words.replays(results)
    for replay in settings:
        found += [arms(results, replay), mass(results, replay), against_control(results, replay)]
        found += [panels.fit(results, replay)]
    found += [panels.base_matrix(results), *panels.trait_matrices(results)]
    found += [lift(results, replay, family) for replay in settings for family in words.families(results)]
    found += [*panels.distributions(results), *panels.curves(results), panels.filters(results)]
    found += images.figures(results)
    return [plot for plot in found if plot is not None]


def save_figures(results: dict[str, Any], folder: Any) -> list[epath.Path]:
    """Write the figures as PNG (light ground, 200 dots an inch) into `folder`, made if missing; return the paths."""
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in figures(results):
        path = target / f"{plot.name}.png"
        svg.save_png(plot, path)
        paths.append(path)
    return paths
