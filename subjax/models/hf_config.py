"""Hugging Face's config.json to a `DecoderConfig`, one mapping a family; a family outside the list is refused by name.

Files of either form are read, as transformers reads them: rotary settings stand in `rope_parameters` (newer) or in
`rope_theta` and `rope_scaling` (older), and local layers in `layer_types` or in a pattern. What a file leaves out has
the family's own default.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from subjax.errors import UsageError
from subjax.models.architecture import DecoderConfig, Rope
from subjax.schema import Numerics

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A decoder family: its name for people, how its config.json is read, and what stands for keys left out."""

    title: str
    read: Callable[[Config], dict[str, Any]]
    defaults: Config = dataclasses.field(default_factory=dict)


_ACTIVATIONS = {
    "gelu": "gelu-exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
_LAYERS = ("full_attention", "sliding_attention")


def _activation(config: Config, key: str, default: str) -> str:
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UsageError(f"config.json: activation {name!r} is not one of {known}; this model cannot be run")
    return _ACTIVATIONS[name]


def _size(config: Config, key: str, otherwise: int | None = None) -> int:
    """A number of elements, at least 1; `otherwise` is what stands for null and for a key left out."""
    value: Any = config[key] if otherwise is None else config.get(key)
    if value is None:
        value = otherwise
    size = int(value)
    if size < 1:
        raise UsageError(f"config.json: {key} is {size}, and must be 1 or more; take the config.json as published")
    return size


def _rope_kind(scaling: Config) -> str:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _rope(config: Config, layers: str | None = None, theta: float = 10_000.0) -> Rope:
    """The rotary settings of a config.json; of the kind `layers` where the file has some for each kind of layer.

    Where a file has both, `rope_scaling` stands in the place of `rope_parameters`, or is added to those of a kind.
    """
    found, scaling = dict(config.get("rope_parameters") or {}), dict(config.get("rope_scaling") or {})
    scaling = {**(found.get(layers) or {}), **scaling} if layers else scaling or found
    kind = _rope_kind(scaling)
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or theta)
    fraction = float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if fraction != 1.0 and config.get("model_type") != "gpt_neox":
        raise UsageError(
            f"config.json: partial_rotary_factor {fraction:g} is known of GPT-NeoX alone; this model cannot be run"
        )
    if kind == "default":
        return Rope(base, fraction)
    if kind == "linear":
        return Rope(base, fraction, "linear", float(scaling["factor"]))
    if kind == "llama3":
        return Rope(
            base,
            fraction,
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise UsageError(
        f"config.json: rotary scaling {kind!r} is not supported (default, linear and llama3 are); a copy of the folder"
        " without its rope_scaling serves texts up to the length that the model was first trained on"
    )


def _rms(config: Config) -> dict[str, Any]:
    """What Llama and its relatives share."""
    return {
        "norm": "rmsnorm",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "positions": "rotary",
        "activation": _activation(config, "hidden_act", default="silu"),
        "gated": True,
        "rope": _rope(config),
        "family": "llama",
    }


def _windows(config: Config, layers: list[bool]) -> dict[str, Any]:
    """Local layers, from `layer_types` where the file has them."""
    if kinds := config.get("layer_types"):
        if len(kinds) != len(layers):
            raise UsageError(
                f"config.json: layer_types has {len(kinds)} entries for {len(layers)} layers; take the config.json as"
                " published"
            )
        if unknown := [kind for kind in kinds if kind not in _LAYERS]:
            raise UsageError(
                f"config.json: layer type {unknown[0]!r} is not one of {', '.join(_LAYERS)}; this model cannot be run"
            )
        layers = [kind == "sliding_attention" for kind in kinds]
    if not config.get("sliding_window") or not any(layers):
        return {}
    return {"local": tuple(layers), "window": _size(config, "sliding_window")}


def _llama(config: Config) -> dict[str, Any]:
    return _rms(config) | {
        "tied": bool(config.get("tie_word_embeddings", False)),
        "attention_biases": "all" if config.get("attention_bias") else "none",
        "mlp_biases": bool(config.get("mlp_bias")),
    }


def _mistral(config: Config) -> dict[str, Any]:
    layers = _size(config, "num_hidden_layers")
    return _llama(config) | _windows({**config, "layer_types": None}, [True] * layers)


def _qwen2(config: Config) -> dict[str, Any]:
    layers = _size(config, "num_hidden_layers")
    if not config.get("use_sliding_window"):  # many files have a window that is not used
        config = {**config, "sliding_window": None}
    local = [layer >= int(config.get("max_window_layers", layers)) for layer in range(layers)]
    return _llama(config) | _windows(config, local) | {"attention_biases": "qkv"}


def _qwen3(config: Config) -> dict[str, Any]:
    biases = "all" if config.get("attention_bias") else "none"
    return _qwen2(config) | {"attention_biases": biases, "qk_norm": "head"}


def _gemma(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise UsageError("config.json: use_bidirectional_attention makes an encoder; give a model that writes text")
    width = _size(config, "hidden_size")
    return _rms(config) | {
        "activation": _activation(config, "hidden_activation", default="gelu_pytorch_tanh"),
        "tied": bool(config.get("tie_word_embeddings", True)),
        "attention_biases": "all" if config.get("attention_bias") else "none",
        "placement": "sandwich",
        "norm_offset": 1.0,
        "embed_scale": width**0.5,
        "query_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_cap": float(config.get("attn_logit_softcapping") or 0.0),
        "logit_cap": float(config.get("final_logit_softcapping") or 0.0),
    }


def _gemma2(config: Config) -> dict[str, Any]:
    config = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, **config}
    alternating = [layer % 2 == 0 for layer in range(_size(config, "num_hidden_layers"))]
    return _gemma(config) | _windows(config, alternating)


def _gemma3(config: Config) -> dict[str, Any]:
    config = {"sliding_window": 4096, **config}
    period = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    pattern = [bool((layer + 1) % period) for layer in range(_size(config, "num_hidden_layers"))]
    local = dict(dict(config.get("rope_parameters") or {}).get("sliding_attention") or {})
    local_theta = float(local.get("rope_theta", config.get("rope_local_base_freq", 10_000.0)))
    if (kind := _rope_kind(local)) != "default":
        raise UsageError(f"config.json: rotary scaling {kind!r} of local layers is not supported")
    return (
        _gemma(config)
        | {"qk_norm": "head", "rope": _rope(config, "full_attention", 1_000_000.0), "local_rope": Rope(local_theta)}
        | _windows(config, pattern)
    )


def _olmo2(config: Config) -> dict[str, Any]:
    config = {"rms_norm_eps": 1e-5, **config}
    return _llama(config) | {"placement": "post", "qk_norm": "width"}


def _gpt2(config: Config) -> dict[str, Any]:
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UsageError("config.json: scale_attn_by_inverse_layer_idx is not supported; this model cannot be run")
    width = _size(config, "n_embd")
    scaled = config.get("scale_attn_weights", True)
    return {
        "norm": "layernorm",
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "positions": "learned",
        "activation": _activation(config, "activation_function", default="gelu_new"),
        "gated": False,
        "tied": bool(config.get("tie_word_embeddings", True)),
        "attention_biases": "all",
        "mlp_biases": True,
        "family": "gpt2",
        "width": width,
        "layers": _size(config, "n_layer"),
        "heads": _size(config, "n_head"),
        "hidden": _size(config, "n_inner", 4 * width),
        "length": _size(config, "n_positions", 1024),
        "query_scale": None if scaled else 1.0,
    }


def _gpt_neox(config: Config) -> dict[str, Any]:
    fraction = config.get("rotary_pct", 0.25)
    rope = _rope({**config, "partial_rotary_factor": fraction, "rope_theta": config.get("rotary_emb_base", 10_000.0)})
    return {
        "norm": "layernorm",
        "norm_eps": float(config.get("layer_norm_eps", 1e-5)),
        "positions": "rotary",
        "rope": rope,
        "activation": _activation(config, "hidden_act", default="gelu"),
        "gated": False,
        "tied": bool(config.get("tie_word_embeddings", False)),
        "attention_biases": "all" if config.get("attention_bias", True) else "none",
        "mlp_biases": True,
        "parallel": bool(config.get("use_parallel_residual", True)),
        "family": "gpt_neox",
    }


_QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32_768, "max_window_layers": 28, "sliding_window": 4096,
}  # fmt: skip
_GEMMA = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
}  # fmt: skip

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", _gpt2),
    "gpt_neox": Family("GPT-NeoX (Pythia, PolyPythias)", _gpt_neox),
    "llama": Family("Llama 2 and 3 (SmolLM2)", _llama),
    "mistral": Family(
        "Mistral", _mistral, {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
    ),
    "qwen2": Family("Qwen2 and 2.5", _qwen2, _QWEN),
    "qwen3": Family("Qwen3", _qwen3, {**_QWEN, "head_dim": 128}),
    "gemma2": Family("Gemma 2", _gemma2, {**_GEMMA, "max_position_embeddings": 8192}),
    "gemma3_text": Family("Gemma 3, text", _gemma3, {**_GEMMA, "vocab_size": 262_208}),
    "olmo2": Family("OLMo 2", _olmo2),
}


def text_part(config: Config) -> Config:
    """The part of a config.json that describes the language model: Gemma 3 with images keeps it under `text_config`."""
    inner = config.get("text_config")
    if config.get("model_type") == "gemma3" and isinstance(inner, Mapping):
        return {"model_type": "gemma3_text", **inner}
    return config


def family_of(config: Config, where: str = "config.json") -> str:
    """The family's `model_type`.

    Raises:
        UsageError: it is missing or outside the list; the nearest family is named.
    """
    kind = text_part(config).get("model_type")
    if kind == "gemma3":
        raise UsageError(f"{where}: 'text_config' is missing or no object; take the whole config.json of the model")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, 1, 0.0)[0]
        raise UsageError(
            f"{where}: model family {kind!r} is not supported; the nearest that is: {near!r}"
            f" (`subjax families` lists all: {', '.join(FAMILIES)})"
        )
    return kind


def decoder_config_of(config: Config, *, numerics: Numerics, where: str = "config.json") -> DecoderConfig:
    """The architecture that a config.json describes.

    Raises:
        UsageError: a family, activation, rotary scaling or kind of layer outside those supported, a key that is
            missing, or a value that makes no sense; one line that begins with `where`.
    """
    family = FAMILIES[family_of(config, where)]
    config = {**family.defaults, **text_part(config)}
    try:
        style = family.read(config)
        if "width" not in style:
            style |= {
                "width": _size(config, "hidden_size"),
                "layers": _size(config, "num_hidden_layers"),
                "heads": _size(config, "num_attention_heads"),
                "hidden": _size(config, "intermediate_size"),
                "length": _size(config, "max_position_embeddings", 2048),
            }
        heads = style["heads"]
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UsageError(
                f"config.json: {heads} attention heads cannot share {kv_heads} of keys and values; take the config.json"
                " as published"
            )
        return DecoderConfig(
            vocab=_size(config, "vocab_size"),
            kv_heads=kv_heads,
            head_dim=_size(config, "head_dim", style["width"] // heads),
            dtype=numerics.dtype,
            matmul_precision=numerics.matmul_precision,
            attention=numerics.attention,
            **style,
        )
    except KeyError as error:
        raise UsageError(f"{where}: {error.args[0]!r} is missing; take the whole config.json of the model") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{where}: a value cannot be read ({error}); take the config.json as published") from None
    except UsageError as error:
        raise UsageError(str(error).replace("config.json", where, 1)) from None
