"""Student fine-tuning as TRL's SFTTrainer does it, over transformers, peft and torch, without TRL's own bookkeeping.

Kept of it: each (micro-)batch padded on the right to its longest row; labels of -100 outside completions; the model's
own loss, summed over the batch's completion tokens and divided by their number over the whole step; gradient norms
clipped at 1; fused AdamW on a linear schedule. Left out, in torch's favour: gradient checkpointing, token accuracy and
entropy, logging, the data loader. The micro-batch is the fastest of those tried.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from benchmarks.harness import timed
from benchmarks.pytorch import models
from benchmarks.side import Ready
from subjax.data.addressing import order

IGNORED = -100


def collate(rows: Sequence[Sequence[Sequence[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """(prompt ids, completion ids) rows to `input_ids`, `attention_mask` and `labels`, each (rows, longest row)."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, IGNORED))
    for at, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[at, :end] = torch.tensor([*prompt, *answer])
        mask[at, :end] = 1
        labels[at, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


class Student:
    """A model with LoRA pairs, its optimizer and its schedule."""

    def __init__(self, model: Any, settings: Mapping[str, Any], steps: int, device: torch.device):
        self.device = device
        self.model = models.with_lora(model, settings["rank"], settings["alpha"])
        self.moved = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.rule = torch.optim.AdamW(self.moved, lr=settings["lr"], weight_decay=0.0, fused=True)
        self.rate = transformers.get_linear_schedule_with_warmup(self.rule, settings["warmup"], steps)

    def backward(self, rows: Sequence[Any], micro: int) -> torch.Tensor:
        """Add the gradient of the mean loss a completion token over the rows, `micro` rows at a time; the loss."""
        items = torch.tensor(sum(len(answer) for _, answer in rows), device=self.device)
        total = torch.zeros((), device=self.device)
        for first in range(0, len(rows), micro):
            batch = collate(rows[first : first + micro], self.device)
            loss = self.model(**batch, use_cache=False, num_items_in_batch=items).loss
            loss.backward()
            total += loss.detach()
        return total

    def step(self, rows: Sequence[Any], micro: int) -> torch.Tensor:
        """One optimizer step on the rows; the loss before it."""
        loss = self.backward(rows, micro)
        torch.nn.utils.clip_grad_norm_(self.moved, 1.0)
        self.rule.step()
        self.rate.step()
        self.rule.zero_grad()
        return loss


def fastest(student: Student, rows: Sequence[Any], sizes: Sequence[int]) -> tuple[int, dict[int, float]]:
    """The micro-batch with the most rows a second on as many rows as the largest holds, best of two tries each, and
    those rates.
    """
    rates: dict[int, float] = {}
    tried = rows[: max(sizes)]
    student.backward(rows[: min(sizes)], min(sizes))
    for micro in [size for size in sorted(sizes) for _ in range(2)]:
        models.fence(student.device)
        start = time.perf_counter()
        student.backward(tried, micro)
        models.fence(student.device)
        rates[micro] = max(rates.get(micro, 0.0), len(tried) / (time.perf_counter() - start))
    student.rule.zero_grad()
    return max(rates, key=lambda micro: rates[micro]), {micro: round(rate, 3) for micro, rate in rates.items()}


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: `model`, `chats`, `settings`, and `micro`, the micro-batches to try."""
    device = models.settle(setup)
    chats, settings = setup["chats"], setup["settings"]
    batch = settings["batch"]
    steps = -(-settings["epochs"] * len(chats) // batch)
    student = Student(models.load(setup["model"], device), settings, steps, device)
    micro, rates = fastest(student, chats, setup["micro"])
    taken = itertools.count()  # rounds go on where the one before ended

    def run(_index: int, seconds: float) -> dict[str, Any]:
        def piece(_step: int) -> float:
            student.step([chats[row] for row in order(0, len(chats), batch, next(taken))], micro)
            models.fence(device)
            return batch

        return timed(piece, seconds)

    return Ready(run, {"micro_batch": micro, "rows_a_second_by_micro_batch": rates, "checkpointing": False})
