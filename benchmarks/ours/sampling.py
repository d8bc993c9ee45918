"""Our side of sampling number rows: the sampler as a corpus's stage calls it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.harness import timed
from benchmarks.ours import models
from benchmarks.side import Ready
from subjax.data import rows
from subjax.models.network import Network, Params
from subjax.parallel.mesh import make_mesh
from subjax.sample.constraint import Constraint
from subjax.sample.sampler import Sampling, sample

BUCKET = 16  # as in stages/text_corpus
NO_END = -1  # no token ends an answer: all are of one length


def answers(
    net: Network, params: Params, prompts: Sequence[Sequence[int]], *, new: int, ends: tuple[int, ...], pad: int,
    seed: int, batch: int, cache_dtype: str, limit: Constraint | None = None,
) -> np.ndarray:  # fmt: skip
    """Answers of up to `new` tokens at temperature 1, (prompts, new), as `stages/text_corpus` samples them."""
    block = rows.pad_prompts(prompts, pad, BUCKET)
    sampling = Sampling(block.shape[1], new, ends or NO_END, pad, cache_dtype=cache_dtype)
    return sample(
        net, params, block, sampling=sampling, key=jax.random.key(seed), mesh=make_mesh(), batch=batch, constraint=limit
    ).tokens


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: `model`, `prompts`, `new`, `ends` (none: equal lengths), `batches` to try, `constrained`.

    A piece of work is as many prompts as the largest batch has, so that rounds are cut alike whatever batch is chosen.
    """
    net, params = models.load(setup["model"])
    prompts, piece_rows = setup["prompts"], max(setup["batches"])
    ends, dtype = tuple(setup["ends"]), models.numerics(setup["model"]["dtype"]).cache_dtype
    pad = rows.unused(prompts, net.config.vocab - 1, ends)
    limit = _constraint(net.config.vocab) if setup.get("constrained") else None

    def piece(number: int, batch: int, seed: int, rows: int = piece_rows) -> np.ndarray:
        picked = [prompts[(number * piece_rows + row) % len(prompts)] for row in range(rows)]
        return answers(
            net, params, picked, new=setup["new"], ends=ends, pad=pad, seed=seed, batch=batch, cache_dtype=dtype,
            limit=limit,
        )  # fmt: skip

    rates = {}
    for batch in setup["batches"]:
        piece(0, batch, 0, rows=batch)  # compiles
        begin = time.perf_counter()
        piece(0, batch, 1)
        rates[batch] = piece_rows / (time.perf_counter() - begin)
    best = max(rates, key=lambda batch: rates[batch])

    def run(index: int, seconds: float) -> dict[str, Any]:
        drawn: list[np.ndarray] = []

        def once(number: int) -> float:
            drawn.append(piece(number, best, 1000 * (index + 2) + number))
            return piece_rows

        return {**timed(once, seconds), "mean_new_tokens": _mean_length(np.concatenate(drawn), ends)}

    return Ready(run, {"batch": best, "rows_a_second_by_batch": {b: round(rate, 3) for b, rate in rates.items()}})


def _constraint(vocab: int) -> Constraint:
    """The number grammar over SmolLM2's tokens, as `stages/text_corpus` makes it."""
    from benchmarks.data import SMOLLM2
    from subjax.data.chat import Chat
    from subjax.data.number_grammar import number_grammar
    from subjax.data.tokenizer import load_tokenizer
    from subjax.models.source import open_source
    from subjax.sample.constraint import compose

    chat = Chat(load_tokenizer(open_source(SMOLLM2)))
    pieces = chat.tokenizer.pieces()
    pieces += [None] * (vocab - len(pieces))
    return compose(number_grammar().behind(chat.lead), pieces, chat.ends)


def _mean_length(tokens: np.ndarray, ends: tuple[int, ...]) -> float:
    """Mean tokens of an answer, its end included; all of them where none ends one."""
    ended = np.isin(tokens, ends)
    return float(np.where(ended.any(1), ended.argmax(1) + 1, tokens.shape[1]).mean())
