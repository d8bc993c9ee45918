"""Which node next: pure bookkeeping over a plan, for the executor."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subjax.graph import Node

BATCH = 4  # most nodes handed to a worker at once


class Schedule:
    """Which node next: those whose inputs are there, the longest work below them first."""

    def __init__(
        self, nodes: "Mapping[str, Node]", done: Collection[str], cohorts: Mapping[str, str] = MappingProxyType({})
    ):
        self.nodes = nodes
        self.fellows: dict[str, list[str]] = {}  # members by cohort: they are handed out together, once all are ready
        self.cohorts = cohorts  # of those that are in one
        for id, cohort in cohorts.items():
            self.fellows.setdefault(cohort, []).append(id)
        todo = {id: node for id, node in nodes.items() if id not in done}
        self.missing = {id: {i for i in node.inputs.values() if i in todo} for id, node in todo.items()}
        self.users: dict[str, list[str]] = {id: [] for id in nodes}
        for id, inputs in self.missing.items():
            for needed in inputs:
                self.users[needed].append(id)
        self.rank: dict[str, float] = {}  # flops of the longest chain from the node downwards, itself included
        for id in reversed(list(nodes)):
            below = max((self.rank[user] for user in self.users[id]), default=0.0)
            self.rank[id] = below + max(nodes[id].flops, 1.0)
        self.ready = {id for id, inputs in self.missing.items() if not inputs}
        self.foreign: set[str] = set()  # another run is at them
        self.open = set(todo)  # neither there, failed nor skipped

    def take(self, mine: Collection[tuple[str, str]], others: Collection[tuple[str, str]], workers: int) -> list[str]:
        """Take a batch of one kind and group out of the ready nodes, for a worker that has compiled `mine`.

        Among the nodes of the longest chains, within a factor of two, one that needs no compilation is preferred, then
        one that no other worker has compiled. The batch shrinks as nodes run out, so that all workers have some.
        """
        order = sorted(filter(self._together, self.ready), key=lambda id: (-self.rank[id], id))
        if not order:
            return []
        near = [id for id in order if self.rank[id] >= self.rank[order[0]] / 2]
        pairs = {id: (self.nodes[id].kind, self.nodes[id].group) for id in order}
        first = max(near, key=lambda id: (pairs[id] in mine, pairs[id] not in others, self.rank[id]))
        if first in self.cohorts:
            batch = [id for id in self._members(first) if id in self.ready]
            self.ready.difference_update(batch)
            return batch
        alike = [id for id in order if pairs[id] == pairs[first] and id not in self.cohorts]
        batch = alike[: max(1, min(BATCH, len(alike) // (2 * max(1, workers))))]
        self.ready.difference_update(batch)
        return batch

    def _members(self, id: str) -> list[str]:
        """A node and its fellows that are still to be made, and not by another run."""
        return [m for m in self.fellows.get(self.cohorts.get(id, ""), [id]) if m in self.open and m not in self.foreign]

    def _together(self, id: str) -> bool:
        return all(member in self.ready for member in self._members(id))

    def there(self, id: str) -> None:
        """Note that a node is committed."""
        self.open.discard(id)
        self.foreign.discard(id)
        self.ready.discard(id)
        for user in self.users[id]:
            self.missing[user].discard(id)
            if not self.missing[user] and user in self.open:
                self.ready.add(user)

    def again(self, id: str) -> None:
        """Put a node back among the ready ones."""
        self.foreign.discard(id)
        self.ready.add(id)

    def give_up(self, id: str) -> list[str]:
        """Note that a node failed; give all that are skipped for it."""
        self.open.discard(id)
        below: list[str] = []
        for user in self.users[id]:
            if user in self.open:
                below += [user, *self.give_up(user)]
        return below
