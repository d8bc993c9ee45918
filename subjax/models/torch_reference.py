"""A checkpoint as transformers and torch compute it: the independent reference that `subjax check` compares with."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from subjax.errors import SubjaxError, UsageError, one_line
from subjax.models.source import Source

_INSTALL = "pip install 'subjax[torch-check]'"


def versions() -> str:
    """The reference by name: "transformers 5.0.0, torch 2.9.0". Imports neither, which takes seconds.

    Raises:
        UsageError: one of the two is not installed.
    """
    for name in ("transformers", "torch"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"check compares with transformers and torch, and {name} is not installed: {_INSTALL}")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))


class Reference:
    """A model in torch, in float32, with attention written out (the other forms leave out soft-caps)."""

    def __init__(self, model: Any):
        self._model = model

    @property
    def config(self) -> dict[str, Any]:
        """The architecture as transformers reads it, in the form of config.json."""
        return self._model.config.to_dict()

    def logits(self, tokens: list[int], keep: int) -> Float[np.ndarray, "keep vocab"]:
        """Logits at the last `keep` tokens of one text, without padding or cache; at all of a shorter one."""
        import torch

        with torch.inference_mode():
            out = self._model(torch.tensor([tokens]), use_cache=False, logits_to_keep=keep)
        return out.logits[0].numpy()

    def greedy(
        self, prompts: Int[np.ndarray, "texts length"], valid: Bool[np.ndarray, "texts length"], new: int
    ) -> tuple[Int[np.ndarray, "texts new"], Float[np.ndarray, "texts new"]]:
        """The `new` likeliest tokens after left-padded prompts, one by one, and the lead of each over the second.

        No token ends an answer, and nothing is inherited from a checkpoint's generation config: some change logits.
        """
        import torch

        mask = torch.from_numpy(valid.astype(np.int64))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        token, cache = torch.from_numpy(prompts.astype(np.int64)), None
        tokens, leads = [], []
        with torch.inference_mode():
            for _ in range(new):
                out = self._model(
                    token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                cache = out.past_key_values
                best = out.logits[:, -1].topk(2)
                token = best.indices[:, :1]
                tokens.append(token[:, 0])
                leads.append(best.values[:, 0] - best.values[:, 1])
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                positions = positions[:, -1:] + 1
        return torch.stack(tokens, 1).numpy(), torch.stack(leads, 1).numpy()


def load(source: Source) -> Reference:
    """The checkpoint in transformers, from the same files; a GGUF file by transformers' own reader.

    Raises:
        SubjaxError: transformers cannot load it, or does not find all of its weights.
    """
    import torch
    import transformers

    gguf = "config.json" not in source.files
    path = source.files["config.json"] if not gguf else next(iter(source.files.values()))
    kind: dict[str, Any] = {"gguf_file": path.name} if gguf else {"use_safetensors": True}
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        # Its progress bars are not ours, and some cannot be turned off.
        with contextlib.redirect_stderr(io.StringIO()):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                os.fspath(path.parent), dtype=torch.float32, attn_implementation="eager", local_files_only=True,
                output_loading_info=True, **kind,
            )  # fmt: skip
    except Exception as error:  # it raises whatever its readers come upon
        first = one_line(error)[:200]
        raise SubjaxError(
            f"{source.where}: transformers cannot load it ({type(error).__name__}: {first}), so there is nothing to"
            f" compare with; {'it reads fewer GGUF files than subjax, ' if gguf else ''}try a newer one"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise SubjaxError(
            f"{source.where}: transformers does not find the weights {missing[0]} ({len(missing)} such) in it and"
            " would draw them at random, so there is nothing to compare with"
        )
    return Reference(model.eval())
