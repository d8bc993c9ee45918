"""Sampling as transformers does it: `generate` over a batch of left-padded prompts, with its own key-value cache."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import timed
from benchmarks.pytorch import models
from benchmarks.side import Ready


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (prompts, longest)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def answers(
    model: Any, prompts: Sequence[Sequence[int]], *, new: int, ends: Sequence[int], pad: int, device: torch.device
) -> torch.Tensor:
    """Answers of up to `new` tokens drawn at temperature 1 from the whole vocabulary, (prompts, at most new).

    Without `ends` no token ends an answer, so all have `new` tokens, and generate has no check for ends to make.
    """
    ids, mask = left_padded(prompts, pad, device)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
            eos_token_id=list(ends) or None, pad_token_id=pad,
        )  # fmt: skip
    return out[:, ids.shape[1] :]


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: as that of `benchmarks.ours.sampling`; the constraint is ours alone."""
    device = models.settle(setup)
    model = models.load(setup["model"], device)
    # Nothing is to come from a checkpoint's own defaults, and none would then end an answer that shall not end.
    model.generation_config = type(model.generation_config)()
    prompts, ends, pad = setup["prompts"], setup["ends"], setup["pad"]
    piece_rows = max(setup["batches"])

    def piece(number: int, batch: int) -> list[torch.Tensor]:
        picked = [prompts[(number * piece_rows + row) % len(prompts)] for row in range(piece_rows)]
        out = [
            answers(model, picked[first : first + batch], new=setup["new"], ends=ends, pad=pad, device=device)
            for first in range(0, piece_rows, batch)
        ]
        models.fence(device)
        return out

    answers(model, prompts[: min(setup["batches"])], new=setup["new"], ends=ends, pad=pad, device=device)
    rates = {}
    for batch in setup["batches"]:
        begin = time.perf_counter()
        piece(0, batch)
        rates[batch] = piece_rows / (time.perf_counter() - begin)
    best = max(rates, key=lambda batch: rates[batch])

    def run(index: int, seconds: float) -> dict[str, Any]:
        torch.manual_seed(index + 1)
        lengths: list[int] = []

        def once(number: int) -> float:
            for block in piece(number, best):
                ended = torch.isin(block, torch.tensor(ends, device=block.device))
                own = torch.where(ended.any(1), ended.int().argmax(1) + 1, block.shape[1])
                lengths.extend(own.tolist())
            return piece_rows

        return {**timed(once, seconds), "mean_new_tokens": sum(lengths) / len(lengths)}

    return Ready(run, {"batch": best, "rows_a_second_by_batch": {b: round(rate, 3) for b, rate in rates.items()}})
