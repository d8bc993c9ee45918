"""Fine-tuning on chats, as teachers and students of a pretrained study both do it."""

import math
from collections.abc import Sequence

import jax

from subjax.config import from_dict
from subjax.data import packing, rows
from subjax.schema import Optimizer, Tuning
from subjax.stages.speakers import Speaker
from subjax.stages.task import Made, Task, write_lines
from subjax.train.losses import NextToken
from subjax.train.trainer import Term, fit

Chat = tuple[list[int], list[int]]  # a prompt's token ids, and its answer's


def tune(
    task: Task, speaker: Speaker, chats: Sequence[Chat], *, term: str, init_seed: int, order_seed: int,
    seeds: dict[str, int | None],
) -> Made:  # fmt: skip
    """Fine-tune on chats; the loss falls on answers alone. The payload: the tuned arrays and `metrics.jsonl`.

    Args:
        task: its config holds `tuning`, `optimizer`, `epochs` and `batch`.
        speaker: the model, with the template that the chats were written by.
        term: the loss by name, in the curve. init_seed: of the adapters' first values. order_seed: of the data order.
        seeds: what the card says of them.

    Raises:
        UsageError: a chat is longer than the model's context. As `fit` besides.
    """
    config = task.config
    arrays, completion = rows.pack(chats, 0, speaker.net.config.length)
    fitted = fit(
        speaker.net,
        speaker.params,
        tuning=from_dict(Tuning, config["tuning"]),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=[
            Term(term, 1.0, NextToken(completion), packing.in_memory(arrays, seed=order_seed, batch=config["batch"]))
        ],
        steps=max(1, math.ceil(config["epochs"] * len(chats) / config["batch"])),
        key=jax.random.key(init_seed),
        run=task.run(),
    )
    digest = task.save(fitted.tuned)
    write_lines(task.build.folder / "metrics.jsonl", fitted.curve)
    return Made(
        digest=digest,
        metrics={"loss": fitted.curve[-1]["loss"], "rows": len(chats)},
        tokens=fitted.tokens,
        seeds=seeds,
    )
