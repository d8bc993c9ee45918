"""What all prompts begin with: read once, where it is worth a program of its own."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

WIDTH = 8  # a prefix is padded to a multiple of this: few shapes are compiled
SHARED = 16  # tokens that prompts must share for a prefix
LEAST = 4  # prompts that must share it


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with; none where they are too few to pay.

    No prompt is the prefix alone: its last token has to be read to draw the next one.
    """
    if len(prompts) < LEAST:
        return ()
    least, greatest = min(map(tuple, prompts)), max(map(tuple, prompts))  # what these two begin with, all others do
    same = [a == b for a, b in zip(least, greatest, strict=False)]
    shared = min([*same, False].index(False), min(map(len, prompts)) - 1)
    return tuple(least[:shared]) if shared >= SHARED else ()


def padded(prefix: Sequence[int], pad: int) -> tuple[Int[np.ndarray, " columns"], np.int32]:
    """A prefix's tokens, padded on the right, and their number: what `subjax.models.cached.prefix_of` takes."""
    tokens = np.full(-(-len(prefix) // WIDTH) * WIDTH, pad, np.int32)
    tokens[: len(prefix)] = prefix
    return tokens, np.int32(len(prefix))
