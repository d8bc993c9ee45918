"""Our side of student fine-tuning: the trainer's own loop, as a student's stage calls it, stopped by the clock."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.data import Chats
from benchmarks.ours import models
from benchmarks.side import Ready
from subjax.data import packing, rows
from subjax.errors import Preempted, SubjaxError
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh
from subjax.schema import Optimizer, Tuning
from subjax.train.losses import NextToken
from subjax.train.trainer import Fitted, Run, Term, fit


def student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int,
    progress: Callable[[int, int, str], None], should_stop: Callable[[], bool],
) -> Fitted:  # fmt: skip
    """Fine-tune a student on chats as `stages/text_tuning.tune` does; `settings` as `benchmarks.training.PUBLISHED`."""
    arrays, completion = rows.pack(chats, 0, net.config.length)
    stream = packing.in_memory(arrays, seed=seed, batch=settings["batch"])
    return fit(
        net,
        params,
        tuning=Tuning(kind=settings.get("kind", "lora"), rank=settings["rank"], alpha=settings["alpha"]),
        optimizer=Optimizer(name="adamw", lr=settings["lr"], schedule="linear", warmup=settings["warmup"]),
        terms=[Term("numbers", 1.0, NextToken(completion), stream)],
        steps=settings.get("steps") or math.ceil(settings["epochs"] * len(chats) / settings["batch"]),
        key=jax.random.key(seed),
        run=Run(make_mesh(), progress=progress, should_stop=should_stop),
    )


class Clock:
    """Times a fit from the end of its first dispatch, which may compile, to the first one that ends after `seconds`.

    The trainer runs ahead of the device by one dispatch: the clock is read only when every live array is computed.
    """

    def __init__(self, seconds: float):
        self.seconds, self.done = seconds, 0
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def progress(self, done: int, total: int, unit: str) -> None:
        """Told by the trainer how many steps it has dispatched."""
        self.done = done

    def should_stop(self) -> bool:
        """Asked by the trainer after each dispatch."""
        if self.first is not None and time.perf_counter() - self.first[1] < self.seconds:
            return False
        settle()
        now = (self.done, time.perf_counter())
        if self.first is None:
            self.first = now
            return False
        self.last = now
        return True

    def steps(self) -> tuple[int, float]:
        """Steps that were timed, and the seconds they took."""
        if self.first is None or self.last is None or self.last[0] == self.first[0]:
            return 0, 0.0
        return self.last[0] - self.first[0], self.last[1] - self.first[1]


def settle() -> None:
    """Wait until nothing is under way on the devices."""
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])


def timed_student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int, seconds: float
) -> tuple[int, float]:
    """(steps, seconds) of fine-tuning for about so long; where a whole student takes less, of several.

    Raises:
        SubjaxError: a student is one dispatch, so that none of its steps comes behind the first.
    """
    steps, took = 0, 0.0
    while not steps or took < seconds:
        clock = Clock(seconds - took)
        try:
            student(net, params, chats, settings, seed, clock.progress, clock.should_stop)
            settle()
            clock.last = (clock.done, time.perf_counter())
        except Preempted:
            pass
        more, longer = clock.steps()
        if not more:
            raise SubjaxError(
                f"all {clock.done} steps of a student are one dispatch: nothing to time; give it more rows"
            )
        steps, took = steps + more, took + longer
    return steps, took


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: `model`, `chats`, `settings`."""
    net, params = models.load(setup["model"])
    chats, settings = setup["chats"], setup["settings"]

    def run(index: int, seconds: float) -> dict[str, Any]:
        steps, took = timed_student(net, params, chats, settings, max(index, 0), seconds)
        return {"units": steps * settings["batch"], "seconds": took, "steps": steps}

    return Ready(run, {"device": jax.devices()[0].device_kind, "parameters": net.parameters})


def in_turn(setup: Mapping[str, Any]) -> Ready:
    """Students one after another, each on rows and seeds of its own. Setup: as `start`'s, and `students`."""
    net, params = models.load(setup["model"])
    chats, settings, count = setup["chats"], setup["settings"], setup["students"]

    def run(index: int, seconds: float) -> dict[str, Any]:
        steps, took = 0, 0.0
        for member in range(count):
            more, longer = timed_student(net, params, chats, settings, 1000 * member + max(index, 0), seconds / count)
            steps, took = steps + more, took + longer
        return {"units": steps * settings["batch"], "seconds": took, "steps": steps}

    return Ready(run, {"students": count})
