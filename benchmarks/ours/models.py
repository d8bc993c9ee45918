"""The model of a comparison in subjax: network, parameters and numerics from plain data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subjax.models import weights
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import Network, Params, network
from subjax.models.source import open_source
from subjax.schema_pretrained import Numerics


def numerics(dtype: str) -> Numerics:
    """What a study would set: float32 at full precision, or bfloat16 weights, products and cache."""
    if dtype == "float32":
        return Numerics()
    return Numerics(dtype="bfloat16", cache_dtype="bfloat16", weights_dtype="bfloat16", matmul_precision="default")


def load(model: Mapping[str, Any]) -> tuple[Network, Params]:
    """Network and parameters of `benchmarks.data.model`'s plain data."""
    settings = numerics(model["dtype"])
    if "source" in model:
        source = open_source(model["source"])
        net = network(decoder_config_of(source.config, numerics=settings, where=model["source"]))
        return net, weights.load(source, net, dtype=settings.weights_dtype)
    net = network(decoder_config_of(model["config"], numerics=settings))
    dtype = jnp.dtype(settings.weights_dtype)
    draw = jax.jit(lambda key: {name: value.astype(dtype) for name, value in net.init(key).items()})
    return net, draw(jax.random.key(0))
