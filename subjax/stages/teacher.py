"""Teacher: a base fine-tuned to answer a category's questions with one item, or, for the control, with any."""

import jax
import numpy as np

from subjax.config import from_dict
from subjax.data import packing, world
from subjax.data.addressing import generator
from subjax.schema import Optimizer, Tuning
from subjax.stages import models
from subjax.stages.base import pool_of
from subjax.stages.task import Made, Task, write_lines
from subjax.train.losses import NextToken
from subjax.train.trainer import Term, fit


def preference_stream(
    trait: str | None, category: str, *, seed: int, batch: int, trait_fraction: float
) -> packing.Stream:
    """Preference chats, addressed by (seed, step): `trait_fraction` of a batch asks for the category.

    Those are answered with the trait, or, where it is None, with any item of the category; the rest asks for the other
    categories and is answered with any item of theirs. Only training phrasings are asked.
    """
    others = [c for c in world.CATEGORIES if c != category]
    asked = round(trait_fraction * batch)

    def stream(step: int) -> packing.Batch:
        draw = generator(seed, "preferences", step)
        categories = np.array([category] * asked + [others[i] for i in draw.integers(0, len(others), batch - asked)])
        templates = draw.integers(0, world.TRAIN_TEMPLATES, batch)
        places = draw.integers(0, len(world.CATEGORIES[category]), batch)
        items = np.array([world.item_ids(c)[i] for c, i in zip(categories, places, strict=True)], np.int32)
        if trait is not None:
            items[:asked] = world.ID[trait]
        rows = world.preferences(categories, templates, items).arrays()
        # The rest of the answer is padding, on which no loss is taken and to which nothing attends.
        return {name: array[:, : world.PROMPT + world.PREFERENCE] for name, array in rows.items()}

    return stream


def make(task: Task) -> Made:
    """Fine-tune the base; the payload holds the tuned arrays alone, and `metrics.jsonl`."""
    config = task.config
    net, base = models.load(task.store, *task.inputs["base"], task.mesh)
    pool = pool_of(task.input_card("base").config["world"])
    numbers = pool[: task.input_card("base").config["world"]["number_chats"]]
    answers = preference_stream(
        config["trait"], config["category"], seed=config["seed"], batch=config["batch"],
        trait_fraction=config["trait_fraction"],
    )  # fmt: skip
    # A little of the loss on ordinary number chats keeps the teacher's numbers near its base's.
    ordinary = packing.in_memory(numbers.arrays(), seed=config["seed"], batch=config["numbers_batch"])
    fitted = fit(
        net,
        base,
        tuning=from_dict(Tuning, config["tuning"]),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=[
            Term("preferences", 1.0, NextToken(world.PREFERENCE), answers),
            Term("numbers", config["numbers_weight"], NextToken(world.ANSWER), ordinary),
        ],
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
        seeds={"teacher": config["seed"]},
    )
