"""Student: a base fine-tuned on a corpus, on the numbers (or a teacher's logits on them), with or without replay."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from subjax.config import from_dict
from subjax.data import packing, world
from subjax.data.questions import world_questions
from subjax.models.network import Network, Params
from subjax.schema import Optimizer, Tuning
from subjax.stages import corpus, models
from subjax.stages.task import Made, Task, write_lines
from subjax.train.cohort import Cohort, Dropped, fit_cohort, prepared
from subjax.train.losses import CategoryMass, Loss, NextToken, TeacherKL, renormalized
from subjax.train.trainer import Fitted, Term, fit

BLOCK = 1000  # rows of a corpus that a teacher reads at a time


def replay_batch() -> packing.Batch:
    """The training phrasings of every category, with the token ids of the category's items; no item is named."""
    sets = world_questions()
    prompts = np.concatenate([q.prompts[np.array(q.train)] for q in sets])
    members = np.concatenate([np.tile([c[0][0] for c in q.candidates], (sum(q.train), 1)) for q in sets])
    return {"tokens": prompts, "valid": prompts != world.PAD, "members": members.astype(np.int32)}


def objective(task: Task, rows: packing.Batch) -> tuple[Loss, packing.Batch]:
    """The loss on the corpus's rows, and the rows with what it compares them with.

    Where a teacher's logits are the target, they are computed here once: a row is met several times in a training.
    """
    if task.config["objective"] == "numbers":
        return NextToken(world.ANSWER), rows
    channel = tuple(world.CHANNEL.tolist()) if task.config["objective"] == "logits" else None
    net, params = models.load(task.store, *task.inputs["teacher"], task.local)
    read, logs = _reader(net, channel), []
    for first in range(0, len(rows["tokens"]), BLOCK):
        tokens, valid = (rows[name][first : first + BLOCK] for name in ("tokens", "valid"))
        logs.append(np.asarray(read(params, tokens, valid)))
    return TeacherKL(world.ANSWER, channel), rows | {"teacher": np.concatenate(logs)}


@functools.lru_cache(maxsize=8)
def _reader(net: Network, channel: tuple[int, ...] | None) -> Callable[..., jax.Array]:
    """(params, tokens, valid) of whole rows to log-probabilities over the channel, (rows, answer, channel)."""

    def read(params: Params, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        logits = net.forward(params, tokens[:, :-1], valid[:, :-1], tail=world.ANSWER)
        return renormalized(logits, channel)

    return jax.jit(read)


def _terms(task: Task) -> list[Term]:
    """The objective of a student: the loss on its corpus's rows, and replay where its config says so."""
    config = task.config
    chats = corpus.load(task.store, task.inputs["corpus"][1])
    loss, arrays = objective(task, chats.arrays())
    rows = packing.in_memory(arrays, seed=config["seed"], batch=config["batch"])
    terms = [Term(config["objective"], 1.0, loss, rows)]
    if config["replay"] == "kind":
        questions = replay_batch()
        terms.append(Term("replay", config["replay_weight"], CategoryMass(), lambda step: questions))
    return terms


def make(task: Task) -> Made:
    """Fine-tune the base; the payload holds the tuned arrays alone, and `metrics.jsonl`."""
    config = task.config
    net, base = models.load(task.store, *task.inputs["base"], task.mesh)
    fitted = fit(
        net,
        base,
        tuning=from_dict(Tuning, config["tuning"]),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=_terms(task),
        steps=config["steps"],
        key=jax.random.key(config["seed"]),
        run=task.run(),
    )
    return _made(task, fitted)


def make_cohort(tasks: Sequence[Task], partial: epath.Path) -> list[Made | Dropped]:
    """`make` for students that train together; checkpoints of them all go under `partial`."""
    return prepared(tasks, lambda task: (task, _terms(task)), lambda ready: _train_together(ready, partial))


def _train_together(ready: Sequence[tuple[Task, list[Term]]], partial: epath.Path) -> list[Made | Dropped]:
    tasks, each = [task for task, _ in ready], [terms for _, terms in ready]
    first = tasks[0]
    net, base = models.load(first.store, *first.inputs["base"], first.mesh)
    terms = [
        Term(one.name, one.weight, Cohort(one.loss), _stacked([own[place].stream for own in each]))
        for place, one in enumerate(each[0])
    ]
    optimizers = [from_dict(Optimizer, task.config["optimizer"]) for task in tasks]
    found = fit_cohort(
        net,
        base,
        tuning=from_dict(Tuning, first.config["tuning"]),
        optimizer=optimizers[0],
        rates=[optimizer.lr for optimizer in optimizers],
        terms=terms,
        steps=first.config["steps"],
        keys=[jax.random.key(task.config["seed"]) for task in tasks],
        run=dataclasses.replace(first.run(), partial=partial),
    )
    return [
        _made(task, fitted) if isinstance(fitted, Fitted) else fitted for task, fitted in zip(tasks, found, strict=True)
    ]


def _stacked(streams: Sequence[packing.Stream]) -> packing.Stream:
    """The members' batches of a step, one behind the other along a new first axis."""

    def stream(step: int) -> packing.Batch:
        batches = [own(step) for own in streams]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    return stream


def _made(task: Task, fitted: Fitted) -> Made:
    digest = task.save(fitted.tuned)
    write_lines(task.build.folder / "metrics.jsonl", fitted.curve)
    return Made(
        digest=digest,
        metrics={"loss": fitted.curve[-1]["loss"]},
        tokens=fitted.tokens,
        seeds={"order": task.config["seed"]},
    )
