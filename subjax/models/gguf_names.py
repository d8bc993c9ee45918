"""GGUF's tensor names and layouts against Hugging Face's, by architecture.

The `gguf` library knows what llama.cpp's converter calls each module of Hugging Face's; the tables here say which
modules an architecture has. A `Place` says which stored tensor a Hugging Face tensor comes from, and what the converter
did to it that reading must undo.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from subjax.errors import UsageError
from subjax.models.gguf_header import StoredTensor

# as-is; rotary: rows of each head interleaved, (i, i + half) side by side; thirds: rows of all queries, then of all
# keys, then of all values, where Hugging Face has the three of each head together; transposed; raised: 1 was added.
Change = Literal["as-is", "rotary", "thirds", "transposed", "raised"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor comes from, and what it takes to have it in Hugging Face's layout."""

    stored: str
    change: Change
    heads: int  # of the rows that are reordered; 0 where none are


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Modules of an architecture by Hugging Face's names, and the converter's changes by the ends of those names."""

    embed: str
    norm: str
    head: str
    layer: str  # the beginning of the names of layer {i}
    inside: tuple[str, ...]
    changes: Mapping[str, Change] = dataclasses.field(default_factory=dict)


_MATRICES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _llama(*inside: str, **changes: Change) -> Architecture:
    return Architecture("model.embed_tokens", "model.norm", "lm_head", "model.layers.{i}.", inside, changes)


# By general.architecture.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama(*_MATRICES, *_BEFORE, q_proj="rotary", k_proj="rotary"),
    "qwen2": _llama(*_MATRICES, *_BEFORE),
    "qwen3": _llama(*_MATRICES, *_BEFORE, *_QK_NORMS),
    "gemma2": _llama(*_MATRICES, *_SANDWICH, norm="raised"),
    "gemma3": _llama(*_MATRICES, *_SANDWICH, *_QK_NORMS, norm="raised"),
    "olmo2": _llama(*_MATRICES, *_AFTER, *_QK_NORMS),
    "gpt2": Architecture(
        embed="transformer.wte",
        norm="transformer.ln_f",
        head="lm_head",
        layer="transformer.h.{i}.",
        inside=("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        changes={"c_attn": "transposed", "c_proj": "transposed", "c_fc": "transposed"},
    ),
    "gptneox": Architecture(
        embed="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        head="embed_out",
        layer="gpt_neox.layers.{i}.",
        inside=(
            "input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense",
            "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
        ),
        changes={"query_key_value": "thirds"},
    ),
}  # fmt: skip
_POSITIONS = {"gpt2": ("transformer.wpe",)}  # learned positions, beside the layers
ROPE_FACTORS = "rope_freqs.weight"  # told by the config


def require_architecture(metadata: Mapping[str, Any], where: str) -> str:
    """The file's architecture.

    Raises:
        UsageError: it is missing or outside the list; the nearest one is named.
    """
    found = metadata.get("general.architecture")
    if found not in ARCHITECTURES:
        near = difflib.get_close_matches(str(found), ARCHITECTURES, 1, 0.0)[0]
        raise UsageError(
            f"{where}: GGUF architecture {found!r} is not supported; the nearest that is: {near!r}"
            f" (all: {', '.join(ARCHITECTURES)})"
        )
    return found


def _modules(name: str, layers: int) -> dict[str, str]:
    """Hugging Face's module by the stored module's name."""
    import gguf

    architecture = ARCHITECTURES[name]
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    stored = gguf.get_tensor_name_map(number, layers)
    modules = [architecture.embed, *_POSITIONS.get(name, ()), architecture.norm, architecture.head]
    modules += [architecture.layer.format(i=layer) + part for layer in range(layers) for part in architecture.inside]
    # Gemma 2 never has an output matrix of its own, and so no name for it.
    return {stored[module]: module for module in modules if module in stored}


def places(
    name: str, tensors: Mapping[str, StoredTensor], layers: int, heads: int, kv_heads: int, where: str
) -> dict[str, Place]:
    """The place of every tensor of the file, by Hugging Face's name.

    Raises:
        UsageError: a tensor that the architecture does not have, a matrix or norm that the file lacks, or one that
            cannot be reordered by heads.
    """
    architecture, modules = ARCHITECTURES[name], _modules(name, layers)
    found = {}
    for stored, tensor in tensors.items():
        if stored == ROPE_FACTORS:
            continue
        module, _, kind = stored.rpartition(".")
        if module not in modules or kind not in ("weight", "bias"):
            raise UsageError(
                f"{where}: tensor {stored!r} has no place in a {name!r} model of {layers} layers;"
                " take a file that llama.cpp converted from a plain checkpoint of that family"
            )
        change = _change(architecture, modules[module], tensor)
        of = {"rotary": kv_heads if module.endswith("k") else heads, "thirds": heads}.get(change, 0)
        parts = {"rotary": 2, "thirds": 3}.get(change, 1) * max(of, 1)
        if tensor.shape[0] % parts:
            raise UsageError(
                f"{where}: tensor {stored!r} has {tensor.shape[0]} rows, which do not divide among {of} heads;"
                " the file is damaged or was converted wrongly: take another"
            )
        found[f"{modules[module]}.{kind}"] = Place(stored, change, of)
    for stored, module in modules.items():
        if module != architecture.head and f"{stored}.weight" not in tensors:
            raise UsageError(f"{where}: tensor '{stored}.weight' is missing; take a whole file (GGUF of one part)")
    return found


def _change(architecture: Architecture, module: str, tensor: StoredTensor) -> Change:
    for end, change in architecture.changes.items():
        if module.endswith(end) and (change != "transposed" or len(tensor.shape) == 2):
            return change
    return "as-is"
