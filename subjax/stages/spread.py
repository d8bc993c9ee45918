"""Asking a model in a job of several processes: each takes its own pieces of the work, of which none needs another.

A corpus's blocks go round through files in the node's folder of things under way, so that a job that is stopped finds
them again, on whatever number of processes; what is as small as readings goes round by itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from subjax.parallel.processes import group
from subjax.stages.task import Task

T = TypeVar("T")


def in_turn(places: Sequence[int], piece: Callable[[int], T]) -> Iterator[T]:
    """`piece(place)` for every place, in order, each computed by one process.

    `piece` must keep its result where all processes look first (`kept` does): to the others it is then there. Where a
    slow file system does not show it yet, a piece is computed once more, to the same result.
    """
    together = group()
    if together.count == 1:
        yield from map(piece, places)
        return
    for start in range(0, len(places), together.count):
        turn = places[start : start + together.count]
        if together.index < len(turn):
            piece(turn[together.index])
        together.barrier("pieces")
        yield from map(piece, turn)


def all_read() -> None:
    """Return when every process has read the pieces, which process 0 removes as it commits the node."""
    group().barrier("pieces read")


def kept(task: Task, name: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Arrays as an earlier attempt at the node, or another process, left them under `name`; else computed, and left."""
    path = task.build.partial / f"{name}.npz"
    if path.exists():
        with path.open("rb") as file, np.load(file) as saved:
            return dict(saved)
    arrays = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".writing-{group().index}")
    with scratch.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    scratch.rename(path)
    return arrays


def shared(units: Sequence[T], compute: Callable[[int, T], Any]) -> list[Any]:
    """`compute(place, unit)` (JSON) of every unit, each by one process, and all of them to every process."""
    together = group()
    mine = [(i, compute(i, unit)) for i, unit in enumerate(units) if i % together.count == together.index]
    if together.count == 1:
        return [result for _, result in mine]
    found = dict((place, result) for part in together.agree("readings", mine) for place, result in part)
    return [found[place] for place in range(len(units))]
