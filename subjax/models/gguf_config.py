"""GGUF metadata to what config.json of the same model says, one mapping an architecture.

Settings stand in the form of the checkpoints on hubs (`rope_theta`, `rope_scaling`). What the file does not hold is
what llama.cpp takes for it: the activation of each family, the period of local layers, Gemma 27B's query scale.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from subjax.errors import UsageError
from subjax.models.gguf_header import Header
from subjax.models.gguf_names import ROPE_FACTORS, require_architecture

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_PERIOD = {"gemma2": 2, "gemma3": 6}  # every second, every sixth layer is global


class Fields:
    """The metadata under the architecture's name, each value checked as it is asked for."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str):
        self.metadata, self.architecture, self.where = metadata, architecture, where

    def get(self, key: str) -> Any:
        """The value as it is, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def _refuse(self, key: str, what: str) -> UsageError:
        return UsageError(
            f"{self.where}: GGUF metadata {self.architecture}.{key} {what};"
            " convert the model again with a present llama.cpp"
        )

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; `default` where the file has none, unless that is None."""
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise self._refuse(key, "is missing")
        if type(value) is not int or value <= 0:
            raise self._refuse(key, f"is {value!r:.40}, not a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; `default` where the file has none, unless that is None."""
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise self._refuse(key, "is missing")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._refuse(key, f"is {value!r:.40}, not a positive number")
        return float(value)


def config_of(header: Header, where: str) -> dict[str, Any]:
    """The config.json of a GGUF file's model.

    Raises:
        UsageError: an architecture outside the list, a key that is missing or no number, one part of several, or
            something that the family's config.json cannot say (a rotary scaling, a partial rotation).
    """
    architecture = require_architecture(header.metadata, where)
    if header.metadata.get("split.count", 1) != 1:
        parts = header.metadata["split.count"]
        raise UsageError(f"{where}: one of {parts} parts of a GGUF file; join them with llama-gguf-split --merge")
    if "token_embd.weight" not in header.tensors:
        raise UsageError(f"{where}: tensor 'token_embd.weight' is missing; take a file with the model's weights")
    fields = Fields(header.metadata, architecture, where)
    if fields.whole("block_count") > len(header.tensors):
        layers, tensors = fields.whole("block_count"), len(header.tensors)
        raise UsageError(f"{where}: damaged GGUF file: {layers} layers in {tensors} tensors; fetch the file again")
    read = {"gpt2": _gpt2, "gptneox": _gpt_neox}.get(architecture, _llama_like)
    tokenizer = {
        f"{name}_token_id": header.metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in header.metadata
    }
    # Rows of the table count, not tokens of the tokenizer: a config.json may have more (padding), and the converter
    # cuts Gemma 3's.
    shared = {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    return read(fields, header) | shared | tokenizer


def _gpt2(fields: Fields, header: Header) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": fields.whole("block_count"),
        "n_embd": fields.whole("embedding_length"),
        "n_head": fields.whole("attention.head_count"),
        "n_positions": fields.whole("context_length"),
        "n_inner": fields.whole("feed_forward_length"),
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _sizes(fields: Fields) -> dict[str, Any]:
    return {
        "num_hidden_layers": fields.whole("block_count"),
        "hidden_size": fields.whole("embedding_length"),
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_attention_heads": fields.whole("attention.head_count"),
        "max_position_embeddings": fields.whole("context_length"),
    }


def _gpt_neox(fields: Fields, header: Header) -> dict[str, Any]:
    sizes = _sizes(fields)
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    parallel = fields.get("use_parallel_residual")
    return sizes | {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        "rotary_pct": fields.whole("rope.dimension_count") / head_dim,
        "rotary_emb_base": fields.number("rope.freq_base", 10_000.0),
        "use_parallel_residual": True if parallel is None else bool(parallel),
        "hidden_act": "gelu",
        "attention_bias": "blk.0.attn_qkv.bias" in header.tensors,
    }


def _llama_like(fields: Fields, header: Header) -> dict[str, Any]:
    sizes = _sizes(fields)
    head_dim = fields.whole("attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"])
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.whole(key, head_dim) != head_dim:
            raise UsageError(
                f"{fields.where}: GGUF metadata {fields.architecture}.{key} is {fields.get(key)} and a head's size"
                f" {head_dim}; models where the two differ are not supported: take another model of the family"
            )
    config = sizes | {
        "num_key_value_heads": fields.whole("attention.head_count_kv", sizes["num_attention_heads"]),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(fields, header, head_dim),
    }
    read = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "olmo2": _olmo2}.get(fields.architecture, _gemma)
    return config | read(fields, header, config)


def _llama(fields: Fields, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    # Mistral is stored under Llama's name, and is told from it where it is another computation.
    kind: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if fields.get("attention.sliding_window"):
        window = fields.whole("attention.sliding_window")
        kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return kind | {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2(fields: Fields, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return kind | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(fields: Fields, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    kind = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
    return kind | {"hidden_act": "silu", "attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _olmo2(fields: Fields, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("attention.sliding_window"):
        raise UsageError(
            f"{fields.where}: an OLMo 3 model (olmo2 with {fields.architecture}.attention.sliding_window), which is not"
            " supported; the nearest that is: OLMo 2"
        )
    kind = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    return kind | {"hidden_act": "silu", "attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _gemma(fields: Fields, header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    scalar = config["head_dim"]
    if layers == _LAYERS_OF_27B[fields.architecture]:
        scalar = config["hidden_size"] // heads
    shared = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "layer_types": _layer_types(fields, layers),
    }
    if fields.architecture == "gemma2":
        return shared | {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "sliding_window": fields.whole("attention.sliding_window", 4096),
            "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
        }
    windowed = bool(fields.get("attention.sliding_window"))
    capped = bool(fields.get("final_logit_softcapping"))
    return shared | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": fields.whole("attention.sliding_window") if windowed else None,
        "rope_theta": fields.number("rope.freq_base"),  # the family's own is not the 10,000 of others
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10_000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": fields.number("final_logit_softcapping") if capped else None,
    }


def _layer_types(fields: Fields, layers: int) -> list[str]:
    """Which layers are local: each but the last of a period, or as a list of the file says."""
    pattern = fields.get("attention.sliding_window_pattern")
    if fields.architecture == "gemma3" and not fields.get("attention.sliding_window"):
        local = [False] * layers
    elif isinstance(pattern, list):
        if len(pattern) != layers:
            key = f"{fields.architecture}.attention.sliding_window_pattern"
            raise UsageError(
                f"{fields.where}: GGUF metadata {key} has {len(pattern)} entries for {layers} layers;"
                " convert the model again with a present llama.cpp"
            )
        local = [bool(entry) for entry in pattern]
    else:
        period = fields.whole("attention.sliding_window_pattern", _PERIOD[fields.architecture])
        local = [bool((layer + 1) % period) for layer in range(layers)]
    return ["sliding_attention" if entry else "full_attention" for entry in local]


def _rope_scaling(fields: Fields, header: Header, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FACTORS in header.tensors:
        return _llama3_scaling(fields, header, head_dim)
    kind = fields.get("rope.scaling.type")
    # Old files name no type, or have the factor under another key; both mean a linear scaling.
    key = "rope.scale_linear" if fields.get("rope.scaling.factor") is None else "rope.scaling.factor"
    if kind == "none" or (kind is None and not fields.get(key)):
        return None
    if kind not in (None, "linear"):
        raise UsageError(
            f"{fields.where}: rotary scaling {kind!r} of a GGUF file is not supported (linear and Llama 3's are);"
            " take the model in its safetensors form, or without its longer context"
        )
    return {"rope_type": "linear", "factor": fields.number(key)}


def _llama3_scaling(fields: Fields, header: Header, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's rotary scaling (Llama Team 2024, section 3.4.2) from the factors that its frequencies are divided by.

    The file has the factors alone. They are what Llama 3.1 and later have (with a factor of 8, or 32 in the small
    models), or they cannot be told.
    """
    tensor = header.tensors[ROPE_FACTORS]
    refusal = UsageError(
        f"{fields.where}: tensor {ROPE_FACTORS!r} is not the rotary scaling of Llama 3.1 to 3.3, and config.json cannot"
        " say what else it is; take the model in its safetensors form"
    )
    if tensor.kind.name != "F32" or tensor.shape != (head_dim // 2,) or fields.architecture != "llama":
        raise refusal
    factors = np.frombuffer(header.data, np.float32, head_dim // 2, tensor.offset).astype(np.float64)
    factor = round(float(factors.max()), 4)
    low, high, original = _LLAMA3.values()
    turns = original * fields.number("rope.freq_base", 10_000.0) ** (-2 * np.arange(head_dim // 2) / head_dim)
    ramp = np.clip((turns / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / (ramp + (1 - ramp) / factor), rtol=1e-4, atol=0):  # theirs is computed in float32
        raise refusal
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
