"""Our side of student fine-tuning: the trainer's own loop, as a student's stage calls it."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.data import Chats
from benchmarks.ours import models
from benchmarks.ours.clock import Clock, Fits
from benchmarks.side import Ready
from subjax.data.packed import PackedChats
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh, memory_of
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.stages.text_tuning import layout
from subjax.train.losses import PackedNextToken
from subjax.train.trainer import Fitted, Run, Term, fit


def student(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seed: int, clock: Clock
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


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: `model`, `chats`, `settings`; of copies side by side, `index`. A student whose epochs end is followed by
    another one, by a seed of its own.
    """
    net, params = models.load(setup["model"])
    chats, settings = setup["chats"], setup["settings"]
    first = 1000 * setup.get("index", 0)
    fits = Fits(lambda clock, number: student(net, params, chats, settings, first + number, clock))

    def run(index: int, seconds: float) -> dict[str, Any]:
        steps, took = fits.round(seconds)
        return {"units": steps * settings["batch"], "seconds": took, "steps": steps}

    return Ready(run, {"device": jax.devices()[0].device_kind, "parameters": net.parameters})
