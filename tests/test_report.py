"""The page: what stands on it, that it opens from disk alone, that no text in the results can become markup."""

import copy
import html.parser
import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from synthetic_results import images_study, traits_study

from subjax import report, results
from subjax.report import lineage, page, panels, plots, style, svg, tables, words

ATTACK = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'</svg></style></pre>&lt;b&gt; $\\frac{1}$ \x00\x1b"
ARMS = ("same-base", "cross-init", "cross-family", "control", "other-trait", "untrained")
VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect"}


class Reader(html.parser.HTMLParser):
    """Every start tag with its attributes, and the text; complains about ends that do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]

    @property
    def headings(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section" and "id" in attrs]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small study of two traits, two families and two inits."""
    return results.compute(*traits_study(tmp_path_factory.mktemp("t"), 0, 2, ("owl", "wolf"), ARMS))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return results.compute(*images_study(tmp_path_factory.mktemp("i"), 0, 3))


@pytest.fixture(scope="module")
def rendered(made):
    return page.render(made)


@pytest.fixture(scope="module")
def rendered_digits(digits):
    return page.render(digits)


@pytest.fixture
def tiny(made):
    """One replay setting, three arms, one family: quick to draw."""
    kept = copy.deepcopy(made)
    keep = ("same-base", "cross-init", "control")
    for part in ("rows", "summaries"):
        kept[part] = [r for r in kept[part] if r["arm"] in keep and r["replay"] == "kind"]
    kept["summaries"] = [s for s in kept["summaries"] if s["teacher_family"] == s["student_family"] == "gpt"]
    kept["distributions"], kept["curves"] = kept["distributions"][:1], kept["curves"][:2]
    kept["headline"]["rows"] = kept["headline"]["rows"][:2]
    return kept


def sections(text: str) -> dict[str, str]:
    """From a section's anchor to its HTML."""
    return {m[1]: m[0] for m in re.finditer(r'<section id="([\w-]+)".*?</section>', text, flags=re.DOTALL)}


def drawings(text: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)


def replaced(value, text):
    """The same structure with `text` for each string but those that say which part of the page is drawn."""
    if isinstance(value, dict):
        return {
            k: v if k in ("kind", "phrasings", "replay", "nodes", "node") else replaced(v, text)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [replaced(v, text) for v in value]
    return text if isinstance(value, str) else value


def test_page_has_its_sections_in_order(rendered):
    found = Reader(rendered)
    assert found.headings == [
        "replay-none", "replay-kind", "untrained", "matrices", "lift", "distributions", "curves", "filter", "rows",
        "summaries", "tests", "lineage", "reading", "config",
    ]  # fmt: skip
    assert not found.open, "every element is closed"
    assert [tag for tag, _ in found.tags].count("h1") == 1


def test_page_stands_alone(rendered, rendered_digits):
    for text in (rendered, rendered_digits):
        bare = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
        assert "://" not in bare
        assert "@import" not in bare
        assert set(re.findall(r"url\((.)", bare)) <= {"#"}
        for tag, attrs in Reader(text).tags:
            assert tag not in ("img", "iframe", "object", "embed", "base", "form"), tag
            assert "src" not in attrs
            assert not [name for name in attrs if name.startswith("on")]
            if tag == "link":
                assert attrs["href"] == "data:,"
            elif "href" in attrs:
                assert attrs["href"].startswith("#")


def test_every_link_has_its_anchor_and_every_anchor_is_one(rendered, rendered_digits):
    for text in (rendered, rendered_digits):
        found = Reader(text)
        assert len(found.ids) == len(set(found.ids))
        aims = {a.get("href") or a.get("xlink:href") for tag, a in found.tags if tag in ("a", "use")}
        assert {aim[1:] for aim in aims} <= set(found.ids)
        assert set(re.findall(r"url\(#([\w-]+)", text)) <= set(found.ids)
        labelled = {a["aria-labelledby"] for _, a in found.tags if "aria-labelledby" in a}
        assert labelled <= set(found.ids)


def test_same_results_give_the_same_bytes(tiny, tmp_path):
    first = page.write(tiny, tmp_path / "a")
    second = page.write(json.loads(json.dumps(tiny)), str(tmp_path / "b" / "c"))
    assert first.name == "index.html"
    assert first.read_bytes() == second.read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["index.html"]


def test_page_does_not_change_the_results_it_is_given(tiny):
    before = json.dumps(tiny)
    page.render(tiny)
    assert json.dumps(tiny) == before


@pytest.mark.parametrize("which", ["tiny", "digits"])
def test_text_in_results_is_harmless(which, request):
    hostile = replaced(request.getfixturevalue(which), ATTACK)
    hostile["study"]["config"] = {ATTACK: ATTACK}
    hostile["filters"] = [{"corpus": ATTACK, "node": "x", "counts": {ATTACK: 3, "kept": 4}}]
    hostile["samples"] = [{"corpus": ATTACK, "prompt": ATTACK, "completion": ATTACK}]
    for summary in hostile["summaries"]:
        summary["nodes"] = [ATTACK]
    hostile["lineage"] = {ATTACK: {"kind": ATTACK, "label": ATTACK, "inputs": {ATTACK: ATTACK}, "digest": ATTACK}}
    text = page.render(hostile)
    found = Reader(text)
    assert not found.open
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 1
    assert names.count("style") == 1
    assert not {"img", "b1", "iframe"} & set(names)
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "<script>alert(1)</script>" in "".join(found.words), "shown as it is, as text"


def test_only_its_own_script_may_run(rendered):
    import base64
    import hashlib

    script = re.search(r"<script>(.*)</script>", rendered, flags=re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in Reader(rendered).tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


TOP = (
    "study", "headline", "rows", "summaries", "tests", "base_matrix", "trait_matrix", "distributions", "curves",
    "filters", "samples", "lineage", "images",
)  # fmt: skip
SHOWS = {
    "summaries": ("replay-kind", "lift", "summaries"), "tests": ("tests",), "distributions": ("distributions",),
    "curves": ("curves",), "filters": ("filter",), "samples": ("rows",),
}  # fmt: skip


@pytest.mark.parametrize("empty", ["missing", "null", "empty"])
@pytest.mark.parametrize("part", TOP)
def test_a_part_that_is_missing_leaves_its_section_out(tiny, part, empty):
    # Only a little of the rest is drawn, so that the many cases stay quick; each case of a part has another rest.
    rest = {"missing": ("curves", "filters"), "null": ("distributions",), "empty": ("headline",)}[empty]
    for other in ("curves", "filters", "distributions", "headline", "base_matrix", "trait_matrix"):
        if other not in (part, *rest):
            tiny.pop(other)
    tiny["summaries"] = tiny["summaries"][:1] if empty == "missing" else []
    value = tiny.pop(part, None)
    if empty != "missing":
        tiny[part] = None if empty == "null" else type(value)() if value is not None else {}
    found = Reader(page.render(tiny))
    assert not found.open
    assert "reading" in found.headings
    assert not set(SHOWS.get(part, ())) & set(found.headings)


@pytest.mark.parametrize(
    "nothing", [{}, {"format": 1, "study": {"kind": "images"}}, {"images": {"rows": [], "summaries": []}}]
)
def test_no_results_at_all_give_a_page(nothing):
    text = page.render(nothing)
    assert not Reader(text).open
    assert "no finished cell" in text


def test_parts_inside_that_are_null_give_a_page(tiny, digits):
    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items()}
        if isinstance(value, list):
            return [without(v) for v in value]
        return value if isinstance(value, str) else None

    for study in (tiny, digits):
        text = page.render(without(study))
        assert not Reader(text).open
        assert "nan" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL).lower().split()


def test_one_base_has_a_value_and_no_interval(tiny):
    for record in [*tiny["summaries"], *tiny["headline"]["rows"]]:
        record.update({k: None for k in record if k.endswith(("low", "high"))})
        record.update({k: 1 for k in ("n", "bases") if k in record})
    tiny["headline"]["rows"][0]["value"] = 0.4321
    text = page.render(tiny)
    first = re.search(r'<p class="big">.*?</p>', text)[0]
    assert "0.432" in first
    assert "no interval" in first
    share = tiny["summaries"][0]["share"]
    assert f">{share:.3f}</td>" in sections(text)["summaries"]


def test_numbers_are_the_results_own(tiny):
    """A page that computed a mean of its own would not follow a summary that contradicts its rows."""
    changed = next(s for s in tiny["summaries"] if s["arm"] == "same-base" and words.is_mean(s["trait"]))
    changed.update(share=0.8765, share_low=0.8111, share_high=0.9222, mass_min=0.4567, collapsed=7, runs=8)
    text = page.render(tiny)
    replay, every = sections(text)["replay-kind"], sections(text)["summaries"]
    for part in (replay, every):
        assert "0.876 [0.811, 0.922]" in part or "0.877 [0.811, 0.922]" in part
        assert "0.457" in part
    assert "7 of 8" in replay


def test_nothing_is_computed():
    folder = pathlib.Path(report.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(?:import|from) (?:numpy|scipy|statistics|random|time|datetime)\b", text, flags=re.M)
        assert not re.search(r"\bsum\(|\bmean\(|\bstdev\(", text), path


def test_importing_the_report_costs_no_plotting_library():
    code = "import sys, subjax.report.page, subjax.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_replay_none_stands_first_and_replay_names_no_item(rendered):
    parts = sections(rendered)
    assert rendered.index('id="replay-none"') < rendered.index('id="replay-kind"')
    assert "collapse" in parts["replay-none"]
    assert "4 of 4" in parts["replay-none"], "the collapsed cross students are counted"
    assert "Replay names no item" in parts["replay-kind"]
    assert "held-out phrasings" in parts["replay-kind"]
    order = [parts["replay-none"].index(f"{arm} · gpt") for arm in ("same-base", "cross-init", "cross-family")]
    assert order == sorted(order)


def test_rows_and_filter_and_config_are_shown(made, rendered):
    parts = sections(rendered)
    assert len(made["samples"]) == 20
    for sample in made["samples"]:
        assert words.escape(sample["completion"]) in parts["rows"]
    for item in made["filters"]:
        for reason, n in item["counts"].items():
            assert words.escape(reason) in parts["filter"]
            assert f"{n:,}" in parts["filter"]
    assert "&quot;margin&quot;: 0.05" in parts["config"]
    for test in made["tests"]:
        assert words.escape(test["words"]) in parts["tests"]


def test_each_summary_links_to_its_nodes_and_they_to_their_inputs(made, rendered):
    parts = sections(rendered)
    body = re.search(r"<tbody>(.*)</tbody>", parts["summaries"], flags=re.DOTALL)[1]
    assert body.count("<tr>") == len(made["summaries"])
    assert body.count('<a href="#set-') == len(made["summaries"])
    known = made["lineage"]
    summary = made["summaries"][0]
    name = lineage.node_sets(made)[tuple(summary["nodes"])]
    listed = re.search(rf'<details id="{name}">.*?</details>', parts["lineage"], flags=re.DOTALL)[0]
    node = summary["nodes"][0]
    assert f'href="#node-{node}"' in listed
    tree = lineage.tree(node, known)
    upward, seen = [node], []
    while upward:
        here = upward.pop()
        seen.append(here)
        upward += known[here]["inputs"].values()
    kinds = {known[n]["kind"] for n in seen}
    assert {"evaluation", "student", "corpus", "teacher", "base"} <= kinds
    assert all(f"<code>{n}</code>" in tree for n in seen)
    assert tree in parts["lineage"]


def test_a_loop_in_a_broken_lineage_ends():
    assert "not in the lineage" in lineage.tree("x", {})
    assert lineage.tree("x", {"x": {"inputs": {"self": "x"}}}).count("<details") < 20


def test_drawings_are_labelled_text_in_the_page_colours(rendered, rendered_digits):
    for text in (rendered, rendered_digits):
        found = drawings(text)
        assert found
        for drawing in found:
            root = ElementTree.fromstring(drawing)
            assert root.get("role") == "img"
            assert len(root.get("aria-label")) > 20
            assert [e for e in root.iter() if e.tag.endswith("}text")], "text stays text"
            styled = " ".join(e.get("style") or "" for e in root.iter())
            assert "var(--" in styled
            assert not re.findall(r"#[0-9a-f]{6}", styled), "a fixed colour would be wrong on one of the grounds"
            assert "font-family" not in styled
            sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", styled)]
            assert min(sizes) >= 9
            assert "<metadata" not in drawing
        defined = set(re.findall(r"--([\w-]+):#", text))
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= defined


def test_figures_fit_a_phone_or_scroll_by_themselves(made):
    bases = [f"gpt/{i}" for i in range(14)]
    cells = [{"teacher": a, "student": b, "value": 0.1, "n": 1} for a in bases for b in bases]
    many = {"base_matrix": {"rows": bases, "columns": bases, "cells": cells, "value": "share", "chance": 0.1}}
    wide = panels.base_matrix(many)
    assert wide.wide
    assert '<div class="scroll" tabindex="0" role="region"' in page.picture(wide)
    narrow = panels.base_matrix(made)
    assert not narrow.wide
    assert "scroll" not in page.picture(narrow)


def test_heat_maps_leave_out_what_was_not_run_and_are_centred(made):
    part = {
        "rows": ["a", "b"],
        "columns": ["a", "b"],
        "value": "v",
        "cells": [{"teacher": "a", "student": "b", "value": -0.25}],
    }
    drawn = svg.inline(panels.base_matrix({"base_matrix": part}))
    assert drawn.count("\N{MINUS SIGN}0.25</text>") == 1
    assert len(re.findall(r"[+\N{MINUS SIGN}]\d\.\d\d</text>", drawn)) == 1
    half = (style.STEPS - 1) // 2
    assert [panels.heat_step(v, 0.5) for v in (-0.5, 0.0, 0.5, 9.0)] == [0, half, 2 * half, 2 * half]
    assert panels.heat_step(0.0, 0.0) == half
    assert len(panels.trait_matrices(made)) == 2


def test_points_are_the_runs_of_a_summary(made):
    for summary in made["summaries"]:
        if summary["arm"] != "other-trait" and not words.is_mean(summary["trait"]):
            assert len(words.runs_of(made, summary)) == summary["runs"], summary["arm"]


def test_image_page_shows_settings_published_values_and_the_squared_error_row(digits, rendered_digits):
    parts = sections(rendered_digits)
    assert list(parts) == ["accuracy", "summaries", "tests", "lineage", "reading", "config"]
    assert len(drawings(parts["accuracy"])) == 3
    assert "squared error" in parts["summaries"]
    assert "all logits" in parts["summaries"]
    assert parts["summaries"].count("<tr>") == 1 + len(digits["images"]["summaries"])
    assert ">0.917</td>" in parts["summaries"]
    first, second = (svg.inline(plots_of) for plots_of in page.images.figures(digits)[:2])
    assert "published" in parts["accuracy"]
    seeds = sum(r["logits"] == "auxiliary" and r["loss"] == "kl" for r in digits["images"]["rows"])
    assert first.count("<use") > seeds
    assert first != second


def test_colours_can_be_read_and_told_apart():
    colours = style.PALETTE | style.heat_colours()
    lights = [pair[0] for pair in colours.values()]
    assert len(lights) == len(set(lights)), "a light colour stands for one variable"
    for mode in (0, 1):
        paper = style.PALETTE["paper"][mode]
        for name in ("ink", "muted", "link", "orange"):
            assert style.contrast(style.PALETTE[name][mode], paper) >= 4.5, name
        for name in style.SERIES:
            assert style.contrast(style.PALETTE[name][mode], paper) >= 3, name
        heat = style.heat_colours()
        for step in range(style.STEPS):
            assert style.contrast(heat[f"heat-{step}"][mode], heat[f"heat-ink-{step}"][mode]) >= 4.5, step
        middle = (style.STEPS - 1) // 2
        brightness = [style.luminance(heat[f"heat-{step}"][mode]) for step in range(style.STEPS)]
        arms = brightness[: middle + 1], brightness[middle:][::-1]
        for side in arms:
            assert side == sorted(side, reverse=mode == 1), "a map is ordered from its ends to its middle"


def test_style_sheet_covers_dark_print_and_narrow_screens():
    text = style.css()
    assert "prefers-color-scheme:dark" in text
    assert "[data-theme=dark]" in text
    assert "@media print" in text
    assert text.count("{") == text.count("}")
    assert ".scroll{overflow-x:auto" in text


def test_save_figures_writes_pngs(tiny, tmp_path):
    tiny["summaries"] = tiny["summaries"][:2]
    paths = plots.save_figures(tiny, tmp_path / "figures")
    assert {"headline.png", "arms-kind.png", "base-matrix.png"} <= {p.name for p in paths}
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("value", "kwargs", "text"),
    [
        (0.12345, {}, "0.123"), (-0.5, {}, "\N{MINUS SIGN}0.500"), (0.5, {"signed": True}, "+0.500"),
        (-0.0001, {"signed": True}, "0.000"), (0, {"digits": 2}, "0.00"), (None, {}, "–"), (float("nan"), {}, "–"),
        ("<b>", {}, "–"), (True, {}, "–"), (float("inf"), {}, "–"),
    ],
)  # fmt: skip
def test_numbers_are_worded(value, kwargs, text):
    assert words.number(value, **kwargs) == text


def test_probabilities_and_intervals_are_worded():
    assert words.probability(0.0001) == "< 0.001"
    assert words.probability(0.0321) == "0.032"
    assert words.probability(None) == "–"
    assert words.interval(0.1, None) == "–"
    assert words.estimate(0.3, 0.2, 0.4) == "0.300 [0.200, 0.400]"
    assert words.estimate(0.3, None, 0.4) == "0.300"
    assert tables.equivalence({"equivalence": None}) == "–"
    assert "not shown" in tables.equivalence({"equivalence": {"margin": 0.05, "p": 0.3, "equivalent": False}})


def test_overall_prefers_the_mean_and_takes_one_trait_alone():
    cell = {"arm": "same-base", "teacher_family": "gpt", "student_family": "gpt", "replay": "kind", "phrasings": "all"}
    one, mean = cell | {"trait": "owl"}, cell | {"trait": "mean of 3"}
    assert words.overall([one, mean]) == [mean]
    assert words.overall([mean, one]) == [mean]
    assert words.overall([one]) == [one]
    assert words.overall([one | {"phrasings": "train"}]) == []
