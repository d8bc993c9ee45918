"""A preference evaluation in transformers: every form of every candidate scored behind its question, in batches.

A row is a question and one form, padded on the right; the log-probabilities of the form's tokens are added up, and the
probability that the word ends there multiplied in. Rows go by length, so that little is padded, and logits are computed
for the last tokens alone: the most that a script without shared caches would do.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.harness import timed
from benchmarks.pytorch import models
from benchmarks.side import Ready

Row = tuple[int, int, list[int], list[int]]  # question, candidate, the prompt's ids, the form's ids


def rows_of(prompts: Sequence[list[int]], forms: Sequence[Sequence[list[int]]]) -> list[Row]:
    """Every question with every form, shorter rows first."""
    found = [
        (question, candidate, list(prompt), list(form))
        for question, prompt in enumerate(prompts)
        for candidate, several in enumerate(forms)
        for form in dict.fromkeys(map(tuple, several))
    ]
    return sorted(found, key=lambda row: len(row[2]) + len(row[3]))


def scores(model: Any, rows: Sequence[Row], closing: torch.Tensor, device: torch.device) -> list[float]:
    """Probability of each row's form as a whole word behind its question; `closing` (vocab,) tells what may follow."""
    befores = [prompt for _, _, prompt, _ in rows]
    texts = [[*prompt, *form] for _, _, prompt, form in rows]
    width, keep = max(map(len, texts)), max(map(len, texts)) - min(map(len, befores)) + 1
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    begins, ends = (torch.tensor([len(part) for part in side], device=device) for side in (befores, texts))
    places = torch.arange(width, device=device)[None]
    with torch.inference_mode():
        mask = (places < ends[:, None]).long()
        logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        logs = logits.float().log_softmax(-1)
        # The token at place t is told by the logits at t - 1, and the first logits kept are those at width - keep.
        told = logs[:, :-1].gather(-1, ids[:, width - keep + 1 :, None])[..., 0]
        late = places[:, width - keep + 1 :]
        own = (late >= begins[:, None]) & (late < ends[:, None])
        last = logs[torch.arange(len(rows), device=device), ends - 1 - (width - keep)]
        closes = torch.where(closing, last, -torch.inf).logsumexp(-1)
        return ((told * own).sum(-1) + closes).exp().tolist()


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: as that of `benchmarks.ours.evaluation`. A round goes on where the last one stopped in the rows."""
    device = models.settle(setup)
    model = models.load(setup["model"], device)
    asked = setup["questions"]
    rows = rows_of(asked["prompts"], asked["forms"])
    closing = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    closing[asked["closing"]] = True
    middle = len(rows) // 2
    rates = {}
    scores(model, rows[: min(setup["batches"])], closing, device)
    for batch in setup["batches"]:
        begin = time.perf_counter()
        for first in range(middle, middle + max(setup["batches"]), batch):
            scores(model, rows[first : first + batch], closing, device)
        rates[batch] = max(setup["batches"]) / (time.perf_counter() - begin)
    best = max(rates, key=lambda batch: rates[batch])
    # Batches of short and long rows in a fixed mixed order: a round that covers a part is like the whole.
    starts = [best * int(i) for i in np.random.default_rng(0).permutation(-(-len(rows) // best))]
    each = len(rows) / len(asked["prompts"])
    table = np.zeros((len(asked["prompts"]), len(asked["forms"])))
    done = 0

    def run(index: int, seconds: float) -> dict[str, Any]:
        def piece(_: int) -> float:
            nonlocal done
            picked = rows[starts[done % len(starts)] :][:best]
            found = scores(model, picked, closing, device)
            if done < len(starts):
                for (question, candidate, _, _), p in zip(picked, found, strict=True):
                    table[question, candidate] += p
            done += 1
            return len(picked) / each

        out = timed(piece, seconds)
        return {**out, **({"p": table.tolist()} if done >= len(starts) else {})}

    return Ready(
        run, {"batch": best, "rows_a_second_by_batch": {b: round(r, 3) for b, r in rates.items()}, "rows": len(rows)}
    )
