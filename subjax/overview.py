"""A plan in words: what `subjax plan` prints before anything runs, and what `subjax status` says afterwards."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from subjax import config, schema
from subjax.graph import Node, Plan
from subjax.results import smallest_lift
from subjax.results_rows import family_of, trials
from subjax.store import Store

_UNITS = (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def quantity(value: float) -> str:
    """A count with three figures and a unit prefix: 12,300,000 is "12.3 M"."""
    for prefix, size in _UNITS:
        if value >= 0.9995 * size:  # what three figures round to a whole unit
            return f"{value / size:.3g} {prefix}"
    return f"{value:.0f} "


def _uses(plan: Plan) -> Counter[str]:
    """How many arms at points of the sweep need each node, itself and through its users."""
    counts: Counter[str] = Counter()
    for cell in plan.study["cells"]:
        pending, seen = [id for id in cell["nodes"].values() if id], set()
        while pending:
            id = pending.pop()
            if id not in seen:
                seen.add(id)
                pending += plan.nodes[id].inputs.values()
        counts.update(seen)
    return counts


def describe(plan: Plan, store: Store) -> str:
    """The graph before it runs: nodes by kind, what is shared and done, tokens and FLOPs to do, detectable lift."""
    done = {id for id, node in plan.nodes.items() if store.card(node.kind, id) is not None}
    uses = _uses(plan)
    lines = [
        f"{plan.study['name']}: {len(plan.study['points'])} points, {len(plan.study['cells'])} cells,"
        f" {len(plan.nodes)} nodes",
        "",
        f"{'kind':<12}{'nodes':>7}{'done':>7}{'to do':>7}{'cells a node':>14}{'tokens to do':>14}{'FLOPs to do':>13}",
    ]
    kinds = list(dict.fromkeys(node.kind for node in plan.nodes.values()))
    for kind in [*kinds, "all"]:
        nodes = [node for node in plan.nodes.values() if kind in ("all", node.kind)]
        todo = [node for node in nodes if node.id not in done]
        share = sum(uses[node.id] for node in nodes) / len(nodes)
        lines.append(
            f"{kind:<12}{len(nodes):>7}{len(nodes) - len(todo):>7}{len(todo):>7}"
            f"{'' if kind == 'all' else format(share, '.1f'):>14}"
            f"{quantity(sum(n.tokens for n in todo)):>14}{quantity(sum(n.flops for n in todo)):>13}"
        )
    lines += ["", *_arms(plan), *_cohorts(plan)]
    return "\n".join(lines)


def _cohorts(plan: Plan) -> list[str]:
    """Which students train together, and where."""
    found = Counter((hint["id"], hint["always"]) for node in plan.nodes.values() if (hint := node.hints.get("cohort")))
    lines = []
    for always in sorted({always for _, always in found}):
        sizes = [size for (_, joined), size in found.items() if joined == always]
        how = f"{sum(sizes)} students train in {len(sizes)} cohort{'s' if len(sizes) > 1 else ''} of up to {max(sizes)}"
        where = "" if always else " on a GPU or TPU; on CPU each by itself, in workers side by side"
        lines.append(f"{how}{where}")
    return lines


def _arms(plan: Plan) -> list[str]:
    """Cells by arm, and what the study's number of bases can detect."""
    if plan.study["kind"] == "images":
        return []
    arms = Counter((cell["arm"], cell["replay"]) for cell in plan.study["cells"])
    lines = ["cells by arm: " + ", ".join(f"{arm}{f' ({r})' if r else ''} {n}" for (arm, r), n in arms.items())]
    settings = config.from_dict(schema.Statistics, plan.study["statistics"])
    trial, pretrained = trials(plan.study), plan.study["kind"] == "pretrained"
    taught = {(family_of(c["teacher_base"]), *trial(c)) for c in plan.study["cells"] if c["teacher_base"]}
    for (family, unit), count in sorted(Counter((family, unit) for family, _, unit in taught).items()):
        lines.append(f"{family}: {smallest_lift(count, settings, unit=unit, in_sds=pretrained)[1]}")
    return lines + plan.study.get("notes", [])


def status(plan: Plan, store: Store) -> str:
    """What of a plan is done, running (by whom) and failed (why)."""
    nodes = list(plan.nodes.values())
    done = [node for node in nodes if store.card(node.kind, node.id) is not None]
    known = {node.id for node in done}
    running = [(node, owner) for node in nodes if node.id not in known and (owner := store.owner(node.kind, node.id))]
    busy = {node.id for node, _ in running}
    failed = [
        (node, failure)
        for node in nodes
        if node.id not in known | busy and (failure := store.failure(node.kind, node.id))
    ]
    lines = [
        f"{plan.study['name']}: {len(done)} of {len(nodes)} nodes done, {len(running)} running, {len(failed)} failed",
        *_by_kind(nodes, known),
    ]
    for node, owner in running:
        lines.append(f"running  {node.label} ({node.id}) by {owner}")
    for node, failure in failed:
        lines.append(f"failed   {node.label} ({node.id}): {_message(failure)}")
    return "\n".join(lines)


def _by_kind(nodes: list[Node], known: set[str]) -> list[str]:
    kinds = Counter(node.kind for node in nodes)
    done = Counter(node.kind for node in nodes if node.id in known)
    return [f"  {kind:<12}{done[kind]:>5} of {count}" for kind, count in kinds.items()]


def _message(failure: Mapping[str, Any]) -> str:
    return str(failure.get("message", "no reason was kept"))
