"""Which students train together: a function of the plan alone, never of what happens to be made already.

Students on one base, with adapters of one shape, as many steps and the same settings but for seeds, learning rate and
corpus, can be members of one program (`subjax.train.cohort`). How many is a matter of memory: what a member adds, its
tuned arrays and their moments, shall take no more than the weights that all of them share.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from subjax.store import digest_json

if TYPE_CHECKING:
    from subjax.graph import Node

MOST = 16  # members, where a study asks for none in particular
_LEAST_BYTES = 2**30  # what the members of a small model may take whatever its size
_MEMBER_BYTES = 12  # of each tuned scalar: its value and two moments in float32


@dataclasses.dataclass(frozen=True)
class Joining:
    """That a student may train in a cohort: of `most` members, on CPU too (`always`), all for as many `steps`."""

    most: int
    always: bool
    steps: int


def shape_of(node: "Node") -> str:
    """What a cohort's members have in common: their base, and every setting but seeds and learning rate."""
    config = {key: value for key, value in node.config.items() if not key.endswith("seed")}
    config["optimizer"] = {**config["optimizer"], "lr": None}
    return digest_json([node.kind, node.inputs["base"], config])[:12]


def room(weights: float, tuned: int, most: int) -> int:
    """Members of a cohort, at most.

    Args:
        weights: bytes of the weights that are shared. tuned: scalars that a member tunes. most: what is asked for; 0 is
            what memory allows, up to 16.
    """
    return max(1, min(most or MOST, int(max(weights, _LEAST_BYTES) // (_MEMBER_BYTES * max(tuned, 1)))))


def formed(nodes: "Mapping[str, Node]", joining: Mapping[str, Joining]) -> "dict[str, Node]":
    """The nodes, each student with the cohort it belongs to among its hints: {"id": of the cohort, "always": bool}.

    Args:
        joining: of those that may be in one, by id.
    """
    groups: dict[tuple[str, Joining], list[str]] = {}
    for id, asked in joining.items():
        if id in nodes and asked.most > 1:
            groups.setdefault((shape_of(nodes[id]), asked), []).append(id)
    found = dict(nodes)
    for (shape, asked), members in groups.items():
        # Of about equal size: fifteen and one would leave the last alone.
        count = -(-len(members) // asked.most)
        for place in range(count):
            part = members[place::count]
            hint: dict[str, Any] = {"id": digest_json([shape, part])[:12], "always": asked.always}
            for id in part if len(part) > 1 else ():
                node = nodes[id]
                found[id] = dataclasses.replace(node, hints={**node.hints, "cohort": hint})
    return found
