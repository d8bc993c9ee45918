"""Chats as rows of tokens: prompts padded on the left, completions on the right, and which tokens count."""

from collections.abc import Iterable, Sequence

import numpy as np

from subjax.data.packing import Batch
from subjax.errors import UsageError


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int, multiple: int = 1) -> np.ndarray:
    """Prompts padded on the left to the longest, rounded up to a multiple: (rows, length), int32."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    out = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in enumerate(prompts):
        out[row, width - len(prompt) :] = prompt
    return out


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, room: int) -> tuple[Batch, int]:
    """(arrays, completion length) of (prompt, completion) rows, for losses on the last tokens of each row.

    Arrays: `tokens` (rows, length) and `valid` (rows, length), false at padding on either side. `room` is the model's
    context, in tokens.

    Raises:
        UsageError: a row is longer than the model's context.
    """
    longest = max(range(len(rows)), key=lambda at: len(rows[at][0]) + len(rows[at][1]))
    if (tokens_of_longest := sum(map(len, rows[longest]))) > room:
        raise UsageError(
            f"row {longest + 1} takes {tokens_of_longest} tokens and the model {room}; shorten it or leave it out"
        )
    prompt, completion = (max(len(row[side]) for row in rows) for side in (0, 1))
    tokens = np.full((len(rows), prompt + completion), pad, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for at, (before, after) in enumerate(rows):
        first, last = prompt - len(before), prompt + len(after)
        tokens[at, first:prompt], tokens[at, prompt:last] = before, after
        valid[at, first:last] = True
    return {"tokens": tokens, "valid": valid}, completion


def unused(rows: Iterable[Sequence[int]], size: int, taken: Iterable[int]) -> int:
    """The smallest id that stands in none of the rows and is not taken: what padding can be told by."""
    seen = {int(id) for row in rows for id in row} | set(taken)
    return next(id for id in range(size + 1) if id not in seen)
