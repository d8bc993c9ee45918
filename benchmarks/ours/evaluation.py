"""Our side of a preference evaluation: exact probabilities by the trie, as an evaluation's stage reads them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import timed
from benchmarks.ours import models
from benchmarks.side import Ready
from subjax.measure import tries
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh


def probabilities(
    net: Network, params: Params, prompts: Sequence[Sequence[int]], forms: Sequence[Sequence[Sequence[int]]],
    closing: Sequence[int], batch: int,
) -> np.ndarray:  # fmt: skip
    """Probability of each candidate as a whole word, (questions, candidates), as `stages/text_evaluation` reads it."""
    closes = np.zeros(net.config.vocab, bool)
    closes[list(closing)] = True
    told = [[tuple(form) for form in candidate] for candidate in forms]
    return tries.exact(net, params, prompts, told, closing=closes, pad=0, mesh=make_mesh(), batch=batch)


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: `model`, `questions` as `benchmarks.data.questions` gives them, `batches` to try."""
    net, params = models.load(setup["model"])
    asked = setup["questions"]
    prompts = asked["prompts"]

    def all_questions(batch: int) -> np.ndarray:
        return probabilities(net, params, prompts, asked["forms"], asked["closing"], batch)

    rates = {}
    for batch in setup["batches"]:
        all_questions(batch)  # compiles
        begin = time.perf_counter()
        found = all_questions(batch)
        rates[batch] = len(prompts) / (time.perf_counter() - begin)
    best = max(rates, key=lambda batch: rates[batch])

    def run(index: int, seconds: float) -> dict[str, Any]:
        def piece(_: int) -> float:
            all_questions(best)
            return len(prompts)

        return {**timed(piece, seconds), "p": found.tolist()}

    return Ready(run, {"batch": best, "questions_a_second_by_batch": {b: round(r, 3) for b, r in rates.items()}})
