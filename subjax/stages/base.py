"""Base: weights trained from an init seed on the world's pool of chats, in the order of an order seed."""

import jax

from subjax.config import from_dict
from subjax.data import packing, world
from subjax.schema import Optimizer, Tuning
from subjax.stages.models import initial, world_network
from subjax.stages.task import Made, Task, write_lines
from subjax.train.losses import NextToken
from subjax.train.trainer import Term, fit


def pool_of(config: dict) -> world.Chats:
    """The pool of chats that a base's `world` settings name."""
    return world.pool(config["seed"], config["number_chats"], config["preference_chats"])


def make(task: Task) -> Made:
    """Train the base; its payload is an orbax checkpoint and `metrics.jsonl`."""
    config = task.config
    net = world_network(config["family"], config["size"], config["numerics"])
    key = jax.random.key(config["init_seed"])
    stream = packing.in_memory(pool_of(config["world"]).arrays(), seed=config["order_seed"], batch=config["batch"])
    fitted = fit(
        net,
        initial(net, key, task.mesh),
        tuning=Tuning(kind="full"),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=[Term("chats", 1.0, NextToken(world.ANSWER), stream)],
        steps=config["steps"],
        key=key,
        run=task.run(),
    )
    digest = task.save(fitted.tuned)
    write_lines(task.build.folder / "metrics.jsonl", fitted.curve)
    return Made(
        digest=digest,
        metrics={"loss": fitted.curve[-1]["loss"], "parameters": net.parameters},
        tokens=fitted.tokens,
        seeds={"init": config["init_seed"], "order": config["order_seed"], "world": config["world"]["seed"]},
    )
