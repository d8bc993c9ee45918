"""How each family's tensors are named and laid out in Hugging Face's checkpoints, and the two ways through.

A `Slot` says where one of our arrays (of one layer, where it is stacked) stands in a tensor of theirs. Theirs are
(outputs, inputs) but for GPT-2, whose are (inputs, outputs); ours are (*inputs, *outputs) with heads apart. GPT-2 and
GPT-NeoX keep queries, keys and values in one tensor: three slots then name it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from subjax.models.architecture import DecoderConfig

Layout = Literal["vector", "table", "linear", "conv", "thirds", "by-head"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one of our arrays stands on disk. `theirs` holds {i}, the layer's number, for stacked arrays."""

    ours: str
    theirs: str
    layout: Layout
    part: int = 0  # of three, in a tensor of queries, keys and values

    @property
    def parts(self) -> int:
        """How many of our arrays share the tensor."""
        return 3 if self.layout in ("thirds", "by-head") else 1


def slots(config: DecoderConfig) -> tuple[Slot, ...]:
    """The slots of a network, in the order of a checkpoint; every declared parameter has one."""
    return {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _gpt_neox}[config.family](config)


def _linear(ours: str, theirs: str, biased: bool, layout: Layout = "linear", part: int = 0) -> list[Slot]:
    kernel = Slot(f"blocks/{ours}/kernel", f"{theirs}.weight", layout, part)
    bias_layout: Layout = layout if layout in ("thirds", "by-head") else "vector"
    return [kernel] + [Slot(f"blocks/{ours}/bias", f"{theirs}.bias", bias_layout, part)] * biased


def _norm(ours: str, theirs: str, biased: bool) -> list[Slot]:
    gain = Slot(f"{ours}/gain", f"{theirs}.weight", "vector")
    return [gain] + [Slot(f"{ours}/bias", f"{theirs}.bias", "vector")] * biased


def _llama(config: DecoderConfig) -> tuple[Slot, ...]:
    layer = "model.layers.{i}"
    qkv, out = config.attention_biases != "none", config.attention_biases == "all"
    found = [Slot("embed", "model.embed_tokens.weight", "table")]
    for name in "qkv":
        found += _linear(f"attention/{name}", f"{layer}.self_attn.{name}_proj", qkv)
    found += _linear("attention/o", f"{layer}.self_attn.o_proj", out)
    if config.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            found += _norm(f"blocks/attention/{name}", f"{layer}.self_attn.{name}", False)
    for name in ("gate", "up", "down"):
        found += _linear(f"mlp/{name}", f"{layer}.mlp.{name}_proj", config.mlp_biases)
    norms = {
        "pre": {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
        "post": {"post1": "post_attention_layernorm", "post2": "post_feedforward_layernorm"},
        "sandwich": {
            "norm1": "input_layernorm", "post1": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
            "post2": "post_feedforward_layernorm",
        },
    }[config.placement]  # fmt: skip
    for ours, theirs in norms.items():
        found += _norm(f"blocks/{ours}", f"{layer}.{theirs}", False)
    found += _norm("norm", "model.norm", False)
    return (*found, *[Slot("head", "lm_head.weight", "table")] * (not config.tied))


def _gpt2(config: DecoderConfig) -> tuple[Slot, ...]:
    layer = "transformer.h.{i}"
    found = [Slot("embed", "transformer.wte.weight", "table"), Slot("position", "transformer.wpe.weight", "table")]
    found += _norm("blocks/norm1", f"{layer}.ln_1", True)
    for part, name in enumerate("qkv"):
        found += _linear(f"attention/{name}", f"{layer}.attn.c_attn", True, "thirds", part)
    found += _linear("attention/o", f"{layer}.attn.c_proj", True, "conv")
    found += _norm("blocks/norm2", f"{layer}.ln_2", True)
    found += _linear("mlp/up", f"{layer}.mlp.c_fc", True, "conv")
    found += _linear("mlp/down", f"{layer}.mlp.c_proj", True, "conv")
    found += _norm("norm", "transformer.ln_f", True)
    return (*found, *[Slot("head", "lm_head.weight", "table")] * (not config.tied))


def _gpt_neox(config: DecoderConfig) -> tuple[Slot, ...]:
    layer = "gpt_neox.layers.{i}"
    biased = config.attention_biases == "all"
    found = [Slot("embed", "gpt_neox.embed_in.weight", "table")]
    found += _norm("blocks/norm1", f"{layer}.input_layernorm", True)
    found += _norm("blocks/norm2", f"{layer}.post_attention_layernorm", True)
    for part, name in enumerate("qkv"):
        found += _linear(f"attention/{name}", f"{layer}.attention.query_key_value", biased, "by-head", part)
    found += _linear("attention/o", f"{layer}.attention.dense", biased)
    found += _linear("mlp/up", f"{layer}.mlp.dense_h_to_4h", True)
    found += _linear("mlp/down", f"{layer}.mlp.dense_4h_to_h", True)
    found += _norm("norm", "gpt_neox.final_layer_norm", True)
    return (*found, *[Slot("head", "embed_out.weight", "table")] * (not config.tied))


def inputs_of(ours: str) -> int:
    """How many leading dimensions of one layer's kernel are inputs: the output matrix of attention has heads apart."""
    return 2 if ours.endswith("attention/o/kernel") else 1


def their_shape(slot: Slot, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that their tensor must have, from the shape of our array (of one layer)."""
    if slot.layout == "table":
        return tuple(shape)
    if slot.layout == "vector" or slot.ours.endswith("/bias"):
        return (slot.parts * math.prod(shape),)
    n = inputs_of(slot.ours)
    inputs, outputs = math.prod(shape[:n]), math.prod(shape[n:])
    if slot.layout in ("conv", "thirds"):
        return (inputs, slot.parts * outputs)
    return (slot.parts * outputs, inputs)


def take(slot: Slot, theirs: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Our array (of one layer, of `shape`) out of their tensor; a view of it."""
    if slot.layout in ("vector", "table", "conv"):
        return theirs.reshape(shape)
    if slot.layout == "linear":
        return theirs.T.reshape(shape)
    if slot.layout == "thirds":
        third = theirs.shape[-1] // 3
        return theirs[..., slot.part * third : (slot.part + 1) * third].reshape(shape)
    heads, dim = shape[-2:]
    mine = theirs.reshape(heads, 3, dim, *theirs.shape[1:])[:, slot.part]
    return mine if mine.ndim == 2 else mine.transpose(2, 0, 1)


def give(parts: Mapping[int, tuple[Slot, np.ndarray]]) -> np.ndarray:
    """Their tensor from our arrays of one layer, by part."""
    slot, ours = parts[0]
    if slot.layout in ("vector", "table", "conv"):
        return ours.reshape(their_shape(slot, ours.shape))
    if slot.layout == "linear":
        return np.ascontiguousarray(ours.reshape(their_shape(slot, ours.shape)[::-1]).T)
    arrays = [parts[part][1] for part in range(3)]
    if slot.layout == "thirds":
        flat = [a.reshape(-1) if slot.ours.endswith("/bias") else a.reshape(a.shape[0], -1) for a in arrays]
        return np.concatenate(flat, axis=-1)
    moved = [a if a.ndim == 2 else a.transpose(1, 2, 0) for a in arrays]  # (heads, dim[, inputs])
    return np.stack(moved, axis=1).reshape(their_shape(slot, ours.shape))
