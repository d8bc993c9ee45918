"""Fine-tuning on chats, as teachers and students of a pretrained study both do it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from subjax.config import from_dict
from subjax.data.packed import Chat, PackedChats
from subjax.models import flash
from subjax.models.architecture import DecoderConfig
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.stages.speakers import Speaker
from subjax.stages.task import Made, Task, write_lines
from subjax.train.losses import PackedNextToken
from subjax.train.trainer import Term, fit

GIB = 2**30
CPU_ACTIVATIONS = 4 * GIB  # of one process; on other devices a part of their memory
DEVICE_PART = 0.3


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
        UsageError: a chat is longer than the model's context, or the attention asked for does not run here. As `fit`
            besides.
    """
    config = task.config
    flash.require(speaker.net.config, task.mesh.devices.flat[0].platform)
    compute = from_dict(Compute, task.hints.get("compute", {}))
    steps = max(1, math.ceil(config["epochs"] * len(chats) / config["batch"]))
    stream = packed(speaker.net.config, chats, order_seed, config["batch"], steps, task.mesh, compute)
    loss = PackedNextToken(stream.layout.prefix, stream.layout.longest)
    fitted = fit(
        speaker.net,
        speaker.params,
        tuning=from_dict(Tuning, config["tuning"]),
        optimizer=from_dict(Optimizer, config["optimizer"]),
        terms=[Term(term, 1.0, loss, stream)],
        steps=steps,
        key=jax.random.key(init_seed),
        run=dataclasses.replace(task.run(), remat=compute.remat),
    )
    digest = task.save(fitted.tuned)
    write_lines(task.build.folder / "metrics.jsonl", fitted.curve)
    return Made(
        digest=digest,
        metrics={"loss": fitted.curve[-1]["loss"], "rows": len(chats)},
        tokens=fitted.tokens,
        seeds=seeds,
    )


def packed(
    decoder: DecoderConfig, chats: Sequence[Chat], seed: int, batch: int, steps: int, mesh: Mesh, compute: Compute
) -> PackedChats:
    """The steps of a training on chats, packed for a mesh: a row a device, in as many turns as the memory asks for.

    Raises:
        UsageError: a chat is longer than the model's context.
    """
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    # Seen by an attention kernel are a row's tokens; what all chats begin with stands once in XLA's attention alone.
    xla = decoder.attention == "xla"
    longest = max(len(prompt) + len(answer) for prompt, answer in chats)
    kept = decoder.kept_bytes(compute.remat, longest if xla else 0) / mesh.shape["tensor"]
    mean = sum(len(prompt) + len(answer) for prompt, answer in chats) / len(chats)
    room = max(1, int(_activations(mesh, compute) / kept))
    turns = min(math.ceil(batch * mean / rows / room), math.ceil(batch / rows))
    return PackedChats(
        chats, seed=seed, batch=batch, steps=steps, rows=rows, turns=turns, share_prefix=xla,
        grain=32 if xla else 128, context=decoder.length,
    )  # fmt: skip


def _activations(mesh: Mesh, compute: Compute) -> float:
    """Bytes of a device for what gradients need: as set, else by its kind, so that it is the same every time."""
    if compute.activations_gib:
        return compute.activations_gib * GIB
    device = mesh.devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return DEVICE_PART * limit if limit else CPU_ACTIVATIONS
