"""A sweep is data: a list of points, each a flat dict of dotted overrides such as {"trait": "owl", "student.seed": 1}.

A config file builds one from these functions in its `sweep()`; since that name is taken there, import the functions by
name (`from subjax.sweep import axis, product`) or the module under another (`from subjax import sweep as sweeps`). A
sweep can be counted, printed and tested before anything runs. Every mistake is a `UsageError` of one line.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from subjax.errors import UsageError

Sweep = list[dict[str, Any]]


def axis(key: str, values: Iterable[Any]) -> Sweep:
    """One point for each value of one dotted key, in their order. Raises UsageError for no value, or for a bare str."""
    if not isinstance(key, str) or not key:
        raise UsageError(f"axis: a key is a dotted name such as 'student.seed', got {key!r}")
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise UsageError(f"axis {key!r}: values must be a list, got {values!r}; write [{values!r}]")
    points = [{key: value} for value in values]
    if not points:
        raise UsageError(f"axis {key!r}: has no value; give at least one")
    return points


def product(*sweeps: Sweep) -> Sweep:
    """Every combination, the last sweep varying fastest; no sweep at all is the one empty point.

    Raises UsageError where two of the sweeps set the same key.
    """
    _check("product", sweeps)
    points: Sweep = [{}]
    for sweep in sweeps:
        points = [{**left, **right} for left in points for right in sweep]
    return points


def zip_(*sweeps: Sweep) -> Sweep:
    """Point i of every sweep, joined. Raises UsageError for unequal lengths and for a key that two of them set."""
    _check("zip_", sweeps)
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise UsageError(f"zip_: the sweeps have {', '.join(map(str, lengths))} points; make them equally long")
    return [{key: value for point in row for key, value in point.items()} for row in zip(*sweeps, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
    """The points of the first sweep, then of the second, and so on; they may set different keys."""
    _check("chain", sweeps, disjoint=False)
    return [dict(point) for sweep in sweeps for point in sweep]


def subsample(sweep: Sweep, n: int, seed: int) -> Sweep:
    """`n` points drawn without replacement, in their order.

    A point's draw depends on (seed, its index) alone, so that points appended later displace few and reorder none.
    Raises UsageError unless 1 <= n <= the number of points.
    """
    _check("subsample", (sweep,))
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(sweep):
        raise UsageError(f"subsample: n must be a whole number from 1 to the sweep's {len(sweep)} points, got {n!r}")
    ranked = sorted(range(len(sweep)), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return [dict(sweep[index]) for index in sorted(ranked[:n])]


def _check(name: str, sweeps: tuple[Sweep, ...], disjoint: bool = True) -> None:
    """Refuse what is no sweep and, where points are joined, a key that two sweeps set."""
    owner: dict[str, int] = {}
    for number, sweep in enumerate(sweeps, start=1):
        if not isinstance(sweep, list) or not all(isinstance(point, dict) for point in sweep):
            raise UsageError(f"{name}: argument {number} is not a sweep (a list of dicts): {type(sweep).__name__}")
        for key in dict.fromkeys(key for point in sweep for key in point):
            if disjoint and key in owner:
                raise UsageError(f"{name}: {key!r} is set twice, by sweeps {owner[key]} and {number}")
            owner[key] = number
