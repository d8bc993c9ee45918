"""The model of a comparison in transformers, from the same plain data."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from subjax.models.source import open_source

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settle(setup: Mapping[str, Any]) -> torch.device:
    """Threads and device of a side."""
    torch.set_num_threads(setup["cores"])
    return torch.device("cuda" if setup["device"] == "gpu" else "cpu")


def load(model: Mapping[str, Any], device: torch.device) -> Any:
    """A causal model with transformers' own choice of attention (scaled dot products), in evaluation mode."""
    dtype = getattr(torch, model["dtype"])
    if "source" in model:
        source = open_source(model["source"])
        gguf = "config.json" not in source.files
        path = next(iter(source.files.values())) if gguf else source.files["config.json"]
        kind = {"gguf_file": path.name} if gguf else {"use_safetensors": True}
        made: Any = transformers.AutoModelForCausalLM.from_pretrained(
            os.fspath(path.parent), dtype=dtype, local_files_only=True, **kind
        )
    else:
        settings = dict(model["config"])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(0)
        with device:  # drawn where it will be used
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made.to(device).eval()


def with_lora(model: Any, rank: int, alpha: int) -> Any:
    """The model with peft's LoRA pairs on the seven matrices of each layer, ready to train."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=MATRICES, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).train()


def fence(device: torch.device) -> None:
    """Wait for what was sent to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
