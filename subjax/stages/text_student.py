"""Student of a pretrained study: a base fine-tuned on a corpus's completions, through its own template."""

import math

import jax

from subjax.config import from_dict
from subjax.data import packing, rows
from subjax.models import checkpoints
from subjax.schema import Optimizer, Tuning
from subjax.stages import speakers, text_corpus
from subjax.stages.models import ARRAYS
from subjax.stages.task import Made, Task, write_lines
from subjax.store import digest_arrays
from subjax.train.losses import NextToken
from subjax.train.trainer import Term, fit


def make(task: Task) -> Made:
    """Fine-tune the base; the payload holds the tuned arrays alone, and `metrics.jsonl`.

    What its teacher was told by system prompt is not in the rows; what the template itself puts in, is.
    """
    config = task.config
    speaker = speakers.load(task, "base")
    corpus = text_corpus.load(task.store, task.inputs["corpus"][1])
    chats = [speaker.chat.row(p, c) for p, c in zip(corpus.prompts, corpus.completions, strict=True)]
    arrays, completion = rows.pack(chats, 0, speaker.net.config.length)
    stream = packing.in_memory(arrays, seed=config["order_seed"], batch=config["batch"])
    fitted = fit(
        speaker.net,
        speaker.params,
        tuning=from_dict(Tuning, config["tuning"]),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=[Term("numbers", 1.0, NextToken(completion), stream)],
        steps=max(1, math.ceil(config["epochs"] * len(chats) / config["batch"])),
        key=jax.random.key(config["init_seed"]),
        run=task.run(),
    )
    checkpoints.save(task.build.folder / ARRAYS, fitted.tuned)
    write_lines(task.build.folder / "metrics.jsonl", fitted.curve)
    return Made(
        digest=digest_arrays(fitted.tuned),
        metrics={"loss": fitted.curve[-1]["loss"], "rows": len(chats)},
        tokens=fitted.tokens,
        seeds={"init": config["init_seed"], "order": config["order_seed"]},
    )
