"""docs/performance.md with its plots, from the results in benchmarks/results alone; it computes nothing.

python -m benchmarks.document
"""

import argparse
import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import RESULTS
from subjax.report import plots, style, svg

DOCS = pathlib.Path(__file__).parent.parent / "docs"
# Comparison: title, and what was done, in the order of the page. A unit is what a rate counts a second.
COMPARISONS = {
    "training": (
        "Student fine-tuning",
        "LoRA of rank 8 on all seven matrices, AdamW at 2e-4 on a linear schedule, batches of {batch}, rows of one"
        " corpus in one order ({rows} number rows, {mean_tokens[prompt]:.0f} + {mean_tokens[completion]:.0f}"
        " tokens on average), {dtype}. transformers + peft + torch as TRL trains: padded to the longest row of a"
        " (micro-)batch, loss on completions; without gradient checkpointing and TRL's own metrics, at the micro-batch"
        " that was fastest.",
    ),
    "sampling": (
        "Sampling number rows",
        "Temperature 1 from the whole vocabulary, the same prompts ({mean_prompt:.0f} tokens on average), {dtype}."
        " Equal lengths: no token ends an answer; ragged ones: answers end when the model ends them. {new_tokens} new"
        " tokens at most. Both sides at the fastest of batches {batches}.",
    ),
    "evaluation": (
        "A preference evaluation",
        "{questions} questions x {candidates} candidates, {forms} written forms a question, each as a whole word,"
        " {dtype}. Where transformers scores, it scores every form behind its question in batches of rows of like"
        " length, with logits for the last tokens alone, at its fastest batch; sampled answers are of {sample_tokens}"
        " tokens at most, drawn as number rows are, and compared a hundred a question.",
    ),
    "cohort": (
        "Students together",
        "Rows of all {students} students together, as in student fine-tuning, in batches of {batch}. In turn and in"
        " transformers each student has the whole machine; side by side two processes have half of the cores each.",
    ),
    "images": (
        "The image experiment",
        "Whole experiments with {members} models, MLPs {widths}, Adam at {lr}, batches of {batch}, {epochs} epochs each"
        " of teachers and students, {rows} images and as much noise. Images are counted once a model that trains on"
        " them.",
    ),
}
ORDER = (*COMPARISONS, "utilization", "growth")  # of all that is measured

PARTS = {
    "equal": "equal lengths", "ragged": "ragged lengths", "forms": "all written forms", "first": "one form a candidate",
    "sampled": "beside sampled answers", "lora": "training with LoRA", "full": "training in full",
    "decoding": "decoding",
}  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]


def named(found: Mapping[str, Any]) -> str:
    """A result's title: where it ran, if that was a GPU, and at which size."""
    title = COMPARISONS.get(found["comparison"], (found["comparison"].capitalize(), ""))[0]
    title += f", {PARTS[found['part']]}" if found.get("part") else ""
    return f"{title}, {found['size']} on {found['machine']['gpu']}" if found["device"] == "gpu" else title


def verdict(row: Mapping[str, Any], quick: bool) -> str:
    """Whether a wanted ratio was reached; where the interval holds it, that is said. A quick run decides nothing."""
    if quick:
        return "a quick run"
    if row["wanted"] is None:
        return "–"
    if row["low"] >= row["wanted"]:
        return f"{row['wanted']}: reached"
    if row["value"] >= row["wanted"]:
        return f"{row['wanted']}: reached by the median, not by the interval"
    return f"{row['wanted']}: **missed**"


def overview(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table of all ratios."""
    rows = [
        [
            named(found), row["side"], row["against"],
            f"**{row['value']:.2f}** [{row['low']:.2f}, {row['high']:.2f}]", verdict(row, found["quick"]),
        ]
        for found in results
        for row in found["ratios"]
    ]  # fmt: skip
    return table(["comparison", "side", "against", "ratio of medians [95 %]", "wanted"], rows) if rows else []


def sides(found: Mapping[str, Any]) -> list[str]:
    """A result's sides: medians, spread, rounds, and how quiet the machine was."""
    rows = []
    for name, side in found["sides"].items():
        s, rounds = side["summary"], side["rounds"]
        told = {k: v for k, v in side["notes"].items() if not isinstance(v, (list, dict))}
        rows.append([
            name, f"**{number(s['median'])}**", f"{number(s['first_quartile'])} – {number(s['third_quartile'])}",
            f"{number(s['min'])} – {number(s['max'])}", str(len(rounds)),
            f"{min(r['seconds'] for r in rounds):.0f} – {max(r['seconds'] for r in rounds):.0f}",
            f"{max(r['load_after'] for r in rounds):.1f}", f"{max(r['idle_cpu_seconds'] for r in rounds):.1f}",
            ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in told.items()) or "–",
        ])  # fmt: skip
    head = [
        "side", f"{found['unit']} a second, median", "quartiles", "range", "rounds", "seconds a round", "most load",
        "most idle CPU, s", "notes",
    ]  # fmt: skip
    return table(head, rows)


def facts(found: Mapping[str, Any]) -> list[str]:
    """What else a result holds: shares of ceilings, agreement of the two sides, samples for an equal error."""
    said = []
    if "ceiling" in found:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["ceiling"]["share"].items())
        most = found["ceiling"]["flops_a_second"] / 1e9
        said.append(f"Share of the matrix-product ceiling ({number(most)} GFLOP/s in the same run): {shares}.")
    if found.get("largest_difference") is not None:
        said.append(f"Probabilities of the two sides differ by at most {found['largest_difference']:.1e}.")
    if "samples_for_equal_error" in found:
        n = found["samples_for_equal_error"]
        said.append(
            f"Sampled answers: {found['samples']} a question. For a mean over questions whose standard error is within"
            f" {100 * (n['within'] - 1):.0f} % of the exact reading's, {number(n['median'])} would be needed (median"
            f" over candidates; quartiles {number(n['first_quartile'])} – {number(n['third_quartile'])})."
        )
    if "mfu" in found:
        most = found["ceilings"]["flops_a_second"] / 1e9
        said.append(f"Ceiling: {number(most)} GFLOP/s. Counted: {found['counted']}.")
        said += [
            f"Training, {kind}: {number(m['rows_a_second'])} rows/s at {number(m['flops_a_row'] / 1e9)} GFLOP a row,"
            f" MFU **{100 * m['share']:.0f} %**."
            for kind, m in found["mfu"].items()
        ]
    if "mbu" in found:
        said.append(f"Ceiling: {number(found['ceilings']['bytes_a_second'] / 1e9)} GB/s.")
        said += [
            f"Decoding, batch {batch}: {number(m['steps_a_second'])} steps/s at {number(m['bytes_a_step'] / 1e9)} GB a"
            f" step, MBU **{100 * m['share']:.0f} %**."
            for batch, m in found["mbu"].items()
        ]
    return ["", *(f"- {line}" for line in said)] if said else []


def within(found: Mapping[str, Any]) -> str:
    """Whether a `ratio` is at most what is `wanted_within`."""
    said = "within" if found["ratio"] <= found["wanted_within"] else "**not within**"
    return f"{said} {found['wanted_within']}"


def growth(found: Mapping[str, Any]) -> list[str]:
    """Exponents by axis, every point, and compile time by depth."""
    depth = found["compile_by_depth"]
    base = ", ".join(f"{name} {value}" for name, value in found["settings"]["base"].items())
    fits = [[axis, f"{e['step']:.2f}", f"{e['compile']:.2f}"] for axis, e in found["exponents"].items()]
    points = [
        [*(str(p[name]) for name in found["settings"]["base"]), number(1e3 * p["step"]["median"]),
         number(p["compile"]["median"])]
        for p in found["points"]
    ]  # fmt: skip
    return [
        "", f"One axis moved at a time from {base}; tiny random Llamas, trained in full. Compiling {depth['layers'][1]}"
        f" layers took {depth['ratio']:.2f} times what {depth['layers'][0]} took, {within(depth)}.",
        *table(["axis", "exponent of step time", "exponent of compile time"], fits),
        *table([*found["settings"]["base"], "step, ms", "trace and compile, s"], points),
    ]  # fmt: skip


# ---- plots ----


def rates_plot(found: Mapping[str, Any], name: str) -> svg.Plot:
    """Rates by side: a point a round, the median with its quartiles. Ceilings have units of their own and stay out."""
    shown = {n: s for n, s in found["sides"].items() if not n.startswith("ceiling")}
    lines = [
        plots.Line(
            side, "orange" if side.startswith("subjax") else "blue", [row["rate"] for row in value["rounds"]],
            (value["summary"]["median"], value["summary"]["first_quartile"], value["summary"]["third_quartile"]),
            note=number(value["summary"]["median"]),
        )
        for side, value in shown.items()
    ]  # fmt: skip
    figure = svg.draw(name, lambda: plots.dot_plot(lines, f"{found['unit']} a second", None, ""))
    told = "; ".join(f"{line.label}: {line.note}" for line in lines)
    return svg.Plot(name, named(found), "", f"{named(found)}: {told} {found['unit']} a second", figure)


def growth_plot(found: Mapping[str, Any], name: str) -> svg.Plot:
    """Step and compile time over each axis's size relative to its least, on logarithmic axes."""

    def paint() -> Any:
        figure = plots.new_figure(2 * svg.WIDTH, 3.2)
        both = figure.subplots(1, 2)
        base = found["settings"]["base"]
        for axes, what in zip(both, ("step", "compile"), strict=True):
            for axis, colour in zip(found["exponents"], style.SERIES, strict=False):
                line = sorted(
                    (p for p in found["points"] if all(p[n] == base[n] for n in base if n != axis)),
                    key=lambda p: p[axis],
                )
                sizes = [p[axis] / line[0][axis] for p in line]
                times = [p[what]["median"] for p in line]
                axes.loglog(sizes, times, "o-", color=style.light(colour), label=axis, markersize=4)
            axes.set_xlabel("size, times the least")
            axes.set_title({"step": "a step, s", "compile": "tracing and compiling, s"}[what])
            axes.grid(visible=True)
        both[0].legend()
        return figure

    return svg.Plot(name, "Growth", "", "Step and compile time against size, by axis", svg.draw(name, paint))


# ---- the page ----


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The results of a folder in the page's order; files of other kinds are passed over."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    kept = [result for result in found if result.get("comparison") in ORDER]
    return sorted(kept, key=lambda r: (r["device"] != "cpu", ORDER.index(r["comparison"]), r["size"]))


def missing(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Commands of the comparisons, and parts of comparisons, of which there is no result on a CPU."""
    there = {(result["comparison"], result.get("part")) for result in results if result["device"] == "cpu"}
    commands = []
    for name in ORDER:
        parts = getattr(importlib.import_module(f"benchmarks.{name}"), "PARTS", [None])
        command = f"python -m benchmarks.{name}"
        if not any((name, part) in there for part in parts):
            commands.append(command)
        else:
            commands += [f"{command} --part={part}" for part in parts if (name, part) not in there]
    return commands


def trials(folder: pathlib.Path) -> list[str]:
    """What was tried outside of whole comparisons, as it was written down."""
    lines: list[str] = []
    for path in sorted(folder.glob("*-trials.json")):
        told = json.loads(path.read_text())
        lines += ["", "## Trials", "", told["trials"]]
        lines += table(
            ["what", "found", "wanted"], [[row["what"], row["found"], row["wanted"]] for row in told["rows"]]
        )
    return lines


def depths(folder: pathlib.Path) -> list[str]:
    """Compile time by depth and topology, as `benchmarks/compile_depth.py` wrote it."""
    path = folder / "compile_depth.json"
    if not path.exists():
        return []
    lines = [
        "", "## Compiling by depth", "", "A full fine-tune's step, layers scanned: tracing and compiling, median and"
        " range of the rounds; the program's lines before the compiler and after it.", "",
    ]  # fmt: skip
    rows = []
    for topology, told in json.loads(path.read_text()).items():
        wall = told["seconds"]["wall"]
        few, more = list(told["lines"])[:2]
        lines.append(
            f"- {topology} ({told['compiler']}, {told['date']}): {more} layers took {wall['ratio']:.2f} times what"
            f" {few} took, {within(told | wall)}."
        )
        for depth, text in told["lines"].items():
            took = wall[depth]
            spread = f"{took['least']:.1f} – {took['most']:.1f}"
            rows.append(
                [topology, depth, f"{took['median']:.1f}", spread, number(text["lowered"]), number(text["compiled"])]
            )
    return lines + table(["topology", "layers", "seconds, median", "range", "lines before", "lines after"], rows)


def section(found: Mapping[str, Any], docs: pathlib.Path) -> list[str]:
    """A result's part of the page; its plot is written beside."""
    name = f"performance-{svg.slug(named(found))}"
    plot = growth_plot(found, name) if "points" in found else None
    if plot is None and found["comparison"] in COMPARISONS:
        plot = rates_plot(found, name)
    lines = ["", f"## {named(found)}", ""]
    if found["quick"]:
        lines += ["**A quick run: no figure here counts.**", ""]
    if found["comparison"] in COMPARISONS:
        lines.append(COMPARISONS[found["comparison"]][1].format(**found["settings"]))
    if plot is not None:
        svg.save_png(plot, docs / f"{name}.png", dpi=160)
        lines += ["", f'<img src="{name}.png" width="{880 if plot.wide else 460}" alt="{plot.alt}">']
    lines += growth(found) if "points" in found else [*sides(found), *facts(found)]
    machine, packages = found["machine"], ", ".join(f"{k} {v}" for k, v in found["packages"].items())
    on = machine["gpu"] if found["device"] == "gpu" else machine["cpu"]
    lines += ["", f"{found['date']}, {on}, {machine['cores']} cores, {machine['memory_gib']} GiB; {packages}."]
    return lines


_HEAD = """# Performance

Written by `python -m benchmarks.document` from `benchmarks/results/*.json`; `make bench` measures everything anew.

How it is measured: both sides of a comparison live through the whole run, each in a process of its own that waits,
idle, while the other works; rounds alternate, and every other round goes the other way about. Compiling, the choice of
batch sizes and one round of warming up are not counted. A figure is the median over rounds; a ratio is of medians, with
a 95 % bootstrap interval over rounds. The load average at a round's end, and the CPU time of waiting sides in it, stand
beside: on two cores a load well above 2, or idle CPU beyond a fraction of a second, is a disturbed round."""


def write(results: pathlib.Path = RESULTS, docs: pathlib.Path = DOCS) -> pathlib.Path:
    """Write the page and its plots; returns the page."""
    docs.mkdir(parents=True, exist_ok=True)
    found = load(results)
    lines = [_HEAD, *overview(found)]
    lines += [f"\nNot measured yet: `{command}`." for command in missing(found)]
    if all(result["device"] == "cpu" for result in found):
        lines.append(
            "\nOn a GPU nothing has been run yet. The same commands run there (`--device=gpu --size=0.5B|1.5B|8B`,"
            " bfloat16)."
        )
    for result in found:
        lines += section(result, docs)
    lines += [*depths(results), *trials(results)]
    page = docs / "performance.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.document", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of results")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder of the page")
    asked = parser.parse_args()
    print(write(asked.results, asked.docs))


if __name__ == "__main__":
    main()
