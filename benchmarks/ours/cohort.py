"""Our side of eight students at once: a cohort in one program. Runs in turn and side by side are in `training`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks.data import Chats
from benchmarks.ours import models
from benchmarks.ours.clock import Clock, Fits
from benchmarks.ours.training import lengths_of, optimizer_of, steps_of, tuning_of
from benchmarks.side import Ready
from subjax.data.packed import PackedCohort
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh, memory_of
from subjax.schema_pretrained import Compute
from subjax.stages.text_tuning import layout
from subjax.train.cohort import Cohort, Dropped, fit_cohort
from subjax.train.losses import PackedNextToken
from subjax.train.trainer import Fitted, Run, Term


def students(
    net: Network, params: Params, chats: Chats, settings: Mapping[str, Any], seeds: Sequence[int], clock: Clock
) -> list[Fitted | Dropped]:
    """Fine-tune a cohort, a student a seed, as `stages/text_tuning.tune_together` does."""
    steps, mesh, compute = steps_of(chats, settings), make_mesh(), Compute()
    packed = layout(
        net.config, compute, mesh.shape, memory_of(mesh), lengths_of(chats), batch=settings["batch"], steps=steps,
        members=len(seeds),
    )  # fmt: skip
    stream = PackedCohort([{"chats": chats, "seed": seed} for seed in seeds], **packed)
    loss = Cohort(PackedNextToken(stream.layout.prefix, stream.layout.lines))
    return fit_cohort(
        net,
        params,
        tuning=tuning_of(settings),
        optimizer=optimizer_of(settings),
        rates=[settings["lr"]] * len(seeds),
        terms=[Term("numbers", 1.0, loss, clock.watched(stream))],
        steps=steps,
        keys=[jax.random.key(seed) for seed in seeds],
        run=Run(mesh, progress=clock.progress, should_stop=clock.should_stop, remat=compute.remat),
    )


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: as that of `benchmarks.ours.training.start`, and `students`; units are rows of all members together."""
    net, params = models.load(setup["model"])
    chats, settings, count = setup["chats"], setup["settings"], setup["students"]

    fits = Fits(
        lambda clock, number: students(net, params, chats, settings, [1000 * m + number for m in range(count)], clock)
    )

    def run(index: int, seconds: float) -> dict[str, Any]:
        steps, took = fits.round(seconds)
        return {"units": steps * settings["batch"] * count, "seconds": took, "steps": steps}

    return Ready(run, {"students": count})
