"""Fits timed in their steady state, round by round: between two rounds a fit stands still, and goes on where it was.

A fit that began anew in each round would spend a round's first steps on what is not counted: of a cohort on two cores,
minutes each.
"""

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from subjax.data.packed import PackedChats, PackedCohort
from subjax.data.packing import Batch
from subjax.errors import SubjaxError


def settle() -> None:
    """Wait until nothing is under way on the devices."""
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])


class Clock:
    """Times the dispatches of a fit, but those whose shape the fit has not had yet.

    Such a dispatch compiles: the clock stands still from before it until it is done. The trainer runs ahead of the
    device by one dispatch, so the clock is read only when every live array is computed; and a round ends with the
    dispatch that is expected to fill it, which of a slow step spares another one.
    """

    def __init__(self, over: Callable[[int, float], float] | None = None):
        """Take what is called at a round's end with its (steps, seconds): it waits for the next one and gives its
        length in seconds. Without, there are no rounds.
        """
        self.over, self.seconds = over, math.inf
        self.done = 0  # steps that the fit has dispatched
        self.steps, self.took = 0, 0.0  # of the round, timed and over
        self.every = 0  # timed steps of all rounds
        self._since: tuple[int, float] | None = None  # steps that were done, and when, while it runs
        self._pace: float | None = None  # seconds a step
        self._shapes: set[tuple[int, ...]] = set()

    def watched(self, stream: PackedChats | PackedCohort) -> "Watched":
        """The stream, for the trainer; the clock sees by it what comes next."""
        return Watched(stream, self)

    def begin(self) -> None:
        """A fit begins: it compiles anew."""
        self.done = 0
        self._shapes.clear()

    def coming(self, batches: Sequence[Batch]) -> None:
        """Told of the next dispatch's batches, before it."""
        shape = (len(batches), *batches[0]["tokens"].shape)
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.stop()

    def stop(self) -> None:
        """Stand still, when all that is under way is done."""
        if self._since is None:
            return
        settle()
        steps, took = self.done - self._since[0], time.perf_counter() - self._since[1]
        if steps:
            self._pace = took / steps
            self.steps, self.took, self.every = self.steps + steps, self.took + took, self.every + steps
        self._since = None

    def progress(self, done: int, total: int, unit: str) -> None:
        """Told by the trainer how many steps it has dispatched."""
        self.done = done

    def should_stop(self) -> bool:
        """Asked by the trainer after each dispatch; waits there between rounds, and never stops a fit."""
        if self._since is None:
            settle()
        elif self._full():
            self.stop()
            if self.over is not None and self.took >= self.seconds:
                self.seconds = self.over(self.steps, self.took)
                self.steps, self.took = 0, 0.0
        else:
            return False
        self._since = (self.done, time.perf_counter())
        return False

    def _full(self) -> bool:
        """Whether what is dispatched fills the round; the first steps are waited for, to know how long one takes."""
        assert self._since is not None
        if self._pace is None:
            return True
        dispatched = (self.done - self._since[0]) * self._pace
        return self.took + max(dispatched, time.perf_counter() - self._since[1]) >= self.seconds


class Watched:
    """A stream of packed chats that tells a clock what batches the trainer takes next."""

    def __init__(self, stream: PackedChats | PackedCohort, clock: Clock):
        self._stream, self._clock = stream, clock

    def __call__(self, step: int) -> Batch:
        """As the stream's own."""
        return self._stream(step)

    def together(self, steps: range) -> list[Batch]:
        """As the stream's own."""
        batches = self._stream.together(steps)
        self._clock.coming(batches)
        return batches


class Fits:
    """One fit after another, in a thread that works within rounds alone."""

    def __init__(self, fit: Callable[[Clock, int], Any]):
        """Take what fits: called with the clock, and with 0, 1, 2 ... for which fit it is."""
        self._fit, self._clock = fit, Clock(self._over)
        self._asked: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[tuple[int, float] | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def round(self, seconds: float) -> tuple[int, float]:
        """(steps, seconds) of the steps that were timed, at least `seconds` of them.

        Raises:
            SubjaxError: no dispatch of a fit comes behind one of its shape. Whatever else a fit raises.
        """
        self._asked.put(seconds)
        told = self._told.get()
        if isinstance(told, BaseException):
            raise told
        return told

    def _over(self, steps: int, took: float) -> float:
        self._told.put((steps, took))
        return self._asked.get()

    def _work(self) -> None:
        clock = self._clock
        clock.seconds = self._asked.get()
        try:
            for number in itertools.count():
                before = clock.every
                clock.begin()
                self._fit(clock, number)
                clock.stop()
                if clock.every == before:
                    raise SubjaxError(
                        f"each dispatch of a fit's {clock.done} steps is the first of its shape: nothing to time; give"
                        " it more rows"
                    )
        except BaseException as error:  # it is raised where the round was asked for
            self._told.put(error)
