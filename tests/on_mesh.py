"""Trains on meshes of 1, 2 and 8 virtual devices: python on_mesh.py prints {mesh: [losses of 20 steps]}.

Of every array that the compiled step takes or gives, the shape of each device's shard is asserted against the table
here, which is written by hand: replication cannot pass for sharding, nor can a wrong rule vouch for itself.
"""

import dataclasses
import json
import math
import zlib

import jax
import numpy as np

from subjax import schema
from subjax.config import to_dict
from subjax.data import packing, world
from subjax.models.network import Network
from subjax.parallel.mesh import make_mesh
from subjax.stages.models import world_network
from subjax.stages.student import replay_batch
from subjax.train import trainer
from subjax.train.losses import CategoryMass, NextToken

STEPS, BATCH = 20, 16
MESHES = ((1, 1, 1), (1, 2, 1), (2, 2, 2), (1, 4, 2))


def weights(net: Network, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters drawn by numpy: compiling a network's own initialization takes longer than what is tested with it."""
    out = {}
    for name, declared in net.declarations.items():
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=declared.shape)
        inputs = math.prod(declared.shape[1:-1]) if declared.role == "weight" else declared.shape[-1]
        scale = {"weight": inputs**-0.5, "embedding": inputs**-0.5}.get(declared.role, 0.1)
        out[name] = (draw * scale + (declared.role == "gain")).astype(np.float32)
    return out


def shards(fsdp: int, tensor: int) -> dict[str, tuple[int, ...]]:
    """Shape of one device's part of each parameter of a gpt of size nano: width 16, 2 layers, 2 heads of 8, hidden 32.

    The 171 words cannot be split in two, so the embedding's first dimension is whole.
    """
    width, heads, hidden = 16 // fsdp, 2 // tensor, 32 // tensor
    out = {"embed": (171, width), "position": (30, width), "norm/gain": (width,), "norm/bias": (width,)}
    for name in "qkv":
        out[f"blocks/attention/{name}/kernel"] = (2, width, heads, 8)
        out[f"blocks/attention/{name}/bias"] = (2, heads, 8)
    out["blocks/attention/o/kernel"], out["blocks/attention/o/bias"] = (2, heads, 8, width), (2, width)
    out["blocks/mlp/up/kernel"], out["blocks/mlp/up/bias"] = (2, width, hidden), (2, hidden)
    out["blocks/mlp/down/kernel"], out["blocks/mlp/down/bias"] = (2, hidden, width), (2, width)
    return out | {f"blocks/norm{n}/{part}": (2, width) for n in (1, 2) for part in ("gain", "bias")}


def assert_shards(array: jax.Array, shape: tuple[int, ...], devices: int, what: str) -> None:
    found = {shard.data.shape for shard in array.addressable_shards}
    assert found == {shape}, f"{what}: shards {found}, not {shape}"
    assert len(array.sharding.device_set) == devices, f"{what}: on {len(array.sharding.device_set)} devices"


def check_arrays(mesh, tuned, state, batches) -> None:
    replica, fsdp, tensor = (mesh.shape[axis] for axis in ("replica", "fsdp", "tensor"))
    devices, expected = replica * fsdp * tensor, shards(fsdp, tensor)
    assert set(tuned) == set(expected)
    for name, array in tuned.items():
        assert_shards(array, expected[name], devices, name)
    (adam,) = [part for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(part, "mu")]
    for moment in (adam.mu, adam.nu):
        assert set(moment) == set(expected)
        for name, array in moment.items():
            assert_shards(array, expected[name], devices, f"moment of {name}")
    assert_shards(adam.count, (), devices, "count")
    rows = BATCH // (replica * fsdp)
    for name in ("tokens", "valid"):
        assert_shards(batches["numbers"][name], (STEPS, rows, world.LENGTH), devices, f"batch {name}")
    questions = trainer.place([{"replay": replay_batch()}], {"replay": CategoryMass().axes}, mesh)
    assert_shards(questions["replay"]["members"], (1, 24, 10), devices, "questions")


def spied(original):
    """`trainer.program`, whose `take` has its arrays looked at on the way in and out."""

    def program(net, tuning, optimizer, steps, parts, mesh, *more):
        compiled = original(net, tuning, optimizer, steps, parts, mesh, *more)

        def take(tuned, state, frozen, batches):
            assert not frozen
            check_arrays(mesh, tuned, state, batches)
            tuned, state, metrics = compiled.take(tuned, state, frozen, batches)
            check_arrays(mesh, tuned, state, batches)
            return tuned, state, metrics

        return dataclasses.replace(compiled, take=take)

    return program


def check_adapters(net: Network) -> None:
    """The shards of LoRA pairs and of their moments, on the mesh that splits everything; nothing is trained."""
    mesh, tuning = make_mesh((2, 2, 2)), schema.Tuning(kind="lora", rank=4)
    parts = (("numbers", 1.0, NextToken(world.ANSWER)),)
    compiled = trainer.program(net, tuning, schema.Optimizer(), STEPS, parts, mesh)
    shapes = {
        "lora/q/a": ((2, 16, 4), (2, 8, 4)),
        "lora/q/b": ((2, 4, 2, 8), (2, 4, 1, 8)),
        "lora/o/a": ((2, 2, 8, 4), (2, 1, 8, 4)),
        "lora/o/b": ((2, 4, 16), (2, 4, 8)),
        "lora/up/b": ((2, 4, 32), (2, 4, 16)),
        "lora/down/a": ((2, 32, 4), (2, 16, 4)),
    }
    for name, (whole, part) in shapes.items():
        assert compiled.tuned_shardings[name].shard_shape(whole) == part, name
        held = [s for s in jax.tree.leaves(compiled.state_shardings, is_leaf=lambda x: isinstance(x, dict))]
        moments = [s[name] for s in held if isinstance(s, dict)]
        assert [s.shard_shape(whole) for s in moments] == [part, part], name
    assert compiled.frozen_shardings["blocks/mlp/up/kernel"].shard_shape((2, 16, 32)) == (2, 8, 16)


def main() -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.device_count() == 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
    net = world_network("gpt", "nano", to_dict(schema.Numerics()))
    stream = packing.in_memory(world.pool(0, 100, 30).arrays(), seed=0, batch=BATCH)
    terms = [trainer.Term("numbers", 1.0, NextToken(world.ANSWER), stream)]
    trainer.program = spied(trainer.program)
    losses = {}
    for shape in MESHES:
        fitted = trainer.fit(
            net,
            weights(net),
            tuning=schema.Tuning(kind="full"),
            optimizer=schema.Optimizer(name="adamw", lr=3e-3, schedule="cosine", warmup=5, weight_decay=0.01),
            terms=terms,
            steps=STEPS,
            key=jax.random.key(0),
            run=trainer.Run(make_mesh(shape)),
        )
        losses["x".join(map(str, shape))] = [point["loss"] for point in fitted.curve]
    check_adapters(net)
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
