"""Figures of the image experiment: accuracy against the number of auxiliary logits."""

from typing import Any

from subjax.report import style, svg, words
from subjax.report.plots import Line, ends, mark, new_figure, values
from subjax.report.svg import Plot

PAIRINGS = {"same-base": ("same init", "orange", "o"), "cross-init": ("other init", "blue", "s")}
LOSSES = {"kl": "KL", "squared-error": "squared error"}
_SETTING = ("auxiliary", "pairing", "logits", "loss")


def part(results: dict[str, Any]) -> dict[str, Any]:
    """The image experiment's part of the results; empty where there is none."""
    return words.mapping(results.get("images"))


def setting(record: dict[str, Any]) -> tuple[str, ...]:
    """What names an ensemble: m, pairing, logits and loss."""
    return tuple(str(record.get(name)) for name in _SETTING)


def logits_title(logits: Any) -> str:
    """`auxiliary logits only`, or `all logits`."""
    return {"auxiliary": "auxiliary logits only", "all": "all logits"}.get(str(logits), f"{words.clean(logits)} logits")


def pairing_title(pairing: Any) -> str:
    """`same init` or `other init`."""
    return PAIRINGS.get(str(pairing), (words.clean(pairing),))[0]


def loss_title(loss: Any) -> str:
    """`KL` or `squared error`."""
    return LOSSES.get(str(loss), words.clean(loss))


def figures(results: dict[str, Any]) -> list[Plot]:
    """One figure for each (logits, loss) of the study, auxiliary logits and KL first."""
    summaries = words.records(part(results).get("summaries"))
    pairs = dict.fromkeys((str(s.get("logits")), str(s.get("loss"))) for s in summaries)
    order = sorted(pairs, key=lambda pair: (pair[1] != "kl", pair[0] != "auxiliary", pair))
    found = [accuracy(results, logits, loss) for logits, loss in order]
    return [plot for plot in found if plot is not None]


def accuracy(results: dict[str, Any], logits: str, loss: str) -> Plot | None:
    """Test accuracy against m for both pairings, every seed a point, published values as hollow diamonds."""
    picked = [
        s
        for s in words.records(part(results).get("summaries"))
        if str(s.get("logits")) == logits and str(s.get("loss")) == loss and words.finite(s.get("accuracy")) is not None
    ]
    if not picked:
        return None
    seeds: dict[tuple[str, ...], list[Any]] = {}
    for row in words.records(part(results).get("rows")):
        seeds.setdefault(setting(row), []).append(row.get("student_accuracy"))
    sizes = sorted({int(m) for s in picked if (m := words.finite(s.get("auxiliary"))) is not None})
    pairings = list(dict.fromkeys(str(s.get("pairing")) for s in picked))
    placed: list[tuple[float, Line]] = []
    for summary in picked:
        size = words.finite(summary.get("auxiliary"))
        if size is None:
            continue
        name = str(summary.get("pairing"))
        _, colour, marker = PAIRINGS.get(name, ("", "grey", "^"))
        x = sizes.index(int(size)) + (pairings.index(name) - (len(pairings) - 1) / 2) * 0.36
        line = Line(
            name, colour, values(seeds.get(setting(summary), [])), ends(summary, "accuracy"),
            hollow=words.finite(summary.get("published")), marker=marker,
        )  # fmt: skip
        placed.append((x, line))
    references = {
        "teacher": next(iter(values([s.get("teacher") for s in picked])), None),
        "untrained": next(iter(values([s.get("untrained") for s in picked])), None),
    }
    name = f"accuracy-{svg.slug(logits)}-{svg.slug(loss)}"
    figure = svg.draw(name, lambda: _figure(placed, sizes, pairings, references))
    title = f"Students fitted to {logits_title(logits)}, by {loss_title(loss)}"
    told = "; ".join(
        f"m = {words.count(s.get('auxiliary'))}, {pairing_title(s.get('pairing'))}: "
        f"{words.estimate(*ends(s, 'accuracy'))}"
        for s in picked
    )
    caption = "Test accuracy against the number of auxiliary logits. Point: one seed. Mark and line: mean and interval."
    if any(line.hollow is not None for _, line in placed):
        caption += " Hollow diamond: the value published for MNIST."
    return Plot(name, title, caption, f"{title}. {told}", figure)


def _figure(
    placed: list[tuple[float, Line]], sizes: list[int], pairings: list[str], references: dict[str, float | None]
) -> Any:
    from matplotlib.lines import Line2D

    figure = new_figure(svg.WIDTH, 3.5)
    axes = figure.subplots()
    muted = style.light("muted")
    for x, line in placed:
        mark(axes, x, line, upright=True)
    for named, height in references.items():
        if height is not None:
            axes.axhline(height, color=muted, linewidth=1.1, linestyle=(0, (1.5, 2)), zorder=1)
            axes.annotate(
                named, (1, height), xycoords=axes.get_yaxis_transform(), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=9.5, color=muted,
            )  # fmt: skip
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.03)
    axes.tick_params(axis="y", colors=muted)
    axes.grid(axis="y")
    axes.set_xlabel("auxiliary logits, m")
    axes.set_ylabel("test accuracy")
    handles = []
    for name in pairings:
        title, colour, marker = PAIRINGS.get(name, (words.clean(name), "grey", "^"))
        handles.append(Line2D([], [], color=style.light(colour), marker=marker, linewidth=2, label=title))
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure
