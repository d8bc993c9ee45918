"""Checkpoint tensors to parameters.

Weights go straight to their shards: a stacked parameter is made empty on the mesh and filled a layer at a time by a
donated update, so that the host never holds more than one tensor beside what the devices hold.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from subjax.errors import UsageError
from subjax.models.hf_config import family_of
from subjax.models.hf_names import slots, take, their_shape
from subjax.models.network import Network, Params
from subjax.models.source import Source
from subjax.parallel.mesh import put

# Where a model stands inside a larger one, or without its outer name: our prefix -> those found on hubs.
_PREFIXES = {
    "model.": ("model.", "model.language_model.", "language_model.model."),
    "transformer.": ("transformer.", ""),
    "gpt_neox.": ("gpt_neox.", ""),
}
# Buffers that old checkpoints carry (masks, rotary tables), and parts that read images.
_LEFT_OUT = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
_HEADS = ("lm_head.weight", "embed_out.weight")
_OTHER_PARTS = ("vision_tower", "multi_modal_projector")


def _renamed(source: Source, net: Network) -> Callable[[str], str]:
    """How a name of the tables stands in this checkpoint, found out by its embedding."""
    embed = slots(net.config)[0].theirs
    ours = next(prefix for prefix in _PREFIXES if embed.startswith(prefix))
    theirs = next((p for p in _PREFIXES[ours] if p + embed.removeprefix(ours) in source.tensors), ours)
    outer = "language_model." if theirs == "language_model.model." else ""

    def rename(name: str) -> str:
        return theirs + name.removeprefix(ours) if name.startswith(ours) else outer + name

    return rename


def check(source: Source, net: Network) -> Callable[[str], str]:
    """Refuse a checkpoint that lacks a tensor, has one of another shape, or one that the network has no place for.

    What is returned gives each name of the tables as it stands in this checkpoint.
    """
    rename = _renamed(source, net)
    known: set[str] = set()
    for slot in slots(net.config):
        shape = net.declarations[slot.ours].shape
        stacked = "{i}" in slot.theirs
        wanted = their_shape(slot, shape[1:] if stacked else shape)
        for layer in range(shape[0] if stacked else 1):
            name = rename(slot.theirs.format(i=layer))
            known.add(name)
            if name not in source.tensors:
                raise UsageError(
                    f"{source.where}: tensor {name} is missing; fetch the checkpoint again, or mend its index"
                )
            if tuple(source.tensors[name].shape) != wanted:
                found = tuple(source.tensors[name].shape)
                raise UsageError(
                    f"{source.where}: tensor {name} has shape {found} and config.json asks for {wanted};"
                    " take config.json and weights from one checkpoint"
                )
    spare = [name for name in source.tensors if name not in known and not _ignored(name, net)]
    if spare:
        family = family_of(source.config, source.where)
        raise UsageError(
            f"{source.where}: tensor {spare[0]} has no place in a {family} model of this config.json ({len(spare)}"
            " such); take config.json and weights from one checkpoint"
        )
    _check_tie(source, net)
    return rename


def _check_tie(source: Source, net: Network) -> None:
    """Refuse an output matrix beside a tied embedding that is not a copy of it: there is no place for two."""
    heads = [name for name in source.tensors if name.endswith(_HEADS)]
    if net.config.tied and heads:
        embed = _renamed(source, net)(slots(net.config)[0].theirs)
        if not np.array_equal(source.read(heads[0]), source.read(embed)):
            raise UsageError(
                f"{source.where}: {heads[0]} differs from {embed} and config.json ties the two; set tie_word_embeddings"
                " to false there if the matrix is meant"
            )


def _ignored(name: str, net: Network) -> bool:
    if net.config.tied and name.endswith(_HEADS):
        return True  # `_check_tie` looks at it
    return name.endswith(_LEFT_OUT) or any(part in name for part in _OTHER_PARTS)


@functools.lru_cache(maxsize=64)
def _empty(shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _put(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    def put(stack: jax.Array, piece: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, piece.astype(stack.dtype), layer, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _one_layer(sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding of one layer of a stacked parameter."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def load(
    source: Source,
    net: Network,
    *,
    dtype: str = "float32",
    rename: Callable[[str], str] | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> Params:
    """Read a checkpoint's weights as the network's parameters.

    Args:
        source: the checkpoint. net: the network of its config.json.
        dtype: what the parameters are held in; rounding happens on the devices. rename: what `check` gave, where it was
            asked already. shardings: where each goes; the default device where None.

    Raises:
        UsageError: a tensor is missing, has a shape that does not fit, or has no place; it is named.
    """
    rename = rename or check(source, net)
    out: Params = {}
    for slot in slots(net.config):
        shape = net.declarations[slot.ours].shape
        sharding = shardings[slot.ours] if shardings else None
        if "{i}" not in slot.theirs:
            piece = put(take(slot, source.read(rename(slot.theirs)), shape), sharding)
            out[slot.ours] = piece.astype(dtype)
            continue
        stack = _empty(shape, dtype, sharding)()
        for layer in range(shape[0]):
            theirs = source.read(rename(slot.theirs.format(i=layer)))
            piece = put(take(slot, theirs, shape[1:]), _one_layer(sharding))
            # Waited for, since pieces put ahead of the device would pile up on the host.
            stack = jax.block_until_ready(_put(sharding)(stack, piece, jnp.int32(layer)))
        out[slot.ours] = stack
    return out


def stored_dtype(source: Source) -> str:
    """The dtype that most of a checkpoint's scalars are stored in."""
    counts: Counter[str] = Counter()
    for tensor in source.tensors.values():
        counts[tensor.dtype] += int(np.prod(tensor.shape, dtype=np.int64))
    return counts.most_common(1)[0][0]
