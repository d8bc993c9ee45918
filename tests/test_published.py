"""The shipped configs of models too large to be had here: their steps, compiled at full size with abstract weights."""

import functools

import jax
import jax.numpy as jnp
import pytest
from test_hf_families import PUBLISHED

from subjax.models import adapters
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import network
from subjax.parallel.mesh import make_mesh
from subjax.sample import drawing, slots
from subjax.schema import Optimizer, Tuning
from subjax.schema_pretrained import Numerics
from subjax.train.losses import NextToken
from subjax.train.trainer import program

BF16 = Numerics(dtype="bfloat16", weights_dtype="bfloat16", cache_dtype="bfloat16", matmul_precision="default")
ROWS, PROMPT, COMPLETION, PREFIX, GROUP = 66, 112, 48, 32, 8
MODELS = {"pythia-160m": Numerics(), "Llama-3.2-1B": BF16, "gemma-3-4b": BF16, "Qwen2.5-7B": BF16}


@functools.cache
def net_of(name: str):
    return network(decoder_config_of(PUBLISHED[name], numerics=MODELS[name]))


def abstract(net, dtype):
    return {n: jax.ShapeDtypeStruct(d.shape, jnp.dtype(dtype)) for n, d in net.declarations.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_students_step_compiles_at_full_size(name):
    net, tuning = net_of(name), Tuning(kind="lora", rank=8)
    optimizer = Optimizer(name="adamw", lr=2e-4, schedule="linear", warmup=5)
    made = program(net, tuning, optimizer, 10, (("numbers", 1.0, NextToken(COMPLETION)),), make_mesh())
    tuned = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (shape, _) in adapters.tuned_axes(net, tuning).items()}
    state = jax.eval_shape(made.start, tuned)
    rows = {
        "tokens": jax.ShapeDtypeStruct((1, ROWS, PROMPT + COMPLETION), jnp.int32),
        "valid": jax.ShapeDtypeStruct((1, ROWS, PROMPT + COMPLETION), bool),
    }
    compiled = made.take.lower(tuned, state, abstract(net, MODELS[name].weights_dtype), {"numbers": rows}).compile()
    held = compiled.memory_analysis().argument_size_in_bytes
    width = jnp.dtype(MODELS[name].weights_dtype).itemsize
    assert held == pytest.approx(net.parameters * width, rel=0.03)  # the rest: adapters, Adam's moments, a batch


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_sampler_compiles_at_full_size(name):
    net = net_of(name)
    settings = drawing.Sampling(PROMPT, COMPLETION, (2,), 0, cache_dtype=MODELS[name].cache_dtype)
    params = abstract(net, MODELS[name].weights_dtype)
    made = slots.programs(net, settings, make_mesh(), True)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    state, cache = jax.eval_shape(lambda: made.begin(ROWS, PROMPT))
    prefix = jax.eval_shape(made.share, params, int32(PREFIX), int32(), None)
    valid = jax.ShapeDtypeStruct((GROUP, PROMPT), bool)
    logits, kv = jax.eval_shape(made.prefill, params, prefix, int32(GROUP, PROMPT), valid, None)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    placing = (state, cache, logits, kv, *(int32(GROUP),) * 4, key, None)
    placed = jax.eval_shape(made.place, *placing)  # as many bytes as before, whatever they lie on
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), placed) == (state, cache)
    decoding = (params, prefix, state, cache, int32(), None, None)
    *_, seen = jax.eval_shape(made.decode, *decoding)
    assert seen.drawn.shape == (ROWS, COMPLETION)
    config = net.config
    # Nobody reads the last token that is drawn.
    held = config.layers * ROWS * (PROMPT + COMPLETION - 1) * config.kv_heads * config.head_dim
    assert cache.k.size == cache.v.size == held
    made.decode.lower(*decoding).compile()
    made.prefill.lower(params, prefix, int32(GROUP, PROMPT), valid, None).compile()
