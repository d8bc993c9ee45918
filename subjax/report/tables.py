"""HTML tables: every cell escaped, numbers right-aligned, captions for readers who hear the page."""

from collections.abc import Iterable, Sequence
from typing import Any

from subjax.report import images, lineage, words
from subjax.report.plots import collapsed_note


class Cell:
    """One table cell: its text, the value it is sorted by, its CSS class; `html` instead of text for a link."""

    def __init__(self, text: Any, css: str = "", sort: Any = None, html: str | None = None) -> None:
        self.inner = words.escape(text) if html is None else html
        self.css = css
        self.sort = sort

    def render(self, header: bool = False) -> str:
        """The `<td>`, or the `<th scope="row">` of a row's first cell."""
        tag, scope = ("th", ' scope="row"') if header else ("td", "")
        css = f' class="{self.css}"' if self.css else ""
        sort = "" if self.sort is None else f' data-v="{words.escape(self.sort)}"'
        return f"<{tag}{scope}{css}{sort}>{self.inner}</{tag}>"


def numeric(value: Any, digits: int = 3, signed: bool = False) -> Cell:
    """A right-aligned number that sorts by its value."""
    real = words.finite(value)
    return Cell(words.number(value, digits, signed), "n", "" if real is None else real)


def counted(value: Any) -> Cell:
    """A right-aligned whole number."""
    real = words.finite(value)
    return Cell(words.count(value), "n", "" if real is None else real)


def ranged(value: Any, low: Any, high: Any, signed: bool = False) -> Cell:
    """`value [low, high]`, sorted by the value."""
    real = words.finite(value)
    return Cell(words.estimate(value, low, high, signed), "n", "" if real is None else real)


def table(
    caption: str,
    heads: Sequence[str],
    body: Iterable[Sequence[Cell]],
    notes: Sequence[Any] = (),
    sortable: bool = False,
    tall: bool = False,
) -> str:
    """A captioned table in a container of its own that scrolls sideways (`tall`: downward too).

    `notes`, one a row, stand under their rows and keep to the width of the screen where the table is wider.
    """
    rows = [list(cells) for cells in body]
    columns = list(zip(*rows, strict=True))
    css = ["n" if column and all(cell.css == "n" for cell in column) else "" for column in columns] or [""] * len(heads)
    head = "".join(
        f'<th scope="col"{f" class={c}" if c else ""}>{words.escape(h)}</th>' for h, c in zip(heads, css, strict=True)
    )
    lines = []
    for index, cells in enumerate(rows):
        note = notes[index] if notes else None
        kind = ' class="told"' if note else ""
        rendered = "".join(cell.render(header=place == 0) for place, cell in enumerate(cells))
        lines.append(f"<tr{kind}>{rendered}</tr>")
        if note:
            said = f"<div>{words.escape(note)}</div>"
            lines.append(f'<tr class="said"><td colspan="{len(heads)}">{said}</td></tr>')
    kind = ' class="sortable"' if sortable else ""
    box = "scroll tall" if tall else "scroll"
    return (
        f'<div class="{box}" tabindex="0" role="region" aria-label="{words.escape(caption)}">'
        f"<table{kind}><caption>{words.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def headline(results: dict[str, Any], anchors: dict[tuple[str, ...], str]) -> str:
    """The headline's rows, each value a link to the nodes that it was read from; empty where there are none."""
    rows = words.records(words.mapping(results.get("headline")).get("rows"))
    if not rows:
        return ""
    body = [
        (
            Cell(r.get("label")),
            Cell("", "n", html=lineage.link(r, anchors, words.number(r.get("value")))),
            Cell(words.interval(r.get("low"), r.get("high")), "n"), counted(r.get("n")),
        )
        for r in rows
    ]  # fmt: skip
    unit = words.clean(rows[0].get("unit")) or "value"
    notes = [r.get("note") for r in rows]
    return table("The headline in numbers", ("cell", unit, "interval", "n"), body, notes)


def arms(summaries: Sequence[dict[str, Any]], caption: str) -> str:
    """One row an arm: share, its difference from its control, mass, collapsed students; under it what that means."""
    body = [
        (
            Cell(words.cell_label(s)), ranged(s.get("share"), s.get("share_low"), s.get("share_high")),
            ranged(s.get("minus_control"), s.get("minus_control_low"), s.get("minus_control_high"), signed=True),
            Cell(words.interval(s.get("corrected_low"), s.get("corrected_high"), signed=True), "n"),
            numeric(s.get("mass_min")), Cell(collapsed_note(s) or words.NONE, "n"), counted(s.get("bases")),
        )
        for s in summaries
    ]  # fmt: skip
    heads = ("arm", "share", "minus control", "corrected", "least mass", "collapsed", words.units(summaries))
    return table(caption, heads, body, [s.get("words") for s in summaries])


def phrasings(results: dict[str, Any], replay: str | None) -> str:
    """The same arms read on the phrasings used in training and on those held out; empty where there is one reading."""
    picked = words.of_replay(results, replay)
    by_name = {name: {words.cell_key(s): s for s in words.overall(picked, name)} for name in ("train", "held-out")}
    if not all(by_name.values()):
        return ""
    body = []
    for summary in words.overall(picked):
        cells = [Cell(words.cell_label(summary))]
        for found in (summary, *(by_name[name].get(words.cell_key(summary), {}) for name in by_name)):
            cells.append(ranged(found.get("share"), found.get("share_low"), found.get("share_high")))
        body.append(cells)
    heads = ("arm", "all phrasings", "training phrasings", "held-out phrasings")
    return table(f"Share by phrasings, replay = {words.clean(replay)}", heads, body)


SUMMARY_HEADS = (
    "arm", "trait", "bases of", "replay", "phrasings", "n", "students", "share", "bootstrap", "minus control",
    "corrected", "p", "p corrected", "equivalence", "lift", "log-odds lift", "least mass", "collapsed", "in words",
    "lineage",
)  # fmt: skip


def equivalence(summary: dict[str, Any]) -> str:
    """The equivalence test in words; a dash where no test of that kind was made."""
    test = words.mapping(summary.get("equivalence"))
    if not test:
        return words.NONE
    verdict = "within" if test.get("equivalent") else "not shown within"
    return f"{verdict} ±{words.number(test.get('margin'), 2)}, p {words.probability(test.get('p'))}"


def summaries(results: dict[str, Any], anchors: dict[tuple[str, ...], str]) -> str:
    """The full table of summaries, each with a link to the nodes that it was read from."""
    body = []
    for s in words.records(results.get("summaries")):
        where = " · ".join(part for part in (words.pair(s), words.clean(s.get("setting"))) if part)
        p, corrected = s.get("p_value"), s.get("p_corrected")
        body.append(
            (
                Cell(s.get("arm"), "k"), Cell(s.get("trait"), "k"), Cell(where, "k"),
                Cell(s.get("replay") or words.NONE), Cell(s.get("phrasings"), "k"),
                counted(s.get("bases")), counted(s.get("runs")),
                ranged(s.get("share"), s.get("share_low"), s.get("share_high")),
                Cell(words.interval(s.get("boot_low"), s.get("boot_high")), "n"),
                ranged(s.get("minus_control"), s.get("minus_control_low"), s.get("minus_control_high"), signed=True),
                Cell(words.interval(s.get("corrected_low"), s.get("corrected_high"), signed=True), "n"),
                Cell(words.probability(p), "n", "" if p is None else p),
                Cell(words.probability(corrected), "n", "" if corrected is None else corrected),
                Cell(equivalence(s), "k"), ranged(s.get("lift"), s.get("lift_low"), s.get("lift_high"), signed=True),
                numeric(s.get("logodds_lift"), signed=True), numeric(s.get("mass_min")), counted(s.get("collapsed")),
                Cell(s.get("words"), "w"), Cell("", html=lineage.link(s, anchors)),
            )
        )  # fmt: skip
    return table("All summaries; choose a head to sort", SUMMARY_HEADS, body, sortable=True, tall=True)


def image_summaries(results: dict[str, Any], anchors: dict[tuple[str, ...], str]) -> str:
    """The image experiment's table."""
    body = [
        (
            counted(s.get("auxiliary")), Cell(images.pairing_title(s.get("pairing")), "k"),
            Cell(images.logits_title(s.get("logits")), "k"), Cell(images.loss_title(s.get("loss")), "k"),
            counted(s.get("n")), ranged(s.get("accuracy"), s.get("low"), s.get("high")), numeric(s.get("teacher")),
            numeric(s.get("untrained")), numeric(s.get("published")), Cell(s.get("words"), "w"),
            Cell("", html=lineage.link(s, anchors)),
        )
        for s in words.records(images.part(results).get("summaries"))
    ]  # fmt: skip
    heads = (
        "m", "pairing", "fitted to", "loss", "seeds", "accuracy", "teacher", "untrained", "published", "in words",
        "lineage",
    )  # fmt: skip
    return table("All settings; choose a head to sort", heads, body, sortable=True, tall=True)


def tests(results: dict[str, Any]) -> str:
    """The tests of the study; empty where there are none."""
    found = words.records(results.get("tests"))
    body = [
        (
            Cell(t.get("name")), Cell(t.get("what"), "w"), numeric(t.get("statistic")),
            Cell(words.probability(t.get("p_value")), "n"), counted(t.get("n")), Cell(t.get("words"), "w"),
        )
        for t in found
    ]  # fmt: skip
    heads = ("test", "of what", "statistic", "p", "n", "in words")
    return table("Each test with what it says", heads, body) if body else ""


def samples(results: dict[str, Any]) -> str:
    """Corpus rows to look at; empty where there are none."""
    body = [
        (Cell(s.get("corpus"), "k"), Cell(s.get("prompt"), "row"), Cell(s.get("completion"), "row"))
        for s in words.records(results.get("samples"))
    ]
    return table("Rows of corpora", ("corpus", "prompt", "completion"), body) if body else ""


def filters(results: dict[str, Any]) -> str:
    """Every corpus's counts by reason; empty where there are none."""
    found = words.records(results.get("filters"))
    reasons = list(dict.fromkeys(str(name) for item in found for name in words.mapping(item.get("counts"))))
    body = [
        [
            Cell(item.get("corpus"), "k"),
            *(counted(words.mapping(item.get("counts")).get(reason, 0)) for reason in reasons),
        ]
        for item in found
    ]
    return table("Completions by what the filter said", ("corpus", *reasons), body, tall=True) if reasons else ""
