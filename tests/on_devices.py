"""Checks that need several devices. The device count of a process is fixed when its backend starts, so each count gets
a process of its own, with that many virtual CPU devices:

    python tests/on_devices.py 8 corpus shards      prints the results of the named checks as one line of JSON

In a test, `result(8, "corpus")` gives the result of a check, and starts that process at most once. To add a check,
write a function of a mesh that returns JSON, and add it to `CHECKS` and `TOGETHER`.
"""

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any
from unittest import mock

import jax
import numpy as np
import quick
import reference
from etils import epath
from jax.sharding import Mesh

from subjax.measure import tries
from subjax.models import checkpoints
from subjax.models.families import decoder_config
from subjax.models.network import Network, Params, network
from subjax.parallel.mesh import make_mesh, parse_mesh
from subjax.parallel.rules import SAMPLE, TRAIN, shardings
from subjax.sample import sampler
from subjax.sample.sampler import Sampling, sample
from subjax.sample.slots import Programs, State, programs
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.train import trainer
from subjax.train.losses import NextToken

MESHES = {1: "", 2: "fsdp:2", 8: "replica:2,fsdp:2,tensor:2"}
WIDE = "fsdp:4,tensor:2"  # the mesh of 8 on which shard shapes are asserted
ROWS, PROMPT, COMPLETION, END, PAD = 2048, 8, 10, 1, 0


def tiny(family: str, vocab: int = 172) -> Network:
    """A network of the recipe's size, with a vocabulary that two devices can share evenly."""
    return network(decoder_config(family, "tiny", vocab=vocab, length=30, numerics=Numerics()))


@functools.cache
def corpus_case() -> dict[str, Any]:
    """What the corpus of every batch size and device count is sampled with: arguments of `sample`."""
    net = network(decoder_config("llama-bias", "nano", vocab=40, length=PROMPT + COMPLETION, numerics=Numerics()))
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 40, (ROWS, PROMPT)).astype(np.int32)
    prompts[np.arange(PROMPT)[None] < rng.integers(0, PROMPT, (ROWS, 1))] = PAD
    return {
        "net": net,
        "params": reference.random_params(net, 1),
        "prompts": prompts,
        "sampling": Sampling(PROMPT, COMPLETION, END, PAD),
        "key": jax.random.key(7),
    }


def initial(net: Network, mesh: Mesh) -> Params:
    """Initial parameters, made where the training rules put them on `mesh`."""
    declared = {n: (d.shape, d.axes) for n, d in net.declarations.items()}
    return jax.jit(net.init, out_shardings=shardings(TRAIN, mesh, declared))(jax.random.key(3))


def digest(arrays: Params) -> dict[str, str]:
    """Digest of each array's bytes."""
    return {n: hashlib.sha256(np.asarray(a).tobytes()).hexdigest()[:16] for n, a in arrays.items()}


def wide(mesh: Mesh) -> Mesh:
    """The mesh that shard shapes are asserted on, where there are devices for it."""
    return make_mesh(parse_mesh(WIDE)) if mesh.size == 8 else mesh


def shard_shapes(array: jax.Array) -> list[list[int]]:
    """The different shapes of an array's shards; one, if it is split evenly."""
    return [list(shape) for shape in sorted({shard.data.shape for shard in array.addressable_shards})]


def corpus(mesh: Mesh) -> dict[str, Any]:
    """The corpus of `corpus_case` sampled on the mesh, and the shards that its cache and parameters were in."""
    case, waited, last = corpus_case(), [], [None]

    def watched(*asked: Any) -> Programs:
        compiled = programs(*asked)

        def place(state: State, *rest: Any) -> Any:
            if state.token is last[0]:  # two in a row: nothing was read between them
                waited.append(state.token.is_ready())
            state, cache = compiled.place(state, *rest)
            last[0] = state.token
            return state, cache

        return compiled._replace(place=place)

    with mock.patch.object(sampler, "programs", watched):
        drawn = sample(**case, mesh=mesh, batch=512)
    compiled = programs(case["net"], case["sampling"], mesh)
    params = jax.device_put(case["params"], dict(compiled.params))
    block = case["prompts"][:512]
    logits, kv = compiled.prefill(params, None, block, block != PAD, None)
    state, cache = compiled.begin(512, PROMPT)
    rows, key = np.arange(512), np.asarray(jax.random.key_data(case["key"]))
    state, cache = compiled.place(state, cache, logits, kv, (block != PAD).sum(1), rows, rows, rows, key, None)
    parts = {"token": state.token, "k": cache.k, "read": kv[0], "embed": params["embed"]}
    parts["q"] = params["blocks/attention/q/kernel"]
    return {
        "tokens": drawn.tokens.tolist(),
        "near_tie": drawn.near_tie.tolist(),
        "waited": waited,
        "shards": {name: shard_shapes(array) for name, array in parts.items()},
    }


def init(mesh: Mesh) -> dict[str, Any]:
    """Initial parameters made on a mesh: their values and the shards they are in."""
    arrays = initial(tiny("gpt"), wide(mesh))
    return {"digest": digest(arrays), "shards": {n: shard_shapes(a) for n, a in arrays.items()}}


def shards(mesh: Mesh) -> dict[str, Any]:
    """Shards of the parameters of each family, for training and for sampling, on the wide mesh."""
    out = {}
    for family in ("gpt", "llama", "llama-bias"):
        net = tiny(family)
        declared = {n: (d.shape, d.axes) for n, d in net.declarations.items()}
        for rules in (TRAIN, SAMPLE):
            arrays = jax.device_put(reference.random_params(net, 0), shardings(rules, wide(mesh), declared))
            out[f"{family} {rules.name}"] = {n: shard_shapes(a) for n, a in arrays.items()}
    return out


def forward(mesh: Mesh) -> dict[str, Any]:
    """How far logits on the mesh are from those on one device, as a part of the largest."""
    net = tiny("llama-bias")
    params = reference.random_params(net, 0)
    tokens = np.random.default_rng(0).integers(1, 172, (8, 30))
    valid = np.arange(30)[None] >= np.arange(8)[:, None]
    declared = {n: (d.shape, d.axes) for n, d in net.declarations.items()}
    rows = TRAIN.sharding(mesh, tokens.shape, ("batch", "length"))
    logits = jax.jit(net.forward, in_shardings=(shardings(TRAIN, mesh, declared), rows, rows))(params, tokens, valid)
    alone = np.asarray(jax.jit(net.forward)(params, tokens, valid))
    apart = np.abs(np.asarray(logits) - alone).max() / np.abs(alone).max()
    return {"apart": float(apart), "shards": shard_shapes(logits)}


def checkpoint(mesh: Mesh) -> dict[str, Any]:
    """A checkpoint that was saved from the mesh, read onto another mesh and onto the host."""
    value = np.arange(64 * 24, dtype=np.float32).reshape(64, 24)
    axes = ("vocab", "embed")
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(folder) / "arrays"
        checkpoints.save(path, {"a/b": jax.device_put(value, TRAIN.sharding(mesh, value.shape, axes))})
        other = make_mesh((1, max(1, mesh.size // 2), 1))
        read = checkpoints.load(path, {"a/b": TRAIN.sharding(other, value.shape, axes)})["a/b"]
        host = checkpoints.load(path)["a/b"]
    same = [bool((np.asarray(a) == value).all()) for a in (read, host)]
    return {"same": same, "shards": shard_shapes(read)}


def activations(mesh: Mesh) -> dict[str, int]:
    """How often each batch size of a residual stream stands in the compiled step, every device on one fsdp axis.

    Batch and parameters share that axis: unless the step says which of them splits the residual stream, the compiler
    may keep the parameters' split and give every device all 64 rows.
    """
    mesh = make_mesh((1, mesh.size, 1))
    net, loss, rows, length = tiny("gpt"), NextToken(16), 64, 30
    compiled = trainer.program(net, Tuning(kind="full"), Optimizer(), 10, (("numbers", 1.0, loss),), mesh)
    params = initial(net, mesh)
    tokens = np.ones((rows, length), np.int32)
    batches = trainer.place([{"numbers": {"tokens": tokens, "valid": tokens > 0}}], {"numbers": loss.axes}, mesh)
    lowered = compiled.take.lower(params, compiled.start(params), {}, batches)
    shapes = re.findall(rf"f32\[(\d+),{length - 1},{net.config.width}\]", lowered.compile().as_text())
    return dict(Counter(shapes))


def shared(mesh: Mesh) -> dict[str, Any]:
    """Ragged rows behind a common prefix, put into slots as these come free, also with a cache of int8 codes; and exact
    readings of the same prompts.
    """
    net = network(decoder_config("llama-bias", "nano", vocab=40, length=48, numerics=Numerics()))
    params, rng = reference.random_params(net, 1), np.random.default_rng(0)
    begin = rng.integers(2, 40, 20)
    asked = [(*begin.tolist(), *rng.integers(2, 40, rng.integers(1, 12)).tolist()) for _ in range(150)]
    block = np.array([[PAD] * (32 - len(prompt)) + list(prompt) for prompt in asked], np.int32)
    sampling = Sampling(32, 16, (END, 2, 3), PAD)
    drawn, coded = (
        sample(net, params, block, sampling=way, key=jax.random.key(7), mesh=mesh, batch=32)
        for way in (sampling, dataclasses.replace(sampling, cache_dtype="int8"))
    )
    forms = (((5,), (6, 7)), ((8, 9, 4), (6, 8)))
    closing = np.isin(np.arange(40), (0, 1, 4))
    p = tries.exact(net, params, asked[:11], forms, closing=closing, pad=PAD, mesh=mesh, batch=5)
    return {
        "tokens": drawn.tokens.tolist(), "near_tie": drawn.near_tie.tolist(), "p": p.tolist(),
        "coded": coded.tokens.tolist(),
    }  # fmt: skip


CHECKS = {check.__name__: check for check in (corpus, init, shards, forward, checkpoint, activations, shared)}
# By device count, the checks that one process does: those that one file of tests asks, which one worker runs.
TOGETHER = {
    1: (("corpus",),),
    2: (("corpus",), ("forward",)),
    8: (("corpus", "shared"), ("init", "shards", "forward", "checkpoint", "activations")),
}


def result(devices: int, check: str) -> Any:
    """The result of a check on `devices` virtual devices."""
    return _results(devices, next(names for names in TOGETHER[devices] if check in names))[check]


@functools.cache
def _results(devices: int, names: tuple[str, ...]) -> dict[str, Any]:
    # The count is given in the config alone: a flag of the test's own process must not reach the child.
    command = [sys.executable, __file__, str(devices), *names]
    environment = quick.environment(quick.FUSION)
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    # Donated memory that cannot be reused means that the cache is held twice.
    assert "donated" not in ended.stderr, ended.stderr[-4000:]
    return found


def main(devices: int, names: list[str]) -> None:
    """Run the named checks in this process and print their results."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert len(jax.devices()) == devices
    mesh = make_mesh(parse_mesh(MESHES[devices]))
    print(json.dumps({name: CHECKS[name](mesh) for name in names}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
