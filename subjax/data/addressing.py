"""Addressed randomness for data: a draw is named by (seed, role, index), never taken from a shared stream."""

import functools
import hashlib
import json
import math

import numpy as np


def generator(seed: int, role: str, *index: int) -> np.random.Generator:
    """A numpy generator addressed by (seed, role, index…): the same wherever and whenever it is asked for."""
    # The role's length keeps it apart from the index, so that no two addresses spell the same list.
    address = [seed, len(role.encode()), *role.encode(), *index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(address)))


@functools.lru_cache(maxsize=8)
def permutation(seed: int, rows: int, epoch: int) -> np.ndarray:
    """Row numbers of one epoch in its order, (rows,)."""
    return generator(seed, "order", epoch).permutation(rows)


def order(seed: int, rows: int, batch: int, step: int) -> np.ndarray:
    """Row numbers of batch `step`, (batch,): epochs of fresh permutations laid end to end, cut every `batch` rows."""
    first = step * batch
    flat = np.arange(first, first + batch)
    epochs = range(first // rows, (first + batch - 1) // rows + 1)
    pieces = [permutation(seed, rows, e)[flat[flat // rows == e] % rows] for e in epochs]
    return np.concatenate(pieces)


def steps_of(epochs: float, rows: int, batch: int) -> int:
    """Optimizer steps of so many passes over so many rows: the last one may go beyond them, into one more pass."""
    return max(1, math.ceil(epochs * rows / batch))


def derive_seed(seed: int, *names: object) -> int:
    """A seed below 2**31 for a use that `names` name, so that two uses of one setting never share their draws."""
    return int(hashlib.sha256(json.dumps([seed, *names]).encode()).hexdigest()[:8], 16) % 2**31
