"""Chats packed into long rows: what they all begin with stands once, then each chat's own tokens, without padding.

A step's chats are dealt to packed rows of about equal length. What a chat's tokens see is what they would see alone:
the shared beginning and the chat's own tokens before them. So packing changes nothing but rounding, and neither the
number of packed rows nor their length is part of a node's identity.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subjax.data.addressing import order
from subjax.data.packing import Batch
from subjax.errors import UsageError

Chat = tuple[Sequence[int], Sequence[int]]  # a prompt's token ids, and its answer's
Lines = tuple[tuple[int, int], ...]  # a packed row's chats in groups: how many, and the places each of them is given
LENGTHS = 4  # of packed rows in a run, at most: each is compiled by itself
GROUPS = 3  # of lines, at most: each is compiled and called by itself


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of packed rows, which decides a compiled step.

    Attributes:
        prefix: tokens that every chat begins with; they stand once, at the beginning of each packed row.
        lines: the chats of a packed row, which stand in falling order of their lengths behind the prefix.
        turns: the groups of packed rows that go through the model one after another in a step.
        rows: packed rows a turn, split over the devices.
    """

    prefix: int
    lines: Lines
    turns: int
    rows: int


@dataclasses.dataclass(frozen=True)
class _Room:
    """What the packed rows of one step need, or have: tokens behind the prefix, tokens with a loss, and of each chat
    its own tokens, in falling order.
    """

    length: int
    targets: int
    chats: tuple[int, ...]

    def with_(self, other: "_Room") -> "_Room":
        chats = itertools.zip_longest(self.chats, other.chats, fillvalue=0)
        return _Room(max(self.length, other.length), max(self.targets, other.targets), tuple(map(max, chats)))


def grouped(lengths: Sequence[int], prefix: int, groups: int = GROUPS) -> Lines:
    """Chats of these lengths (falling), in groups whose attention has least to compute; few where it makes no odds.

    Each chat of a group is given the places of its longest; a place sees the prefix and all places of its chat.
    """

    def with_last(before: tuple[int, Lines], first: int, end: int) -> tuple[int, Lines]:
        count, places = end - first, lengths[first]
        return before[0] + count * places * (prefix + places), (*before[1], (count, places))

    # best[end]: the least that the chats before `end` cost, and how they are grouped for that.
    ends = range(1, len(lengths) + 1)
    best: list[tuple[int, Lines]] = [(0, ()), *(with_last((0, ()), 0, end) for end in ends)]
    for _ in range(groups - 1):
        ways = [[best[end], *(with_last(best[first], first, end) for first in range(1, end))] for end in ends]
        best = [best[0], *(min(way, key=lambda found: (found[0], len(found[1]))) for way in ways)]
    return best[-1][1]


def common_prefix(chats: Sequence[Chat]) -> int:
    """Tokens with which all prompts begin; every prompt keeps one token of its own at least."""
    shortest, first = min(len(prompt) for prompt, _ in chats), chats[0][0]
    for place in range(shortest - 1):
        if any(prompt[place] != first[place] for prompt, _ in chats):
            return place
    return shortest - 1


def check_lengths(chats: Sequence[Chat], context: int | None = None) -> list[int]:
    """Tokens of each chat.

    Args:
        context: the longest chat that the model takes.

    Raises:
        UsageError: a chat is longer than that, or has an empty prompt.
    """
    totals = [len(prompt) + len(answer) for prompt, answer in chats]
    longest = max(range(len(chats)), key=totals.__getitem__)
    if context is not None and totals[longest] > context:
        raise UsageError(
            f"row {longest + 1} takes {totals[longest]} tokens and the model {context}; shorten it or leave it out"
        )
    if any(not prompt for prompt, _ in chats):
        raise UsageError("a row has an empty prompt, so nothing stands before its answer's first token")
    return totals


class PackedChats:
    """A stream of steps: the chats that an addressed order names, packed.

    Calling it with a step gives a batch of arrays; (turns, rows) are the layout's, `length` is that of packed rows:
        tokens, segments, positions (turns, rows, length): ids; the chat a token is of, from 1 on (0 at the prefix, and
        `chats` + 1 at padding behind the last); its place in its chat.
        starts (turns, rows, chats): where each chat's own tokens begin. lengths: how many they are, 0 where there is no
        chat.
        at, targets, weights (turns, rows, targets): the tokens that are asked for a next one, which one it is, and its
        share of the step's loss: one over the number of answers' tokens in the step, or 0 at padding.
    """

    def __init__(
        self,
        chats: Sequence[Chat],
        *,
        seed: int,
        batch: int,
        steps: int,
        rows: int = 1,
        turns: int = 1,
        share_prefix: bool = True,
        grain: int = 8,
        context: int | None = None,
        prefix: int | None = None,
    ):
        """Deal the chats of all steps to packed rows.

        Args:
            chats: prompts and answers. seed: of the order. batch: chats a step. steps: of the whole run.
            rows: packed rows a turn. turns: groups of rows that go through the model in turn.
            share_prefix: whether what all chats begin with stands once (an attention kernel may not be able to).
            grain: packed rows' length is a multiple of this.
            context: the longest chat that the model takes.
            prefix: how much of what they begin with stands once; None is all of it.

        Raises:
            UsageError: a chat is longer than the model's context, or has an empty prompt.
        """
        totals = check_lengths(chats, context)
        self.chats, self._seed, self._batch = chats, seed, batch
        if prefix is None:
            prefix = common_prefix(chats) if share_prefix else 0
        self._own = np.array(totals) - prefix
        self._answers = np.array([len(answer) for _, answer in chats])
        self._grain, self._rows = grain, turns * rows
        needs = [self._need(self._dealt(step)) for step in range(steps)]
        most = functools.reduce(_Room.with_, needs)
        self._settle(most, min(need.length for need in needs), Layout(prefix, grouped(most.chats, prefix), turns, rows))

    def _settle(self, most: _Room, least: int, layout: Layout) -> None:
        """What the steps need at most, how long the shortest step's packed rows are, and the layout for that."""
        self._most, self._least, self.layout = most, least, layout

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        return self.together(range(step, step + 1))[0]

    def together(self, steps: range) -> list[Batch]:
        """The batches of several steps, all of one shape."""
        dealt = [self._dealt(step) for step in steps]
        room = self._rounded(functools.reduce(_Room.with_, map(self._need, dealt)))
        return [self._filled(rows, room) for rows in dealt]

    def largest(self) -> Batch:
        """The first step's chats in the largest shape that any step has."""
        return self._filled(self._dealt(0), self._rounded(self._most))

    def _dealt(self, step: int) -> list[list[int]]:
        """The chats of each packed row of a step: the longest first, each to the row that is shortest so far."""
        picked = order(self._seed, len(self.chats), self._batch, step)
        heap = [(0, row) for row in range(self._rows)]
        rows: list[list[int]] = [[] for _ in heap]
        for index in sorted(picked.tolist(), key=lambda i: -self._own[i]):
            filled, row = heap[0]
            rows[row].append(index)
            heapq.heapreplace(heap, (filled + int(self._own[index]), row))
        return rows

    def _need(self, rows: list[list[int]]) -> _Room:
        chats = itertools.zip_longest(*(self._own[row].tolist() for row in rows), fillvalue=0)
        return _Room(
            max(int(self._own[row].sum()) for row in rows if row),
            max(int(self._answers[row].sum()) for row in rows if row),
            tuple(map(max, chats)),
        )

    def _rounded(self, need: _Room) -> _Room:
        """Room for a need: one of a few lengths between the shortest and the longest, the rest as the longest has it.

        Each length is compiled by itself, and what is left of it is padding.
        """
        whole, prefix = need.with_(self._most), self.layout.prefix
        longest = -(-(whole.length + prefix) // self._grain) * self._grain
        step = max(1, -(-(whole.length - self._least) // ((LENGTHS - 1) * self._grain))) * self._grain
        return _Room(
            longest - (longest - need.length - prefix) // step * step - prefix,
            -(-whole.targets // 16) * 16,
            whole.chats,
        )

    def _filled(self, rows: list[list[int]], room: _Room) -> Batch:
        count, prefix, chats = len(rows), self.layout.prefix, len(room.chats)
        tokens, positions = (np.zeros((count, prefix + room.length), np.int32) for _ in range(2))
        segments = np.full(tokens.shape, chats + 1, np.int32)
        starts, lengths = (np.zeros((count, chats), np.int32) for _ in range(2))
        at, targets = (np.zeros((count, room.targets), np.int32) for _ in range(2))
        weights = np.zeros(at.shape, np.float32)
        share = 1.0 / sum(int(self._answers[row].sum()) for row in rows)
        tokens[:, :prefix] = self.chats[0][0][:prefix]
        positions[:, :prefix], segments[:, :prefix] = np.arange(prefix), 0
        for row, members in enumerate(rows):
            place, asked = prefix, 0
            for segment, index in enumerate(members):
                prompt, answer = self.chats[index]
                own = [*prompt[prefix:], *answer]
                beyond = place + len(own)
                tokens[row, place:beyond], segments[row, place:beyond] = own, segment + 1
                positions[row, place:beyond] = prefix + np.arange(len(own))
                starts[row, segment], lengths[row, segment] = place, len(own)
                some = slice(asked, asked + len(answer))
                at[row, some] = np.arange(beyond - len(answer), beyond) - 1
                targets[row, some], weights[row, some] = answer, share
                place, asked = beyond, asked + len(answer)
        batch = {
            "tokens": tokens, "segments": segments, "positions": positions, "starts": starts, "lengths": lengths,
            "at": at, "targets": targets, "weights": weights,
        }  # fmt: skip
        turns = (self.layout.turns, self.layout.rows)
        return {name: array.reshape(*turns, *array.shape[1:]) for name, array in batch.items()}


class PackedCohort:
    """The streams of a cohort's members as one: arrays as `PackedChats` gives them, (turns, members, rows, ...).

    All members have one layout and, step by step, packed rows of one length.
    """

    def __init__(self, members: Sequence[Mapping[str, Any]], **shared: Any):
        """Pack each member's chats: `members` hold what `PackedChats` takes of each, `shared` what it takes of all."""
        every = [chat for member in members for chat in member["chats"]]
        prefix = common_prefix(every) if shared.get("share_prefix", True) else 0
        self._members = [PackedChats(**member, **shared, prefix=prefix) for member in members]
        most = functools.reduce(_Room.with_, (member._most for member in self._members))
        least = min(member._least for member in self._members)
        self.layout = dataclasses.replace(self._members[0].layout, lines=grouped(most.chats, prefix))
        for member in self._members:
            member._settle(most, least, self.layout)

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        return self.together(range(step, step + 1))[0]

    def together(self, steps: range) -> list[Batch]:
        """The batches of several steps, all of one shape."""
        dealt = [[member._dealt(step) for step in steps] for member in self._members]
        need = functools.reduce(
            _Room.with_, (m._need(rows) for m, of in zip(self._members, dealt, strict=True) for rows in of)
        )
        room = self._members[0]._rounded(need)
        return [
            _stacked([m._filled(of[index], room) for m, of in zip(self._members, dealt, strict=True)])
            for index in range(len(steps))
        ]

    def largest(self) -> Batch:
        """The first step's chats in the largest shape that any step has."""
        return _stacked([member.largest() for member in self._members])


def _stacked(each: Sequence[Batch]) -> Batch:
    """The members' batches with the members' axis behind the turns."""
    return {name: np.stack([batch[name] for batch in each], axis=1) for name in each[0]}
