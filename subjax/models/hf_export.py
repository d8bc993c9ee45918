"""Models to files that transformers, peft and what builds on them read: a Hugging Face folder, or a PEFT adapter's.

Tensors are written one at a time, each made as its turn comes: beside what the caller holds, the host has one tensor
of the model in memory. A folder is written under another name and renamed, so that it is whole or not there.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from subjax import files
from subjax.errors import UsageError
from subjax.models import adapters
from subjax.models.architecture import DecoderConfig, Rope
from subjax.models.hf_config import decoder_config_of, text_part
from subjax.models.hf_names import Slot, give, slots, take, their_shape
from subjax.models.network import Adapter, Network
from subjax.models.places import INDEX
from subjax.models.source import Source
from subjax.models.weights import check
from subjax.schema import Numerics, Tuning

SHARD = 5_000_000_000  # bytes of tensors in one file; transformers' own limit

_DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "float16": (np.dtype(np.float16), "F16"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}
# By `model_type` of config.json: the class of transformers that the tensors are named for.
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
_ACTIVATIONS = {"gelu": "gelu_new", "gelu-exact": "gelu", "silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor to be written, in Hugging Face's layout: `read` makes it, in any dtype; `dtype` is what is written."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "float16" or "bfloat16"
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * _DTYPES[self.dtype][0].itemsize


# ---- what is written ----


def stored_weights(net: Network, source: Source, dtype: str | None = None) -> dict[str, Weight]:
    """A checkpoint's own tensors by the family's names: bit for bit, or rounded to `dtype`.

    Tensors that the network has no place for (masks, a copy of a tied matrix, the part that reads images) are left out.

    Raises:
        UsageError: a tensor is missing, has a shape that does not fit, or has no place.
    """
    rename = check(source, net)
    out = {}
    for name, _, _ in _tensors(net):
        stored = source.tensors[rename(name)]
        out[name] = Weight(stored.shape, dtype or stored.dtype, functools.partial(source.read, rename(name)))
    return out


def merged_weights(
    net: Network,
    arrays: Mapping[str, np.ndarray],
    adapter: Adapter | None = None,
    source: Source | None = None,
    *,
    held: str = "float32",
    dtype: str = "float32",
) -> dict[str, Weight]:
    """The tensors of a tuned model: `arrays` by our names, the rest out of `source`, LoRA pairs multiplied out.

    Args:
        net: the network. arrays: its parameters, all or, with a source, those that differ from it.
        adapter: LoRA pairs as `adapters.join` gives them. source: the checkpoint that the model was tuned from.
        held: the dtype that the source's weights were rounded to where the model was tuned; sums are in float32.
        dtype: what is written.

    Raises:
        UsageError: as `stored_weights`.
    """
    rename = check(source, net) if source is not None else str
    out = {}
    for name, layer, members in _tensors(net):
        original = functools.partial(source.read, rename(name)) if source is not None else None
        read = functools.partial(_assembled, net, members, layer, arrays, adapter or {}, original, held)
        out[name] = Weight(their_shape(members[0], _shape(net, members[0])), dtype, read)
    return out


def _tensors(net: Network) -> Iterator[tuple[str, int | None, tuple[Slot, ...]]]:
    """Every tensor of a checkpoint: its name, its layer (None outside the layers), and which arrays of ours are in it."""
    groups: dict[str, list[Slot]] = {}
    for slot in slots(net.config):
        groups.setdefault(slot.theirs, []).append(slot)
    for theirs, members in groups.items():
        for layer in range(net.config.layers) if "{i}" in theirs else (None,):
            yield theirs.format(i=layer), layer, tuple(members)


def _shape(net: Network, slot: Slot) -> tuple[int, ...]:
    """The shape of our array, of one layer where it is stacked."""
    shape = net.declarations[slot.ours].shape
    return shape[1:] if "{i}" in slot.theirs else shape


def _matrix(slot: Slot) -> str:
    """What LoRA calls the matrix of a slot ("q"); "" for what is no matrix of a layer."""
    return slot.ours.split("/")[-2] if slot.ours.endswith("/kernel") else ""


def _assembled(
    net: Network,
    members: tuple[Slot, ...],
    layer: int | None,
    arrays: Mapping[str, np.ndarray],
    adapter: Adapter,
    original: Callable[[], np.ndarray] | None,
    held: str,
) -> np.ndarray:
    """One tensor, in float32, from our arrays of a layer where there are such, else from the source's own tensor."""
    theirs = None
    parts = {}
    for slot in members:
        if slot.ours in arrays:
            whole = arrays[slot.ours]
            ours = np.asarray(whole if layer is None else whole[layer], np.float32)
        else:
            assert original is not None, f"{slot.ours} is in no array, and there is no source"
            theirs = original() if theirs is None else theirs
            ours = take(slot, theirs, _shape(net, slot))
            ours = ours.astype(_DTYPES[held][0], copy=False).astype(np.float32, copy=False)
        if pair := adapter.get(_matrix(slot)):
            a, b, scale = (np.asarray(pair[name][layer], np.float32) for name in ("a", "b", "scale"))
            rank = b.shape[0]
            ours = ours + (scale * (a.reshape(-1, rank) @ b.reshape(rank, -1))).reshape(ours.shape)
        parts[slot.part] = (slot, ours)
    return give(parts)


def model_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of what is written: a checkpoint's own (of its language model), with the class and the dtype.

    Code that came with the checkpoint is not copied, so what points to it is left out.
    """
    inner = dict(text_part(config))
    # A model that also reads images has them in the outer part alone.
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in config:
            inner.setdefault(key, config[key])
    # The older name is read by versions of transformers old and new; a file that has the newer one keeps it.
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    left_out = ("auto_map", "dtype", "torch_dtype")
    return {
        **{name: value for name, value in inner.items() if name not in left_out},
        "architectures": [_CLASSES[inner["model_type"]]],
        key: dtype,
    }


def hf_config_of(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a plain GPT-2 or Llama of our own making, without dtype and token ids.

    Raises:
        UsageError: it is neither: config.json of these two families cannot say it.
    """
    if config.family == "gpt2":
        found: dict[str, Any] = {
            "model_type": "gpt2",
            "n_positions": config.length,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.hidden,
            "activation_function": _ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            # The family's defaults drop a tenth; these models were trained without.
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    else:
        found = {
            "model_type": "llama",
            "max_position_embeddings": config.length,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.hidden,
            "hidden_act": _ACTIVATIONS[config.activation],
            "rms_norm_eps": config.norm_eps,
            "attention_bias": config.attention_biases == "all",
            "mlp_bias": config.mlp_biases,
            "rope_theta": config.rope.theta,
        }
    found |= {
        "vocab_size": config.vocab,
        "tie_word_embeddings": config.tied,
        "architectures": [_CLASSES[found["model_type"]]],
    }
    numerics = Numerics(config.dtype, attention=config.attention, matmul_precision=config.matmul_precision)  # type: ignore[arg-type]
    # A config.json says nothing of how a model was initialized.
    if dataclasses.replace(decoder_config_of(found, numerics=numerics), embed_std=config.embed_std) != config:
        raise UsageError(f"a config.json of {found['model_type']} cannot describe this model: {config}")
    return found


# ---- a PEFT adapter ----


def adapter_files(
    net: Network, tuning: Tuning, tuned: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Weight]]:
    """The adapter_config.json (but for the base's name) and the tensors of a PEFT adapter that is this LoRA.

    Where a family keeps queries, keys and values in one matrix, the pairs of those that are tuned become one pair of
    as many times the rank: A's are stacked, and each B fills its own outputs and columns. Its alpha is raised so that
    the scale of B A stays.

    Args:
        net: the network. tuning: LoRA settings. tuned: the pairs, by our names.
        config: the config.json of the checkpoint, which says what its modules are called.

    Raises:
        UsageError: `tuning` is no LoRA.
    """
    if tuning.kind != "lora":
        raise UsageError(f"tuning.kind={tuning.kind} is no PEFT adapter; export the merged model")
    _, adapter = adapters.join(tuning, tuned, {})
    layers = sorted(set(tuning.layers)) or list(range(net.config.layers))
    # transformers calls the language model so inside one that reads images.
    inside = "model.language_model." if text_part(config) is not config else "model."
    weights: dict[str, Weight] = {}
    modules: dict[str, int] = {}  # by the name inside a layer: how many of our matrices it holds that are tuned
    prefix = ""
    for name, layer, members in _tensors(net):
        matrices = [slot for slot in members if _matrix(slot) in adapter]
        if layer not in layers or not matrices:
            continue
        prefix, _, module = members[0].theirs.removesuffix(".weight").partition("{i}.")
        modules[module] = len(matrices)
        at = f"base_model.model.{name.removesuffix('.weight').replace('model.', inside, 1)}"
        pairs = {slot: (adapter[_matrix(slot)]["a"][layer], adapter[_matrix(slot)]["b"][layer]) for slot in matrices}
        a, b = _peft_pair(members, pairs)
        weights[f"{at}.lora_A.weight"] = Weight(a.shape, "float32", functools.partial(np.asarray, a))
        weights[f"{at}.lora_B.weight"] = Weight(b.shape, "float32", functools.partial(np.asarray, b))
    return {}, weights
