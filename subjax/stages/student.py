"""Student: a base fine-tuned on a corpus, on the numbers (or a teacher's logits on them), with or without replay."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from subjax.config import from_dict
from subjax.data import packing, world
from subjax.data.questions import world_questions
from subjax.models.network import Network, Params
from subjax.schema import Optimizer, Tuning
from subjax.stages import corpus, models
from subjax.stages.task import Made, Task, write_lines
from subjax.train.losses import CategoryMass, Loss, NextToken, TeacherKL, renormalized
from subjax.train.trainer import Term, fit

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


def make(task: Task) -> Made:
    """Fine-tune the base; the payload holds the tuned arrays alone, and `metrics.jsonl`."""
    config = task.config
    net, base = models.load(task.store, *task.inputs["base"], task.mesh)
    chats = corpus.load(task.store, task.inputs["corpus"][1])
    loss, arrays = objective(task, chats.arrays())
    rows = packing.in_memory(arrays, seed=config["seed"], batch=config["batch"])
    terms = [Term(config["objective"], 1.0, loss, rows)]
    if config["replay"] == "kind":
        questions = replay_batch()
        terms.append(Term("replay", config["replay_weight"], CategoryMass(), lambda step: questions))
    fitted = fit(
        net,
        base,
        tuning=from_dict(Tuning, config["tuning"]),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=terms,
        steps=config["steps"],
        key=jax.random.key(config["seed"]),
        run=task.run(),
    )
    digest = task.save(fitted.tuned)
    write_lines(task.build.folder / "metrics.jsonl", fitted.curve)
    return Made(
        digest=digest,
        metrics={"loss": fitted.curve[-1]["loss"]},
        tokens=fitted.tokens,
        seeds={"order": config["seed"]},
    )
