"""What a mesh must not change, on virtual devices: python equivalence.py DEVICES CHECK MESH... prints {mesh: result}.

A mesh is written as on the command line; `permuted` behind it, as in fsdp:4/permuted, turns the order of the devices
round. Each count of devices gets a process of its own, because a backend's count is fixed when it starts.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import quick
from jax.sharding import Mesh
from on_mesh import weights
from packed_rows import ROTARY, made_up

from subjax.config import to_dict
from subjax.data import packing, world
from subjax.data.packed import PackedChats, PackedCohort
from subjax.models.network import network
from subjax.parallel.mesh import make_mesh, parse_mesh
from subjax.sample.sampler import Sampling, sample
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.stages.models import world_network
from subjax.train import step, trainer
from subjax.train.cohort import Cohort, fit_cohort
from subjax.train.losses import NextToken, PackedNextToken

STEPS, BATCH, ROWS = 20, 16, 256


def _terms() -> list[trainer.Term]:
    stream = packing.in_memory(world.pool(0, 100, 30).arrays(), seed=0, batch=BATCH)
    return [trainer.Term("numbers", 1.0, NextToken(world.ANSWER), stream)]


def _network():
    return world_network("llama-bias", "nano", to_dict(Numerics()))


def losses(mesh: Mesh) -> list[float]:
    """Losses of 20 steps of a full fine-tuning."""
    net = _network()
    fitted = trainer.fit(
        net, weights(net), tuning=Tuning(kind="full"), terms=_terms(), steps=STEPS, key=jax.random.key(0),
        optimizer=Optimizer(name="adamw", lr=3e-3, schedule="cosine", warmup=5, weight_decay=0.01),
        run=trainer.Run(mesh),
    )  # fmt: skip
    return [point["loss"] for point in fitted.curve]


def first_step(mesh: Mesh) -> dict[str, Any]:
    """The first LoRA step, where B is 0 and so A does not move: its loss, each A as it was drawn, each B behind it."""
    net = _network()
    fitted = trainer.fit(
        net, weights(net), tuning=Tuning(kind="lora", rank=2), terms=_terms(), steps=1, key=jax.random.key(0),
        optimizer=Optimizer(name="sgd", lr=1.0, schedule="constant", warmup=0, clip=0.0), run=trainer.Run(mesh),
    )  # fmt: skip
    return {"loss": fitted.curve[0]["loss"], **{name: np.asarray(a).tolist() for name, a in fitted.tuned.items()}}


def corpus(mesh: Mesh) -> dict[str, Any]:
    """Rows sampled from one key, and which of them met a near-tie."""
    net = _network()
    sampling = Sampling(world.PROMPT, world.ANSWER, world.END, world.PAD)
    prompts = world.number_prompts(ROWS, 0)
    drawn = sample(net, weights(net), prompts, sampling=sampling, key=jax.random.key(5), mesh=mesh, batch=ROWS)
    return {"tokens": drawn.tokens.tolist(), "near_tie": drawn.near_tie.tolist()}


def _chats_network():
    """A rotary model whose heads, hidden units and words split two ways."""
    return network(dataclasses.replace(ROTARY, vocab=64))


def packed(mesh: Mesh) -> list[float]:
    """Losses of 20 LoRA steps on packed chats, a row a device that rows are split over, in two turns."""
    net = _chats_network()
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    stream = PackedChats(made_up(40), seed=0, batch=BATCH, steps=STEPS, rows=rows, turns=2)
    loss = PackedNextToken(stream.layout.prefix, stream.layout.lines)
    fitted = trainer.fit(
        net, weights(net), tuning=Tuning(kind="lora", rank=2), terms=[trainer.Term("numbers", 1.0, loss, stream)],
        steps=STEPS, key=jax.random.key(0), optimizer=Optimizer(lr=1e-2), run=trainer.Run(mesh, remat="dots"),
    )  # fmt: skip
    return [point["loss"] for point in fitted.curve]


def cohort(mesh: Mesh) -> list[list[float]]:
    """Losses of 20 steps of each of four students that train together; where the mesh has `replica`, split over it."""
    net = _chats_network()
    members = [{"chats": made_up(40, seed=0), "seed": seed} for seed in range(4)]
    stream = PackedCohort(members, batch=BATCH, steps=STEPS, rows=mesh.shape["fsdp"])
    loss = Cohort(PackedNextToken(stream.layout.prefix, stream.layout.lines))
    found = fit_cohort(
        net, weights(net), tuning=Tuning(kind="lora", rank=2), optimizer=Optimizer(), rates=(1e-2, 2e-2, 1e-2, 2e-2),
        terms=[trainer.Term("numbers", 1.0, loss, stream)], steps=STEPS, keys=[jax.random.key(0)] * 4,
        run=trainer.Run(mesh),
    )  # fmt: skip
    assert all(isinstance(member, trainer.Fitted) for member in found)
    compiled = step.program(
        net, Tuning(kind="lora", rank=2), Optimizer(lr=1.0), STEPS, (("numbers", 1.0, loss),), mesh, "none", 4
    )
    whole = (4, 2, 16, 2)
    held = compiled.tuned_shardings["lora/q/a"].shard_shape(whole)
    assert held == (4 // mesh.shape["replica"], 2, 16 // mesh.shape["fsdp"], 2), held
    return [[point["loss"] for point in member.curve] for member in found]


CHECKS = {check.__name__: check for check in (losses, first_step, corpus, packed, cohort)}


@functools.cache
def results(devices: int, check: str, *meshes: str) -> dict[str, Any]:
    """What a check gives on meshes of so many virtual devices."""
    env = quick.environment(quick.PLAIN, quick.FUSION)
    words = [sys.executable, __file__, str(devices), check, *meshes]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(devices: int, check: str, *meshes: str) -> None:
    """Do the check on each mesh."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    found = {}
    for mesh in meshes:
        axes, _, order = mesh.partition("/")
        there = jax.devices()[::-1] if order == "permuted" else jax.devices()
        found[mesh] = CHECKS[check](make_mesh(parse_mesh(axes), there))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
