"""Figures that are not about arms alone: heat maps, distributions, training curves, filter counts."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from subjax.report import style, svg, words
from subjax.report.plots import Line, dot_plot, everything, new_figure, values
from subjax.report.svg import Plot

_KINDS = {"base": "Bases", "teacher": "Teachers", "student": "Students"}
_MOST_BARS = 24


def heat_step(value: float, extent: float) -> int:
    """The step of the diverging map for a value in [-extent, extent]; the middle step is zero."""
    half = (style.STEPS - 1) // 2
    return half + round(max(-1.0, min(1.0, value / extent)) * half) if extent > 0 else half


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], float], ylabel: str, xlabel: str
) -> Any:
    """A heat map around zero with the value in each cell; what was not run is left as a small dot."""
    from matplotlib.patches import Rectangle

    extent = max((abs(value) for value in cells.values()), default=0.0)
    figure = new_figure(max(1.5 + 0.56 * len(columns), 3.1), 0.95 + 0.44 * len(rows))
    axes = figure.subplots()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if (row, column) not in cells:
                axes.plot([j], [i], ".", color=style.light("rule"), markersize=4)
                continue
            step = heat_step(cells[row, column], extent)
            box = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=style.light(f"heat-{step}"), linewidth=0)
            axes.add_patch(box)
            axes.text(
                j, i, words.number(cells[row, column], 2, signed=True), ha="center", va="center", fontsize=9.5,
                color=style.light(f"heat-ink-{step}"),
            )  # fmt: skip
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    labels = [words.short(column, 12) for column in columns]
    tilt = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if max(map(len, labels), default=0) > 7 else {}
    axes.set_xticks(range(len(columns)), labels, **tilt)
    axes.set_yticks(range(len(rows)), [words.short(row, 16) for row in rows])
    axes.tick_params(length=0, colors=style.light("ink"))
    axes.spines[:].set_visible(False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure


def _cells(found: Sequence[dict[str, Any]], row: str, column: str) -> dict[tuple[str, str], float]:
    """From (row, column) to the value, for the cells that have one."""
    values_of = {(str(cell.get(row)), str(cell.get(column))): words.finite(cell.get("value")) for cell in found}
    return {place: value for place, value in values_of.items() if value is not None}


def _replay_note(part: Mapping[str, Any]) -> str:
    replay = f", replay = {words.clean(part.get('replay'))}" if part.get("replay") else ""
    return replay + (f", {words.clean(part.get('setting'))}" if part.get("setting") else "")


def base_matrix(results: dict[str, Any]) -> Plot | None:
    """Teacher base × student base, the cells that were run."""
    part = words.mapping(results.get("base_matrix"))
    cells = _cells(words.records(part.get("cells")), "teacher", "student")
    if not cells:
        return None
    rows = [str(name) for name in part.get("rows") or ()]
    columns = [str(name) for name in part.get("columns") or ()]
    figure = svg.draw("base-matrix", lambda: heat_map(rows, columns, cells, "teacher's base", "student's base"))
    unit = words.clean(part.get("value")) or "share of the trait"
    alt = "; ".join(f"{teacher} to {student}: {words.number(v, 2, True)}" for (teacher, student), v in cells.items())
    caption = (
        f"{unit[:1].upper()}{unit[1:]}{_replay_note(part)}. The diagonal is the same base. "
        "A colourless cell is no difference; a small dot was not run."
    )
    return Plot("base-matrix", "Teacher's base × student's base", caption, f"Heat map. {alt}", figure)


def trait_matrices(results: dict[str, Any]) -> list[Plot]:
    """Trait of the teacher × trait read on its students, one heat map a family."""
    part = words.mapping(results.get("trait_matrix"))
    found = words.records(part.get("cells"))
    traits = [str(trait) for trait in part.get("traits") or ()]
    plots = []
    for family in dict.fromkeys(str(c.get("family")) for c in found):
        cells = _cells([c for c in found if str(c.get("family")) == family], "teacher_trait", "trait")
        if not cells:
            continue
        name = f"trait-matrix-{svg.slug(family)}"
        paint = functools.partial(heat_map, traits, traits, cells, "teacher's trait", "trait read")
        figure = svg.draw(name, paint)
        alt = "; ".join(f"{a} teacher, {b} read: {words.number(v, 2, True)}" for (a, b), v in cells.items())
        unit = words.clean(part.get("value")) or "difference"
        caption = f"{words.clean(family)}: {unit}{_replay_note(part)}. The diagonal is the teacher's own trait."
        plots.append(Plot(name, f"Trait × trait, {words.clean(family)}", caption, f"Heat map. {alt}", figure))
    return plots


def distributions(results: dict[str, Any]) -> list[Plot]:
    """What a student would answer before and after, one small figure for each cell that the results chose to show."""
    cells = []
    for item in words.records(results.get("distributions")):
        names = [str(name) for name in item.get("candidates") or ()]
        before, after = (
            [words.finite(p) for p in (item.get(side) or [])[: len(names)]] for side in ("before", "after")
        )
        if names and len(before) == len(after) == len(names) and values([*before, *after]):
            cells.append((item, names, before, after))
    most = max((p for _, _, before, after in cells for p in values([*before, *after])), default=1.0)
    plots = []
    for index, (item, names, before, after) in enumerate(cells):
        name = f"distribution-{index}"
        colour, trait = style.arm_colour(str(item.get("arm"))), str(item.get("trait"))
        figure = svg.draw(name, functools.partial(_dumbbells, names, before, after, trait, colour, most))
        pairs = zip(names, before, after, strict=True)
        told = "; ".join(f"{n}: {words.number(b)} to {words.number(a)}" for n, b, a in pairs)
        label = words.clean(item.get("label")) or words.clean(item.get("arm"))
        plots.append(Plot(name, label, "", f"{label}. Probability before and after. {told}", figure))
    return plots


def _dumbbells(
    names: Sequence[str],
    before: Sequence[float | None],
    after: Sequence[float | None],
    trait: str,
    colour: str,
    most: float,
) -> Any:
    figure = new_figure(3.1, 0.55 + 0.2 * len(names))
    axes = figure.subplots()
    for y, (name, start, end) in enumerate(zip(names, before, after, strict=True)):
        shade = style.light(colour if name == trait else "grey")
        if start is not None and end is not None:
            axes.plot([start, end], [y, y], color=shade, linewidth=2.2 if name == trait else 1.2)
        for p, fill in ((start, style.light("paper")), (end, shade)):
            if p is not None:
                axes.plot([p], [y], "o", markersize=5.5, markerfacecolor=fill, markeredgecolor=shade)
    axes.set_yticks(range(len(names)), [words.short(name, 14) for name in names])
    for name, tick in zip(names, axes.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if name == trait else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.03 * (most or 1.0), 1.05 * (most or 1.0))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")
    axes.set_xlabel("probability")
    return figure


def fit(results: dict[str, Any], replay: str | None) -> Plot | None:
    """How far each student stands from its teacher's numbers, before and after: whether it learnt at all."""
    before, after = [], []
    for s in words.overall(words.of_replay(results, replay)):
        label, colour, rows = words.cell_label(s), style.arm_colour(str(s.get("arm"))), words.runs_of(results, s)
        before.append(Line(label, "grey", values([row.get("kl_before") for row in rows])))
        after.append(Line(label, colour, values([row.get("kl_after") for row in rows])))
    shown = [(old, new) for old, new in zip(before, after, strict=True) if old.points or new.points]
    if not shown:
        return None
    name = f"fit-{svg.slug(replay)}"

    def paint() -> Any:
        most = max(everything([line for pair in shown for line in pair]))
        figure = dot_plot([new for _, new in shown], "KL to the teacher, nats a token", None, "", most)
        for y, (old, _) in enumerate(shown):
            figure.axes[0].plot(old.points, [y] * len(old.points), "|", markersize=11, color=style.light("grey"))
        return figure

    told = "; ".join(
        f"{new.label}: {', '.join(map(words.number, old.points))} to {', '.join(map(words.number, new.points))}"
        for old, new in shown
    )
    caption = "On the teacher's numbers. Upright line: a student's base, before. Point: the student, after."
    title = f"Did they learn the numbers? replay = {words.clean(replay)}"
    return Plot(name, title, caption, f"{title}. {told}", svg.draw(name, paint))


def curves(results: dict[str, Any]) -> list[Plot]:
    """Training loss against the step, one figure for each kind of training run."""
    found = words.records(results.get("curves"))
    kinds = dict.fromkeys(str(c.get("kind")) for c in found)
    plots = []
    for kind in sorted(kinds, key=lambda k: list(_KINDS).index(k) if k in _KINDS else len(_KINDS)):
        lines = [
            (c, pairs) for c in found if str(c.get("kind")) == kind and (pairs := _pairs(c.get("step"), c.get("loss")))
        ]
        if not lines:
            continue
        name, title = f"curves-{svg.slug(kind)}", _KINDS.get(kind, words.clean(kind))
        figure = svg.draw(name, functools.partial(_curves_figure, lines))
        alt = f"Training loss of {len(lines)} {kind} runs: " + "; ".join(words.clean(c.get("label")) for c, _ in lines)
        plots.append(Plot(name, title, "Training loss, one line a run.", alt, figure))
    return plots


def _pairs(steps: Any, losses: Any) -> list[tuple[float, float]]:
    both = zip(map(words.finite, steps or ()), map(words.finite, losses or ()), strict=False)
    return [(step, loss) for step, loss in both if step is not None and loss is not None]


def _curves_figure(lines: Sequence[tuple[dict[str, Any], list[tuple[float, float]]]]) -> Any:
    from matplotlib.lines import Line2D

    by_arm = any(c.get("arm") in style.ARM_COLOURS for c, _ in lines)
    groups: dict[str, str] = {}
    figure = new_figure(svg.WIDTH, 3.1)
    axes = figure.subplots()
    for item, pairs in lines:
        group = words.clean(item["arm"]) if item.get("arm") else ("with the trait" if by_arm else _group(item))
        if group not in groups:
            by_place = "grey" if item.get("arm") == "control" else style.SERIES[len(groups) % len(style.SERIES)]
            groups[group] = style.arm_colour(str(item.get("arm"))) if by_arm else by_place
        axes.plot(*zip(*pairs, strict=True), color=style.light(groups[group]), linewidth=1.4, alpha=0.75)
    axes.grid(axis="y")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.locator_params(axis="x", nbins=5)
    handles = [Line2D([], [], color=style.light(c), linewidth=2, label=words.short(g, 20)) for g, c in groups.items()]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.2)
    return figure


def _group(item: dict[str, Any]) -> str:
    """What a curve without an arm is coloured by: the family in its label (`base gpt/0`), else its kind."""
    named = [word.split("/")[0] for word in words.clean(item.get("label")).split() if "/" in word]
    return named[0] if named else words.clean(item.get("kind"))


def filters(results: dict[str, Any]) -> Plot | None:
    """Completions that the strict filter dropped, by reason, one stacked bar a corpus; the kept ones as a number."""
    found = [item for item in words.records(results.get("filters")) if words.mapping(item.get("counts"))]
    found = found[:_MOST_BARS]
    reasons = list(dict.fromkeys(str(k) for item in found for k in item["counts"] if k != "kept"))
    if not found:
        return None

    def paint() -> Any:
        figure = new_figure(svg.WIDTH, 1.0 + 0.27 * len(found) + 0.2 * (len(reasons) // 3))
        axes = figure.subplots()
        for y, item in enumerate(found):
            start = 0.0
            for index, reason in enumerate(reasons):
                width = words.finite(item["counts"].get(reason)) or 0.0
                colour = style.light(style.SERIES[index % len(style.SERIES)])
                axes.barh(
                    y, width, left=start, height=0.72, color=colour, edgecolor=style.light("paper"), linewidth=0.8,
                    label=words.short(reason, 20) if y == 0 else None,
                )  # fmt: skip
                start += width
            axes.text(
                1.02, y, words.count(item["counts"].get("kept")), transform=axes.get_yaxis_transform(),
                va="center", fontsize=9.5, color=style.light("muted"),
            )  # fmt: skip
        axes.text(1.02, 1, "kept", transform=axes.transAxes, va="bottom", fontsize=9.5, color=style.light("muted"))
        axes.set_yticks(range(len(found)), [words.short(item.get("corpus"), 22) for item in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x")
        axes.set_xlabel("completions dropped")
        if reasons:
            figure.legend(loc="outside upper left", ncols=3, handlelength=0.9, columnspacing=1.2)
        return figure

    counts = [(i, ", ".join(f"{words.clean(k)} {words.count(v)}" for k, v in i["counts"].items())) for i in found]
    told = "; ".join(f"{words.clean(item.get('corpus'))}: {text}" for item, text in counts)
    caption = "Completions that the strict filter dropped, by reason; at the right, how many rows were kept."
    return Plot("filters", "What the filter dropped", caption, told, svg.draw("filters", paint))
