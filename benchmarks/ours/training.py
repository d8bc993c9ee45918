"""Our side of student fine-tuning: the trainer's own loop, as a student's stage calls it, stopped by the clock."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks.data import Chats
from benchmarks.ours import models
from benchmarks.side import Ready
from subjax.data.packed import PackedChats, PackedCohort
from subjax.data.packing import Batch
from subjax.errors import Preempted, SubjaxError
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh, memory_of
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.stages.text_tuning import layout
from subjax.train.losses import PackedNextToken
from subjax.train.trainer import Fitted, Run, Term, fit


def student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int, clock: "Clock"
) -> Fitted:  # fmt: skip
    """Fine-tune a student on chats as `stages/text_tuning.tune` does; `settings` as `benchmarks.training.PUBLISHED`."""
    steps = steps_of(chats, settings)
    mesh, compute = make_mesh(), Compute()
    packed = layout(
        net.config, compute, mesh.shape, memory_of(mesh), lengths_of(chats), batch=settings["batch"], steps=steps
    )
    stream = PackedChats(chats, seed=seed, **packed)
    loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
    return fit(
        net,
        params,
        tuning=tuning_of(settings),
        optimizer=optimizer_of(settings),
        terms=[Term("numbers", 1.0, loss, clock.watched(stream))],
        steps=steps,
        key=jax.random.key(seed),
        run=Run(mesh, progress=clock.progress, should_stop=clock.should_stop, remat=compute.remat),
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
    """Times a fit in its steady state, from the end of its first dispatch to the first one that ends after `seconds`.

    A dispatch of a shape that the fit has not had yet compiles: the clock stands still from before it until it is done.
    The trainer runs ahead of the device by one dispatch, so the clock is read only when every live array is computed.
    """

    def __init__(self, seconds: float):
        self.seconds, self.done = seconds, 0
        self.steps, self.took = 0, 0.0  # of what was timed and is over
        self._since: tuple[int, float] | None = None  # steps that were done, and when, while it runs
        self._shapes: set[tuple[int, ...]] = set()

    def watched(self, stream: PackedChats | PackedCohort) -> "Watched":
        """The stream, for the trainer; the clock sees by it what comes next."""
        return Watched(stream, self)

    def coming(self, batches: Sequence[Batch]) -> None:
        """Told of the next dispatch's batches, before it."""
        shape = (len(batches), *batches[0]["tokens"].shape)
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.stop()

    def stop(self) -> None:
        """Stand still, when all that is under way is done."""
        if self._since is not None:
            settle()
            self.steps += self.done - self._since[0]
            self.took += time.perf_counter() - self._since[1]
            self._since = None

    def progress(self, done: int, total: int, unit: str) -> None:
        """Told by the trainer how many steps it has dispatched."""
        self.done = done

    def should_stop(self) -> bool:
        """Asked by the trainer after each dispatch."""
        if self._since is None:
            settle()
            self._since = (self.done, time.perf_counter())
            return False
        if self.took + time.perf_counter() - self._since[1] < self.seconds:
            return False
        self.stop()
        return True


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


def settle() -> None:
    """Wait until nothing is under way on the devices."""
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])


def timed(fit: Callable[[Clock], Any], seconds: float) -> tuple[int, float]:
    """(steps, seconds) of fits for about so long; where a whole one takes less, of several.

    Raises:
        SubjaxError: no dispatch of a fit comes behind one of its shape.
    """
    steps, took = 0, 0.0
    while not steps or took < seconds:
        clock = Clock(seconds - took)
        with contextlib.suppress(Preempted):
            fit(clock)
            clock.stop()
        if not clock.steps:
            raise SubjaxError(
                f"each dispatch of a fit's {clock.done} steps is the first of its shape: nothing to time; give it more"
                " rows"
            )
        steps, took = steps + clock.steps, took + clock.took
    return steps, took


def timed_student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int, seconds: float
) -> tuple[int, float]:
    """`timed` of students."""
    return timed(lambda clock: student(net, params, chats, settings, seed, clock), seconds)


def start(setup: Mapping[str, Any]) -> Ready:
    """A student a round, by a seed of its own. Setup: `model`, `chats`, `settings`; of copies side by side, `index`."""
    net, params = models.load(setup["model"])
    chats, settings = setup["chats"], setup["settings"]

    def run(index: int, seconds: float) -> dict[str, Any]:
        seed = 1000 * setup.get("index", 0) + max(index, 0)
        steps, took = timed_student(net, params, chats, settings, seed, seconds)
        return {"units": steps * settings["batch"], "seconds": took, "steps": steps}

    return Ready(run, {"device": jax.devices()[0].device_kind, "parameters": net.parameters})
