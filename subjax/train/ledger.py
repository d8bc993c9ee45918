"""What is read of a training's steps: loss curves, tokens seen, and who met a number that is none."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from subjax.errors import SubjaxError

Point = dict[str, float]


class Ledger:
    """Readings of one training, or of a cohort's members apart.

    Attributes:
        curves: of each member, about a hundred points.
        failures: why a member was dropped, by its place; the others go on.
        tokens: that each member saw.
    """

    def __init__(self, steps: int, members: int | None = None):
        self._steps, self._members = steps, members
        self.curves: list[list[Point]] = [[] for _ in range(members or 1)]
        self.failures: dict[int, str] = {}
        self.tokens = [0] * (members or 1)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def expect(self, first: int, metrics: Mapping[str, jax.Array], tokens: Sequence[int]) -> None:
        """Note a block of steps from `first` on that is under way: metrics of shape (steps,), or (steps, members)."""
        self._pending = first, metrics
        self.tokens = [before + int(more) for before, more in zip(self.tokens, tokens, strict=True)]

    def settle(self) -> None:
        """Read the block that is under way.

        Raises:
            SubjaxError: a loss or a gradient that is not a number, of the only training, or of the last member.
        """
        if self._pending is None:
            return
        first, metrics = self._pending
        self._pending = None
        columns = jax.device_get(metrics)
        count = len(next(iter(columns.values())))
        values = {name: np.reshape(column, (count, len(self.curves))) for name, column in columns.items()}
        for member in range(len(self.curves)):
            for row in range(count):
                if member not in self.failures:
                    self._take(member, first + row, {name: float(v[row, member]) for name, v in values.items()})
        if len(self.failures) == len(self.curves):
            raise SubjaxError(self.failures[0])

    def _take(self, member: int, step: int, values: Point) -> None:
        # The gradient too: where it alone is not a number, the next loss would be, and the last step has no next one.
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                what = f"{name.replace('_', ' ')} is {values[name]} at step {step} of {self._steps}"
                self.failures[member] = f"{what}; try a lower learning rate or clip"
                return
        if step % max(1, self._steps // 100) == 0 or step == self._steps - 1:
            self.curves[member].append({"step": step, **values})

    def record(self) -> dict[str, Any]:
        """Plain data of what was read, to stand beside a checkpoint."""
        return {"curves": self.curves, "failures": {str(k): v for k, v in self.failures.items()}, "tokens": self.tokens}

    def load(self, record: Mapping[str, Any]) -> None:
        """Take up a record."""
        self.curves, self.tokens = record["curves"], record["tokens"]
        self.failures = {int(place): why for place, why in record["failures"].items()}
