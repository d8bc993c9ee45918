"""Our side of student fine-tuning: the trainer's own loop, as a student's stage calls it, stopped by the clock."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.data import Chats
from benchmarks.ours import models
from benchmarks.side import Ready
from subjax.data.packed import PackedChats
from subjax.errors import Preempted, SubjaxError
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.stages.text_tuning import layout, limit_of
from subjax.train.losses import PackedNextToken
from subjax.train.trainer import Fitted, Run, Term, fit


def student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int,
    progress: Callable[[int, int, str], None], should_stop: Callable[[], bool],
) -> Fitted:  # fmt: skip
    """Fine-tune a student on chats as `stages/text_tuning.tune` does; `settings` as `benchmarks.training.PUBLISHED`."""
    steps = steps_of(chats, settings)
    mesh, compute = make_mesh(), Compute()
    packed = layout(
        net.config, compute, mesh.shape, limit_of(mesh), lengths_of(chats), batch=settings["batch"], steps=steps
    )
    stream = PackedChats(chats, seed=seed, **packed)
    loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
    return fit(
        net,
        params,
        tuning=tuning_of(settings),
        optimizer=optimizer_of(settings),
        terms=[Term("numbers", 1.0, loss, stream)],
        steps=steps,
        key=jax.random.key(seed),
        run=Run(mesh, progress=progress, should_stop=should_stop, remat=compute.remat),
    )


def lengths_of(chats: Chats) -> list[int]:
    """Tokens of each chat."""
    return [len(prompt) + len(answer) for prompt, answer in chats]


def tuning_of(settings: Mapping[str, Any]) -> Tuning:
    """What is trained."""
    return Tuning(kind=settings.get("kind", "lora"), rank=settings["rank"], alpha=settings["alpha"])


def optimizer_of(settings: Mapping[str, Any]) -> Optimizer:
    """How."""
    return Optimizer(name="adamw", lr=settings["lr"], schedule="linear", warmup=settings["warmup"])


def steps_of(chats: Chats, settings: Mapping[str, Any]) -> int:
    """Optimizer steps of a student."""
    return settings.get("steps") or math.ceil(settings["epochs"] * len(chats) / settings["batch"])


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


def timed(fit: Callable[[Clock], Any], seconds: float) -> tuple[int, float]:
    """(steps, seconds) of fits for about so long; where a whole one takes less, of several.

    Raises:
        SubjaxError: a fit is one dispatch, so that none of its steps comes behind the first.
    """
    steps, took = 0, 0.0
    while not steps or took < seconds:
        clock = Clock(seconds - took)
        try:
            fit(clock)
            settle()
            clock.last = (clock.done, time.perf_counter())
        except Preempted:
            pass
        more, longer = clock.steps()
        if not more:
            raise SubjaxError(f"all {clock.done} steps of a fit are one dispatch: nothing to time; give it more rows")
        steps, took = steps + more, took + longer
    return steps, took


def timed_student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int, seconds: float
) -> tuple[int, float]:
    """`timed` of students."""
    return timed(lambda clock: student(net, params, chats, settings, seed, clock.progress, clock.should_stop), seconds)


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
