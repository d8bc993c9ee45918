"""From rows to batches: an addressed order, and the streams that walk it.

One order function serves the arrays in memory and the grain loader for corpora larger than memory, so both give the
same batches. Nothing is consumed: batch `step` is a function of (seed, step), so a resumed run takes the same steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain.python as grain
import numpy as np
from absl import flags
from jaxtyping import Int

from subjax.data.addressing import order, permutation

Batch = dict[str, np.ndarray]
Stream = Callable[[int], Batch]


@runtime_checkable
class Shaped(Protocol):
    """A stream whose batches have one of several shapes."""

    def together(self, steps: range) -> list[Batch]:
        """The batches of several steps, all of one shape."""


def together(stream: Stream, steps: range, first: Batch | None = None) -> list[Batch]:
    """The batches of several steps, all of one shape; `first` is the first step's, where it is there already."""
    if isinstance(stream, Shaped):
        return stream.together(steps)
    return [first if first is not None and step == steps[0] else stream(step) for step in steps]


def tokens_of(batch: Batch, member: int | None = None) -> Int[np.ndarray, " members"]:
    """Tokens of a batch that are no padding; of packed chats, what they begin with counts once a packed row.

    `member` is the axis of a cohort's members, each of which is counted by itself; one count where there is none.
    """
    counted = [batch["valid"]] if "valid" in batch else [batch["segments"] == 0, batch["lengths"]]
    by_member = [np.moveaxis(a, member, 0) if member is not None else a[None] for a in counted]
    return np.sum([a.reshape(len(a), -1).sum(1, dtype=np.int64) for a in by_member], axis=0)


def in_memory(arrays: Mapping[str, np.ndarray], *, seed: int, batch: int) -> Stream:
    """Stream over arrays that share their first axis (rows): step -> the rows that `order` names."""
    rows = len(next(iter(arrays.values())))

    def stream(step: int) -> Batch:
        picked = order(seed, rows, batch, step)
        return {name: array[picked] for name, array in arrays.items()}

    return stream


class _Addressed(grain.RandomAccessDataSource):
    """The concatenated, permuted epochs of a source, as one long random-access source."""

    def __init__(self, source: Sequence[Mapping[str, Any]], seed: int, batch: int, steps: int):
        self._source, self._seed, self._length = source, seed, steps * batch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        rows = len(self._source)
        return self._source[int(permutation(self._seed, rows, index // rows)[index % rows])]


def from_source(
    source: Sequence[Mapping[str, Any]], *, seed: int, batch: int, steps: int, first: int = 0, workers: int = 0
) -> Iterator[Batch]:
    """Batches `first` … `steps` - 1 of a random-access source of rows, through grain; the same as `in_memory`'s."""
    data = grain.MapDataset.source(_Addressed(source, seed, batch, steps))
    # Batched before it is handed out: workers take turns by element, and an element must be a whole batch.
    batches = data[first * batch :].batch(batch, drop_remainder=True).to_iter_dataset()
    if workers:
        # grain asks absl for a flag, and absl refuses to answer where no absl command line was ever read.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    yield from batches
