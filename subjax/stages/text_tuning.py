"""Fine-tuning on chats, as teachers and students of a pretrained study both do it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from subjax.config import from_dict
from subjax.cpu import visible_cores
from subjax.data.addressing import steps_of
from subjax.data.packed import Chat, PackedChats, PackedCohort
from subjax.models import flash
from subjax.models.architecture import DecoderConfig
from subjax.parallel.mesh import memory_of
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.stages.speakers import Speaker
from subjax.stages.task import Made, Task, write_lines
from subjax.train.cohort import Cohort, Dropped, fit_cohort
from subjax.train.losses import PackedNextToken
from subjax.train.trainer import Fitted, Run, Term, fit

GIB = 2**30
# Of a core of one process, of two at most: what longer turns need fits no cache. Elsewhere it is a part of the memory.
CPU_ACTIVATIONS, CPU_CORES = 1 * GIB, 2
DEVICE_PART = 0.3


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a model is fine-tuned on.

    Attributes:
        task: its config holds `tuning`, `optimizer`, `epochs` and `batch`.
        speaker: the model, with the template that the chats were written by.
        term: the loss by name, in the curve. init_seed: of the adapters' first values. order_seed: of the data order.
        seeds: what the card says of them.
    """

    task: Task
    speaker: Speaker
    chats: Sequence[Chat]
    term: str
    init_seed: int
    order_seed: int
    seeds: dict[str, int | None]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return steps_of(self.task.config["epochs"], len(self.chats), self.task.config["batch"])

    @property
    def compute(self) -> Compute:
        """How it is computed."""
        return from_dict(Compute, self.task.hints.get("compute", {}))

    def run(self) -> Run:
        """The trainer's settings."""
        return dataclasses.replace(self.task.run(), remat=self.compute.remat)

    def made(self, fitted: Fitted) -> Made:
        """Write the payload: the tuned arrays and `metrics.jsonl`."""
        digest = self.task.save(fitted.tuned)
        write_lines(self.task.build.folder / "metrics.jsonl", fitted.curve)
        metrics = {"loss": fitted.curve[-1]["loss"], "rows": len(self.chats)}
        return Made(digest=digest, metrics=metrics, tokens=fitted.tokens, seeds=self.seeds)


def tune(lesson: Lesson) -> Made:
    """Fine-tune on chats; the loss falls on answers alone. The payload: the tuned arrays and `metrics.jsonl`.

    Raises:
        UsageError: a chat is longer than the model's context, or the attention asked for does not run here. As `fit`
            besides.
    """
    task, speaker = lesson.task, lesson.speaker
    flash.require(speaker.net.config, task.mesh.devices.flat[0].platform)
    stream = PackedChats(lesson.chats, seed=lesson.order_seed, **_layout([lesson], task.mesh))
    loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
    fitted = fit(
        speaker.net,
        speaker.params,
        tuning=from_dict(Tuning, task.config["tuning"]),
        optimizer=from_dict(Optimizer, task.config["optimizer"]),
        terms=[Term(lesson.term, 1.0, loss, stream)],
        steps=lesson.steps,
        key=jax.random.key(lesson.init_seed),
        run=lesson.run(),
    )
    return lesson.made(fitted)


def tune_together(lessons: Sequence[Lesson], partial: epath.Path) -> list[Made | Dropped]:
    """`tune` for the members of a cohort, in one program; why a member was dropped, in place of what it made.

    Args:
        lessons: on one model, with settings that differ in seeds and learning rate alone.
        partial: where checkpoints of all members together go.

    Raises:
        As `tune`; SubjaxError where no member is left.
    """
    first = lessons[0]
    assert {lesson.steps for lesson in lessons} == {first.steps}, "a cohort's members take steps together"
    task, speaker = first.task, first.speaker
    flash.require(speaker.net.config, task.mesh.devices.flat[0].platform)
    members = [{"chats": lesson.chats, "seed": lesson.order_seed} for lesson in lessons]
    stream = PackedCohort(members, **_layout(lessons, task.mesh, len(lessons)))
    loss = Cohort(PackedNextToken(stream.layout.prefix, stream.layout.lines))
    optimizers = [from_dict(Optimizer, lesson.task.config["optimizer"]) for lesson in lessons]
    found = fit_cohort(
        speaker.net,
        speaker.params,
        tuning=from_dict(Tuning, task.config["tuning"]),
        optimizer=optimizers[0],
        rates=[optimizer.lr for optimizer in optimizers],
        terms=[Term(first.term, 1.0, loss, stream)],
        steps=first.steps,
        keys=[jax.random.key(lesson.init_seed) for lesson in lessons],
        run=dataclasses.replace(first.run(), partial=partial),
    )
    return [
        lesson.made(fitted) if isinstance(fitted, Fitted) else fitted
        for lesson, fitted in zip(lessons, found, strict=True)
    ]


def _layout(lessons: Sequence[Lesson], mesh: Mesh, members: int | None = None) -> dict[str, Any]:
    first = lessons[0]
    lengths = [len(prompt) + len(answer) for lesson in lessons for prompt, answer in lesson.chats]
    return layout(
        first.speaker.net.config, first.compute, mesh.shape, memory_of(mesh), lengths, batch=first.task.config["batch"],
        steps=first.steps, members=members,
    )  # fmt: skip


def layout(
    decoder: DecoderConfig,
    compute: Compute,
    mesh: Mapping[str, int],
    limit: float | None,
    lengths: Sequence[int],
    *,
    batch: int,
    steps: int,
    members: int | None = None,
) -> dict[str, Any]:
    """How chats that train together are packed: a row a device, in as many turns as memory asks for.

    Args:
        decoder: the model. compute: what is kept for gradients, and how much memory that may take.
        mesh: sizes of its axes. limit: bytes of memory of a device; None on CPU.
        lengths: tokens of each chat, of all members. batch: chats a step. steps: of the run. members: of a cohort.

    Returns:
        What `PackedChats` and `PackedCohort` take beside chats and seeds.
    """
    rows = mesh["fsdp"] * (mesh["replica"] if members is None else 1)
    # A kernel sees a row's tokens; what all chats begin with stands once in XLA's attention alone.
    xla = decoder.attention == "xla"
    kept = decoder.kept_bytes(compute.remat, max(lengths) if xla else 0) / mesh["tensor"]
    each = 1 if members is None else math.ceil(members / mesh["replica"])
    room = max(1, int(activations(compute, limit) / (kept * each)))
    mean = sum(lengths) / len(lengths)
    turns = min(math.ceil(batch * mean / rows / room), math.ceil(batch / rows))
    return {
        "batch": batch, "steps": steps, "rows": rows, "turns": turns, "share_prefix": xla,
        "grain": 8 if xla else 128, "context": decoder.length,
    }  # fmt: skip


def activations(compute: Compute, limit: float | None) -> float:
    """Bytes of a device for what gradients need: as set, else by its kind and cores: the same every time."""
    if compute.activations_gib:
        return compute.activations_gib * GIB
    return DEVICE_PART * limit if limit else CPU_ACTIVATIONS * min(CPU_CORES, visible_cores())
