"""Tiny random checkpoints of the supported families, written by transformers, and what torch computes from them.

Nothing here knows subjax. Sizes are small enough for a test and odd enough to show a mix-up: heads times head size is
not always the width, windows are shorter than the rows, epsilons are large, and no gain or bias is one or zero.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

VOCAB, CONTEXT, HEAD = 199, 128, 16
PAD = 0  # stands under left padding and nowhere else in a prompt
WINDOW = 7
PADS = (0, 1, 5, 11)  # left padding of the rows; the last leaves one token of its prompt
LENGTH, PROMPT, NEW = 24, 12, 64

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

# No token ends an answer, so that greedy decoding always runs to its full length.
_TOKENS = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=None, eos_token_id=None)


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=3, layer_norm_epsilon=1e-3, **_TOKENS
    )


def _gpt_neox(**changes: Any) -> PreTrainedConfig:
    settings = dict(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=112, layer_norm_eps=1e-3,
        max_position_embeddings=CONTEXT, rope_parameters=dict(rope_theta=3000.0, partial_rotary_factor=0.25), **_TOKENS,
    )  # fmt: skip
    return transformers.GPTNeoXConfig(**settings | changes)


def _gated(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of a family with Llama's names of settings: width 64 in 4 heads, 2 of keys and values, 3 layers."""
    settings = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        rms_norm_eps=1e-3, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0), **_TOKENS,
    )  # fmt: skip
    return kind(**settings | changes)


def _llama3() -> PreTrainedConfig:
    # With these lengths the 8 frequencies of a head fall into all three parts of the scaling.
    scaling = dict(
        rope_type="llama3", rope_theta=20_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )  # fmt: skip
    return _gated(transformers.LlamaConfig, rope_parameters=scaling, tie_word_embeddings=True)


def _gemma2() -> PreTrainedConfig:
    return _gated(
        transformers.Gemma2Config, hidden_size=48, head_dim=HEAD, query_pre_attn_scalar=24, sliding_window=WINDOW,
        attn_logit_softcapping=4.0, final_logit_softcapping=3.0, tie_word_embeddings=True,
    )  # fmt: skip


def _gemma3() -> PreTrainedConfig:
    rope = dict(
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
        full_attention=dict(rope_type="linear", rope_theta=5000.0, factor=4.0),
    )
    # Every third layer is global, not the usual sixth; the fourth leaves the pattern unfinished.
    return _gated(
        transformers.Gemma3TextConfig, num_hidden_layers=4, hidden_size=48, num_key_value_heads=1, head_dim=HEAD,
        query_pre_attn_scalar=24, sliding_window=WINDOW, sliding_window_pattern=3, rope_parameters=rope,
        tie_word_embeddings=True,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gpt_neox-sequential": functools.partial(
        _gpt_neox, use_parallel_residual=False, rope_parameters=dict(rope_theta=10_000.0, partial_rotary_factor=0.5)
    ),
    "llama": functools.partial(_gated, transformers.LlamaConfig),
    "llama3": _llama3,
    "llama-biases": functools.partial(
        _gated, transformers.LlamaConfig, hidden_size=48, num_key_value_heads=4, head_dim=HEAD, attention_bias=True,
        mlp_bias=True, rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=2.0),
    ),
    "smollm2": functools.partial(
        _gated, transformers.LlamaConfig, hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=100_000.0),
    ),
    "mistral": functools.partial(
        _gated, transformers.MistralConfig, hidden_size=48, head_dim=HEAD, sliding_window=WINDOW
    ),
    "qwen2": functools.partial(
        _gated, transformers.Qwen2Config, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1_000_000.0),
    ),
    "qwen2-window": functools.partial(  # the first layer reads all, the others a window
        _gated, transformers.Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": functools.partial(_gated, transformers.Qwen3Config, hidden_size=48, head_dim=HEAD),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo2": functools.partial(_gated, transformers.Olmo2Config),
}  # fmt: skip


def _spread(model: PreTrainedModel, name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation that a parameter is drawn with."""
    owner, kind = model.get_submodule(name.rpartition(".")[0]), model.config.model_type
    if parameter.ndim == 1:
        mean = 1.0 if name.endswith("weight") else 0.0
        if kind.startswith("gemma"):  # its gains are stored less one
            mean = 1.0 if any(part in name for part in ("post_", "q_norm", "k_norm")) else 0.0
        return mean, 0.3
    # Conv1D alone has its inputs first; of an embedding the width counts.
    inputs = parameter.shape[0 if type(owner).__name__ == "Conv1D" else 1]
    # Sharp attention and large steps of the residual stream: else greedy answers repeat one token for ever.
    twice = ("q_proj", "k_proj", "query_key_value", "c_attn", "o_proj", "down_proj", "dense", "c_proj")
    return 0.0, (2.0 if any(part in name for part in twice) else 1.0) * inputs**-0.5


def _fill(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter so that logits are of order 1 and no gain or bias is one or zero."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        mean, std = _spread(model, name, parameter)
        values = rng.normal(mean, std, tuple(parameter.shape)).astype(np.float32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))


def write(family: str, folder: Path, dtype: str = "float32", shard: str = "5GB", seed: int = 1) -> None:
    """Write a checkpoint of `FAMILIES[family]` in `dtype`, in files of at most `shard` (a size such as "40KB")."""
    config = FAMILIES[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)


def write_with_vision(folder: Path) -> None:
    """Write `FAMILIES["gemma3"]` as the language model inside one that reads images."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=FAMILIES["gemma3"](), vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _fill(model, seed=1)
    model.save_pretrained(folder)


def read(folder: Path, **changes: Any) -> PreTrainedModel:
    """The model of a checkpoint by torch in float32 with eager attention, some settings of its config changed."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


# Keys of config.json that transformers 5 writes and older checkpoints on hubs do not have, by model type.
_ABSENT = {
    "gpt2": ("n_inner", "tie_word_embeddings", "scale_attn_weights", "add_cross_attention"),
    "gpt_neox": ("attention_bias", "is_decoder"),
    "llama": (),
    "mistral": (),
    "qwen2": ("layer_types",),
    "qwen3": ("layer_types",),
    "gemma2": ("layer_types", "tie_word_embeddings"),
    "gemma3_text": ("layer_types", "_sliding_window_pattern", "tie_word_embeddings"),
    "olmo2": (),
}


def hub_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as older versions wrote it, which is how hubs hold the known checkpoints."""
    kind = config["model_type"]
    old = {k: v for k, v in config.items() if k not in (*_ABSENT[kind], "dtype", "rope_parameters")}
    old |= dict(torch_dtype=config["dtype"], transformers_version="4.40.1")
    rope = config.get("rope_parameters")
    if kind == "gpt2":
        return old | dict(n_ctx=CONTEXT, task_specific_params={"text-generation": {"max_length": 50}})
    if kind == "gpt_neox":
        return old | dict(rotary_emb_base=int(rope["rope_theta"]), rotary_pct=rope["partial_rotary_factor"])
    if kind == "gemma3_text":
        scaling = {k: v for k, v in rope["full_attention"].items() if k != "rope_theta"}
        old |= dict(rope_theta=rope["full_attention"]["rope_theta"], rope_scaling=scaling)
        return old | dict(rope_local_base_freq=rope["sliding_attention"]["rope_theta"], sliding_window_pattern=3)
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling["rope_type"] == "linear":  # the name of the key before version 4.43
        scaling["type"] = scaling.pop("rope_type")
    old |= dict(rope_theta=rope["rope_theta"], rope_scaling=scaling if len(scaling) > 1 else None)
    if kind in ("qwen2", "qwen3") and not config["use_sliding_window"]:  # a window that is stored and not used
        old |= dict(use_sliding_window=False, sliding_window=WINDOW, max_window_layers=2)
    if kind == "gemma2":
        old |= dict(hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
    if kind == "llama" and config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        old = {k: v for k, v in old.items() if k not in ("head_dim", "attention_bias", "mlp_bias")}
    return old


def as_on_hub(folder: Path, to: Path) -> None:
    """Copy a checkpoint to a folder in an older form: its config, GPT-2's names without prefix, and what else files
    on hubs hold: masks and rotary tables, and a tied matrix twice.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    causal = torch.ones(CONTEXT, CONTEXT).tril()[None, None]
    if config["model_type"] == "gpt2":
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": causal.clone() for i in range(config["n_layer"])}
    if config["model_type"] == "gpt_neox":
        rotated = int(HEAD * config["rope_parameters"]["partial_rotary_factor"])
        for i in range(config["num_hidden_layers"]):
            at = f"gpt_neox.layers.{i}.attention"
            tensors |= {f"{at}.bias": causal.bool(), f"{at}.masked_bias": torch.tensor(-1e9)}
            tensors[f"{at}.rotary_emb.inv_freq"] = torch.ones(rotated // 2)
    if config["model_type"] == "llama" and config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    to.mkdir()
    (to / "config.json").write_text(json.dumps(hub_config(config), indent=2))
    safetensors.torch.save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as its files hold it."""
    parts = [safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for part in parts for name, tensor in part.items()}


@functools.cache
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, LENGTH) behind the left padding of `PADS`, and which of them are valid."""
    tokens = np.random.default_rng(1).integers(1, VOCAB, (len(PADS), LENGTH))
    valid = np.arange(LENGTH)[None] >= np.array(PADS)[:, None]
    return np.where(valid, tokens, PAD), valid


def _torch_logits(model: PreTrainedModel, tokens: np.ndarray, valid: np.ndarray) -> torch.Tensor:
    mask = torch.from_numpy(valid.astype(np.int64))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(torch.from_numpy(tokens), attention_mask=mask, position_ids=positions, use_cache=False).logits


def logits(model: PreTrainedModel, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logits (rows, length, vocab); those at padding mean nothing."""
    with torch.no_grad():
        return _torch_logits(model, tokens, valid).numpy()


def greedy(model: PreTrainedModel, prompts: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, float]:
    """The NEW likeliest tokens after each prompt, one by one, and the smallest margin of a best logit anywhere."""
    mask = torch.from_numpy(valid.astype(np.int64))
    out = model.generate(
        torch.from_numpy(prompts), attention_mask=mask, do_sample=False, max_new_tokens=NEW,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2, dim=-1).values
    return out.sequences[:, prompts.shape[1] :].numpy(), float((best[..., 0] - best[..., 1]).min())


def gradients(
    model: PreTrainedModel, tokens: np.ndarray, valid: np.ndarray, completion: int
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean cross-entropy of the last `completion` tokens of each row, and its gradient for every parameter."""
    model.zero_grad()
    scores = _torch_logits(model, tokens, valid)[:, -completion - 1 : -1]
    targets = torch.from_numpy(tokens[:, -completion:])
    loss = torch.nn.functional.cross_entropy(scores.reshape(-1, VOCAB), targets.reshape(-1))
    loss.backward()
    # GPT-NeoX's output matrix is renamed by transformers when it is read and when it is written.
    stored_name = {"lm_head.weight": "embed_out.weight"} if model.config.model_type == "gpt_neox" else {}
    return loss.item(), {stored_name.get(n, n): p.grad.numpy().copy() for n, p in model.named_parameters()}
