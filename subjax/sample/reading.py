"""How the sampler reads prompts: what all begin with, chunks of like length, and slots, in one lane or in several."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from subjax.sample.drawing import Sampling
from subjax.sample.prefixes import common_prefix
from subjax.threads import most_at_once

__all__ = ["Chunk", "Layout", "at_once", "lanes", "plan", "width_of"]

WIDTH = 8  # prompts are read, and held, in widths that are multiples of this: few shapes are compiled
READ = 4  # prompts are read at least so many at a time where there are as many: fewer do not fill a processor
CPU_READ = 8  # and on a CPU at most so many: more are no faster, and are padded to the longest of them
LANES = 2  # on a CPU: while one is at a part that fills one core, the other fills the rest; more wait for memory
LANE = 32  # a lane has at least so many slots: fewer rows in a product do not fill a processor


class Chunk(NamedTuple):
    """Prompts that are read together, and the rows that they are asked for.

    Attributes:
        prompts: their own parts, without the shared prefix.
        rows: of each row its number among the prompts given to `sample`.
        source: of each row its prompt's place in `prompts`.
    """

    prompts: list[tuple[int, ...]]
    rows: list[int]
    source: list[int]


class Layout(NamedTuple):
    """How prompts are read: the prefix of all, chunks of prompts, slots, rows put in at a time, prompts of a chunk, and
    a cache's columns for prompts.
    """

    prefix: tuple[int, ...]
    chunks: list[Chunk]
    slots: int
    group: int
    read: int
    columns: int


def _rounded(n: int, multiple: int, most: int) -> int:
    return min(-(-n // multiple) * multiple, most)


def plan(prompts: Sequence[tuple[int, ...]], sampling: Sampling, batch: int, ways: int, on_cpu: bool) -> Layout:
    """Lay out prompts (token ids without padding) for `batch` rows at a time on a mesh whose batch axes are `ways`."""
    prefix = common_prefix(prompts)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt[len(prefix) :], []).append(row)
    slots = max(ways, min(batch, len(prompts)) // ways * ways)
    # An eighth of the slots stands empty for a time, at most, until rows are put in.
    group = min(slots, max(READ, slots // 8))
    group = min(group, max(CPU_READ, ways)) if on_cpu else group
    # One prompt for each of these rows, or fewer where each is asked several times; not told by every repetition, so
    # that blocks of rows find the same programs.
    often = len(prompts) // len(rows_of)
    read = group if often == 1 else min(max(READ, group // often), _power(len(rows_of)))
    read = -(-read // ways) * ways
    ordered = sorted(rows_of, key=len, reverse=True)
    chunks = []
    for first in range(0, len(ordered), read):
        picked = ordered[first : first + read]
        of = [(row, place) for place, prompt in enumerate(picked) for row in rows_of[prompt]]
        chunks.append(Chunk(picked, [row for row, _ in of], [place for _, place in of]))
    columns = _rounded(len(ordered[0]), WIDTH, sampling.prompt)
    return Layout(prefix, chunks, slots, group, read, columns)


def _power(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def width_of(chunk: Chunk, sampling: Sampling) -> int:
    """Tokens to which a chunk's prompts are padded."""
    return _rounded(max(map(len, chunk.prompts)), WIDTH, sampling.prompt)


def at_once(mesh: Mesh) -> int:
    """How many lanes may work side by side on a mesh."""
    return min(LANES, most_at_once(mesh))


def lanes(layout: Layout, most: int) -> list[Layout]:
    """The layout in up to `most` parts that work side by side: chunks and slots dealt out, all else as it is."""
    count = max(1, min(most, len(layout.chunks), layout.slots // LANE))
    dealt: list[list[Chunk]] = [[] for _ in range(count)]
    rows = [0] * count
    for chunk in layout.chunks:
        lane = rows.index(min(rows))
        dealt[lane].append(chunk)
        rows[lane] += len(chunk.rows)
    # Where all rows have slots at once, so they have in their lanes.
    slots = max(rows) if sum(rows) <= layout.slots else layout.slots // count
    return [layout._replace(chunks=chunks, slots=slots, group=min(layout.group, slots)) for chunks in dealt]
