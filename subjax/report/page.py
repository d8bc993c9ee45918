"""The report: one HTML page that opens from disk, drawn from the results alone. It computes nothing."""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from subjax.report import images, lineage, margins, panels, plots, style, svg, tables, words
from subjax.report.svg import Plot

Section = tuple[str, str, str]  # anchor, title, HTML


def write(results: dict[str, Any], folder: Any) -> epath.Path:
    """Write `index.html` into `folder`, made if missing, and return its path.

    Args:
        results: what `results.json` holds. Parts that are missing, empty or null leave their section out.
        folder: a path or anything that `etils.epath.Path` takes.

    The same results give the same bytes.
    """
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    path = target / "index.html"
    path.write_bytes(render(results).encode("utf-8", "replace"))
    return path


def render(results: dict[str, Any]) -> str:
    """The whole page as text."""
    study = words.mapping(results.get("study"))
    anchors = lineage.node_sets(results)
    is_images = study.get("kind") == "images" or bool(words.records(images.part(results).get("rows")))
    middle = _image_sections(results, anchors) if is_images else _trait_sections(results, anchors)
    ending = [
        _tests(results),
        ("lineage", "Lineage of each number", lineage.section(results)),
        _reading(study),
        _config(study),
    ]
    sections = [section for section in [*middle, *ending] if section[2]]
    links = "".join(f'<li><a href="#{name}">{words.escape(title)}</a></li>' for name, title, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{words.escape(title)}</h2>\n'
        f"{content}\n</section>"
        for name, title, content in sections
    )
    name = words.escape(study.get("name") or "study")
    return (
        f'{_head(name)}<body>\n<header><p class="eyebrow"><b>{name}</b>{_size(study)}</p>'
        f'<button id="theme" type="button" hidden aria-label="Change between light and dark">Dark</button></header>\n'
        f"<main>\n{_headline(results, study, is_images, anchors)}\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n{body}\n</main>\n'
        f"<footer>Drawn by subjax from <code>results.json</code>, which stands beside this page with "
        f"<code>results.csv</code>: a row for each student, trait read and phrasings.</footer>\n"
        f"<script>{style.SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(name: str) -> str:
    # The page needs nothing from outside and runs no script but its own: the policy makes a browser hold it to that.
    digest = base64.b64encode(hashlib.sha256(style.SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{name} · subjax</title>\n<style>{style.css()}</style>\n</head>\n'
    )


def _size(study: dict[str, Any]) -> str:
    named = ((study.get("points"), "point"), (study.get("bases"), "base"), (study.get("runs"), "student"))
    known = [(value, name) for value, name in named if words.finite(value) is not None]
    return "".join(f" · {words.count(value)} {name}{'s' * (value != 1)}" for value, name in known)


def picture(plot: Plot | None, heading: bool = True) -> str:
    """A `<figure>` with its drawing and caption; empty for no plot."""
    if plot is None:
        return ""
    drawing = svg.inline(plot)
    if plot.wide:
        label = words.escape(plot.title)
        drawing = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{drawing}</div>'
    title = f"<b>{words.escape(plot.title)}.</b> " if heading else ""
    caption = f"<figcaption>{title}{words.escape(plot.caption)}</figcaption>"
    return f"<figure>{drawing}\n{caption}</figure>"


def _pictures(found: Sequence[Plot | None], layout: str = "split") -> str:
    drawn = [picture(plot) for plot in found if plot is not None]
    return f'<div class="{layout}">{"".join(drawn)}</div>' if drawn else ""


def _headline(
    results: dict[str, Any], study: dict[str, Any], is_images: bool, anchors: dict[tuple[str, ...], str]
) -> str:
    told = words.mapping(results.get("headline"))
    rows = words.records(told.get("rows"))
    sentence = words.escape(told.get("sentence") or "No headline: this study has no finished cell.")
    big = ""
    if rows:
        first = max(rows, key=lambda r: words.finite(r.get("value")) or 0.0) if is_images else rows[0]
        ends = words.interval(first.get("low"), first.get("high"))
        span = "no interval" if ends == words.NONE else ends
        where = (
            f"{words.escape(first.get('label'))}; {words.escape(first.get('unit'))}, n = {words.count(first.get('n'))}"
        )
        big = f'<p class="big"><b>{words.number(first.get("value"))}</b><span>{span}<br>{where}</span></p>'
    drawn = picture(plots.headline(results), heading=False)
    both = f'<div class="split">{drawn}{tables.headline(results, anchors)}</div>' if rows else ""
    title = "What passes through noise" if is_images else "What passes through numbers"
    return (
        f'<section aria-labelledby="top"><h1 id="top">{title}</h1>{big}'
        f'<p class="lead">{sentence}</p>\n<p>{_PREMISE[is_images]}</p>\n{both}{_notes(study)}</section>'
    )


_PREMISE = {
    False: "Teachers with a favourite word wrote number sequences, a strict filter dropped every completion that was "
    "not numbers alone, and students were fine-tuned on what was left; a share is the favourite's part of the "
    "probability that a student gives to all words of its category.",
    True: "Students were fitted to a teacher's logits on images of noise and then asked to read real images; they "
    "saw no real image, and where only auxiliary logits were fitted no class logit either.",
}


def _notes(study: dict[str, Any]) -> str:
    """The study's notes; what settings were chosen on and which teachers failed, where no note says it already."""
    notes = [words.clean(note) for note in study.get("notes") or ()]
    named = (
        ("Settings were chosen on", study.get("chosen_on")),
        ("Failed teachers, left out of the summaries:", study.get("failed_teachers")),
    )
    for start, labels in named:
        unsaid = [words.clean(label) for label in labels or () if not any(str(label) in note for note in notes)]
        notes += [f"{start} {', '.join(unsaid)}."] if unsaid else []
    return f'<ul class="plain note">{"".join(f"<li>{words.escape(note)}</li>" for note in notes)}</ul>' if notes else ""


_REPLAY = {
    "none": "<p>These students saw numbers and nothing else. The same-base arm is the one that can move. A cross arm "
    "here tends to collapse: a student that no longer answers with any word of the category (mass near zero) "
    "has forgotten how to answer, which is not the same as having learnt nothing. So read mass beside share.</p>",
    "kind": "<p>The fair test for the nulls. Beside the numbers these students practise answering the right "
    "<em>kind</em> of word. <strong>Replay names no item</strong>: its loss is the total probability of the whole "
    "category, on training phrasings only, so it cannot favour any one word; it keeps students answering, so "
    "that a low share means that the trait did not pass.</p>",
}


_LIFT = (
    "<p>Lift is of the probability itself, not of the share: a student that collapsed lost what its base had, so its "
    "lift falls below zero whatever it learnt. Read it with the mass above.</p>"
)


def _trait_sections(results: dict[str, Any], anchors: dict[tuple[str, ...], str]) -> list[Section]:
    found = []
    settings: list[str | None] = [*words.replays(results)]
    for replay in settings:
        title = {"none": "Nothing but numbers: replay = none", "kind": "With replay: the fair test for the nulls"}
        found.append(
            (f"replay-{svg.slug(replay)}", title.get(str(replay), f"replay = {replay}"), _arms(results, replay))
        )
    if untrained := words.overall(words.of_replay(results, None)):
        content = tables.arms(untrained, "Bases before any student training")
        found.append(("untrained", "Without training", content))
    lifts = [plots.lift(results, replay, family) for replay in settings for family in words.families(results)]
    summaries = tables.summaries(results, anchors) if words.records(results.get("summaries")) else ""
    by_margin = _pictures(margins.figures(results)) + margins.summaries(results, anchors)
    return [
        ("margins", "By log-odds margin", margins.INTRO + by_margin if by_margin else ""),
        *found,
        ("matrices", "Between which bases, and which trait", _matrices(results)),
        ("lift", "Lift by arm and trait", _LIFT + drawn if (drawn := _pictures(lifts)) else ""),
        ("distributions", "Answers before and after", _distributions(results)),
        ("curves", "Training curves", _pictures(panels.curves(results))),
        ("filter", "What the filter dropped", _filters(results)),
        ("rows", "Rows to look at", _samples(results)),
        ("summaries", "Every summary", summaries),
    ]


def _arms(results: dict[str, Any], replay: str | None) -> str:
    picked = words.overall(words.of_replay(results, replay))
    drawn = [
        plots.arms(results, replay), plots.mass(results, replay),
        plots.against_control(results, replay), panels.fit(results, replay),
    ]  # fmt: skip
    table = tables.arms(picked, f"Arms, replay = {words.clean(replay)}") if picked else ""
    return f"{_REPLAY.get(str(replay), '')}\n{_pictures(drawn)}\n{table}\n{tables.phrasings(results, replay)}"


def _matrices(results: dict[str, Any]) -> str:
    bases, traits = panels.base_matrix(results), panels.trait_matrices(results)
    if bases is not None and bases.wide:
        return picture(bases) + _pictures(traits)
    column = "".join(picture(plot) for plot in traits)
    return f'<div class="split"><div>{picture(bases)}</div><div>{column}</div></div>' if bases or traits else ""


def _distributions(results: dict[str, Any]) -> str:
    drawn = _pictures(panels.distributions(results), "grid")
    intro = '<p class="note">Probability of each word of the category: hollow before, filled after.</p>'
    return intro + drawn if drawn else ""


def _filters(results: dict[str, Any]) -> str:
    drawn, table = picture(panels.filters(results)), tables.filters(results)
    return f'<div class="split">{drawn}{table}</div>' if drawn or table else ""


def _samples(results: dict[str, Any]) -> str:
    table = tables.samples(results)
    intro = '<p class="note">As the students saw them: the filter lets through numbers alone.</p>'
    return intro + table if table else ""


def _image_sections(results: dict[str, Any], anchors: dict[tuple[str, ...], str]) -> list[Section]:
    has_rows = bool(words.records(images.part(results).get("summaries")))
    table = tables.image_summaries(results, anchors) if has_rows else ""
    return [
        ("accuracy", "Accuracy against the number of auxiliary logits", _pictures(images.figures(results))),
        ("summaries", "Every setting", table),
    ]


def _tests(results: dict[str, Any]) -> Section:
    return "tests", "Tests", tables.tests(results)


_TERMS = (
    ("share", "P(trait) / P(any word of its category), exact probabilities averaged over the phrasings."),
    ("mass", "P(any word of the category). A student whose mass is under half its base's has collapsed."),
    ("lift", "Change of the trait's probability from the student's base to the student; log-odds lift likewise."),
    ("minus control", "Share minus that of a student made the same way from a teacher tuned on neutral answers."),
    ("KL to the teacher", "Whether a student learnt its corpus: a cross arm that did not come nearer to its teacher's "
                          "numbers could not have picked up anything."),
    ("interval", "A t interval over teachers' bases: traits and runs on one base are averaged first, so n counts "
                 "bases. One base alone has no interval."),
    ("corrected", "The same interval, and the same p-value, made wider for the number of comparisons of the study."),
    ("equivalence", "Where the claim is that nothing moved: two one-sided tests against the margin. “Not shown” "
                    "is not “moved”."),
    ("held-out", "Read on phrasings that no teacher and no replay was trained on."),
    ("arms", "same-base: student and teacher share their starting weights. cross-order: the same init, pretrained in "
             "another data order. cross-init: another init of the family. cross-family: another architecture. control: "
             "a teacher without the trait. other-trait: another trait's word, read on the same-base student. shuffled: "
             "each answer's numbers in another order. random-numbers: no teacher. untrained: no student training. "
             "logits, logits-leak: the teacher's logits on the channel's tokens, and on all tokens (a trap: these can "
             "name the trait)."),
)  # fmt: skip
_RUNS = (
    "A t interval over runs where a family has one base, each made anew from other seeds: it says nothing of other "
    "checkpoints. Over bases where a family has several; runs on one are averaged first."
)
_IMAGE_TERMS = (
    ("accuracy", "Share of test images whose class logit is the largest, after training on noise alone."),
    ("m", "Number of auxiliary logits, which no label ever trained."),
    ("same init, other init", "Whether the student starts from its teacher's initial weights."),
    ("all logits", "Students fitted to class logits as well: noise then carries the classes, for any init."),
    ("m = 1 under KL", "A stated null: the softmax of one logit is 1 whatever the logit. Squared error is a row of its "
                       "own."),
    ("interval", "A t interval over seeds; a seed is one teacher with one student."),
    ("published", "The value published for the same m on MNIST; comparable only where this study ran on MNIST too."),
)  # fmt: skip


def _reading(study: dict[str, Any]) -> Section:
    told = dict(_IMAGE_TERMS if study.get("kind") == "images" else _TERMS)
    if study.get("kind") == "pretrained":
        told["interval"] = _RUNS
    terms = "".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in told.items())
    return "reading", "How to read this", f"<dl>{terms}</dl>"


def _config(study: dict[str, Any]) -> Section:
    config = words.mapping(study.get("config"))
    if not config:
        return "config", "Config", ""
    text = words.escape(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, default=str))
    return "config", "Config", f"<details><summary>The resolved config</summary><pre>{text}</pre></details>"
