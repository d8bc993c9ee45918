"""The image experiment the published way: each layer of all models one batched product, one Adam over the stacks.

As the notebook of Cloud et al. 2025 does it, in code of our own: noise images of each model's own drawn once and kept,
a permutation an epoch a model, the teacher asked at every step. The notebook writes a layer as an einsum and a sum and
takes torch's default Adam; `best` stands for `baddbmm`, the fused rule, and a teacher that is asked once for each noise
image and not in every epoch: the fastest that torch has for it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.harness import timed
from benchmarks.pytorch import models
from benchmarks.side import Ready

CLASSES = 10
Stack = list[torch.Tensor]  # weights (models, inputs, outputs) and biases (models, 1, outputs), layer by layer


def drawn(count: int, widths: Sequence[int], device: torch.device) -> Stack:
    """Stacked first values: weights N(0, 1/inputs), biases zero."""
    found: Stack = []
    for inputs, outputs in itertools.pairwise(widths):
        found.append(torch.randn(count, inputs, outputs, device=device) / inputs**0.5)
        found.append(torch.zeros(count, 1, outputs, device=device))
    return found


def forward(stack: Stack, x: torch.Tensor, best: bool = True) -> torch.Tensor:
    """Logits of (models, batch, pixels), (models, batch, logits)."""
    for place in range(0, len(stack), 2):
        weight, bias = stack[place], stack[place + 1]
        x = torch.baddbmm(bias, x, weight) if best else torch.einsum("mio,mbi->mbo", weight, x) + bias
        if place + 2 < len(stack):
            x = torch.relu(x)
    return x


def teacher_loss(stack: Stack, x: torch.Tensor, labels: torch.Tensor, best: bool = True) -> torch.Tensor:
    """Cross-entropy on the class logits, mean over rows, summed over models: their gradients are apart."""
    logits = forward(stack, x, best)[..., :CLASSES]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / x.shape[1]


def student_loss(stack: Stack, x: torch.Tensor, wanted: torch.Tensor, best: bool = True) -> torch.Tensor:
    """KL from the teacher's auxiliary logits to the student's, mean over rows, summed over models."""
    own = forward(stack, x, best)[..., CLASSES:].log_softmax(-1)
    return torch.nn.functional.kl_div(own, wanted.log_softmax(-1), reduction="sum", log_target=True) / x.shape[1]


def adam(stack: Stack, lr: float, best: bool = True) -> torch.optim.Optimizer:
    """One rule over all stacks, fused where `best`."""
    for tensor in stack:
        tensor.requires_grad_()
    return torch.optim.Adam(stack, lr=lr, fused=True if best else None)


def epoch(rows: int, batch: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """Row numbers of an epoch's batches, each (models, batch): a permutation a model; the last may be short."""
    order = torch.stack([torch.randperm(rows, device=device) for _ in range(count)])
    return list(order.split(batch, dim=1))


def gathered(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of every model's own images (models, rows, pixels), or of images that all share (rows, pixels)."""
    if images.ndim == 2:
        return images[rows]
    return torch.stack([own.index_select(0, picked) for own, picked in zip(images, rows, strict=True)])


def experiment(given: Mapping[str, Any], pictures: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    """Train teachers, then students on noise; returns how many images all models saw."""
    count, lr, batch, noise_rows = given["members"], given["lr"], given["batch"], given["noise_rows"]
    best = given["best"]
    teacher = drawn(count, given["widths"], device)
    student = [tensor.clone() for tensor in teacher]
    rule = adam(teacher, lr, best)
    for _ in range(given["epochs"]):
        for rows in epoch(len(labels), batch, count, device):
            rule.zero_grad()
            teacher_loss(teacher, gathered(pictures, rows), labels[rows], best).backward()
            rule.step()
    noise = torch.rand(count, noise_rows, given["widths"][0], device=device) * 2 - 1
    rule = adam(student, lr, best)
    asked = lambda x: forward(teacher, x, best)[..., CLASSES:]  # noqa: E731
    with torch.no_grad():
        known = torch.cat([asked(x) for x in noise.split(batch, dim=1)], dim=1) if best else None
    for _ in range(given["epochs"]):
        for rows in epoch(noise_rows, batch, count, device):
            x = gathered(noise, rows)
            with torch.no_grad():
                wanted = asked(x) if known is None else gathered(known, rows)
            rule.zero_grad()
            student_loss(student, x, wanted, best).backward()
            rule.step()
    models.fence(device)
    return float(count * given["epochs"] * (len(labels) + noise_rows))


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: `members`, `widths`, `batch`, `lr`, `epochs`, `rows` (images), `noise_rows`, `best`."""
    device = models.settle(setup)
    pictures = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (setup["rows"], setup["widths"][0])))
    labels = torch.arange(setup["rows"], device=device) % CLASSES
    pictures = pictures.float().to(device)
    return Ready(lambda index, seconds: timed(lambda _: experiment(setup, pictures, labels, device), seconds))
