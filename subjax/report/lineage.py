"""Where each number comes from: the nodes of a summary, and for each node its inputs, up to the bases."""

from typing import Any

from subjax.report import words

_DEEPEST = 12  # a lineage is five kinds deep; more than this is a loop in broken results


_INTRO = (
    '<p class="note">Every summary names the nodes that it was read from; every node names its inputs. '
    "<code>subjax show NODE</code> prints a node's card, <code>subjax verify NODE</code> checks it.</p>"
)


def _named(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything in the results that names nodes: the summaries of any kind of study, then the headline's rows."""
    parts = (results, words.mapping(results.get("images")), words.mapping(results.get("readings")))
    summaries = [summary for part in parts for summary in words.records(part.get("summaries"))]
    return summaries + words.records(words.mapping(results.get("headline")).get("rows"))


def nodes_of(record: dict[str, Any]) -> tuple[str, ...]:
    """The ids of the nodes that a record names."""
    return tuple(map(words.clean, record.get("nodes") or ()))


def node_sets(results: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """From each set of nodes that the results name to the anchor where the page lists it."""
    found = dict.fromkeys(nodes for record in _named(results) if (nodes := nodes_of(record)))
    return {nodes: f"set-{index}" for index, nodes in enumerate(found)}


def _titles(results: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """What the summaries of one set of nodes are about: arm, families, replay, and the traits that share the set."""
    about: dict[tuple[str, ...], list[str]] = {}
    for s in _named(results):
        m = f"m = {words.count(s['auxiliary'])}" if "auxiliary" in s else None
        replay = f"replay = {s['replay']}" if s.get("replay") else None
        cell = words.cell_label(s) if "arm" in s else None
        parts = (
            s.get("label"),
            m,
            cell,
            replay,
            s.get("trait"),
            s.get("pairing") if m else None,
            s.get("logits"),
            s.get("loss"),
        )
        title = ", ".join(words.clean(part) for part in parts if part)
        titles = about.setdefault(nodes_of(s), [])
        if title not in titles and not ("label" in s and titles):
            titles.append(title)
    return {nodes: "; ".join(titles) for nodes, titles in about.items()}


def link(record: dict[str, Any], anchors: dict[tuple[str, ...], str], text: str = "") -> str:
    """A link to the list of a record's nodes, worded `3 nodes` or as `text`; without nodes the text, or a dash."""
    nodes = nodes_of(record)
    if nodes not in anchors:
        return words.escape(text or words.NONE)
    named = text or f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    return f'<a href="#{anchors[nodes]}">{words.escape(named)}</a>'


def anchor(node: str) -> str:
    """The page's anchor of a node; ids are hex digits, anything else is made harmless."""
    return "node-" + "".join(c if c.isalnum() else "-" for c in words.clean(node))


def section(results: dict[str, Any]) -> str:
    """One closed list for each set of nodes, then one tree for each node that a summary names."""
    sets, known, titles = node_sets(results), words.mapping(results.get("lineage")), _titles(results)
    if not sets:
        return ""
    lists = []
    for nodes, name in sets.items():
        items = "".join(f'<div class="leaf">{_link(node, known)}</div>' for node in nodes)
        lists.append(f'<details id="{name}"><summary>{words.escape(titles[nodes])}</summary>{items}</details>')
    roots = dict.fromkeys(node for nodes in sets for node in nodes)
    trees = "\n".join(tree(node, known) for node in roots)
    # Two closed lists: a study has hundreds of nodes. A link into one opens it (the page's script, or the browser).
    return (
        f'{_INTRO}<div class="tree">\n<details><summary>The nodes behind each summary: {len(sets)} lists</summary>\n'
        f"{chr(10).join(lists)}\n</details>\n<details><summary>Each node and what it was made from: "
        f"{len(roots)} trees</summary>\n{trees}\n</details>\n</div>"
    )


def _link(node: str, known: dict[str, Any]) -> str:
    label = words.mapping(known.get(node)).get("label") or node
    return f'<a href="#{anchor(node)}">{words.escape(label)}</a> <code>{words.escape(node)}</code>'


def tree(node: str, known: dict[str, Any], role: str = "", depth: int = 0) -> str:
    """A node and, nested in it, the nodes that it was made from."""
    record = words.mapping(known.get(node))
    kind, label = words.escape(record.get("kind") or "node"), words.escape(record.get("label") or "not in the lineage")
    digest = words.escape(words.clean(record.get("digest"))[:12])
    name = f"{words.escape(role)}: " if role else ""
    line = f"{name}{kind} <b>{label}</b> <code>{words.escape(node)}</code>"
    line += f" <code>digest {digest}…</code>" if digest else ""
    inputs = words.mapping(record.get("inputs"))
    mark = "" if depth else f' id="{anchor(node)}"'
    if depth and (not inputs or depth >= _DEEPEST):
        return f'<div class="leaf">{line}</div>'
    inner = "".join(tree(words.clean(given), known, str(part), depth + 1) for part, given in inputs.items())
    return f"<details{mark}><summary>{line}</summary>{inner}</details>"
