"""A preference evaluation, 50 questions x 20 candidates: exact, against scoring in transformers: questions a second.

    python -m benchmarks.evaluation --part=forms    # or first, or sampled; without, all, one after another
    python -m benchmarks.evaluation --quick         # a tiny model, few questions, seconds a round: to see that it works

forms: both sides score all written forms of every candidate (80 a question) as whole words: judged. first: one form a
candidate on both sides. sampled: 100 sampled answers a question beside the exact reading, with how many samples would
give the mean over questions a standard error within 5 % of the exact reading's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import data, harness
from benchmarks.harness import Options, Side

QUESTIONS, SAMPLES, SAMPLE_TOKENS = 50, 100, 8  # tokens of a sampled answer: as an evaluation's stage does
BATCHES, OUR_BATCHES = (4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16)
WANTED = 1.5
PARTS = ("forms", "first", "sampled")
WITHIN = 1.05  # of the exact reading's standard error


def sides(asked: Options) -> list[Side]:
    """The sides of a part."""
    model, facts = data.model(asked.size, asked.device), data.tokenizer_facts()
    count, samples = (4, 4) if asked.quick else (QUESTIONS, SAMPLES)
    ours, theirs = "benchmarks.ours.evaluation:start", "benchmarks.pytorch.evaluation:start"
    every, first = (data.questions(count, forms) for forms in ("all", "first"))
    answers = dict(
        model=model, prompts=[prompt for prompt in every["prompts"] for _ in range(samples)], new=SAMPLE_TOKENS,
        ends=facts["ends"], pad=facts["pad"], batches=(8,) if asked.quick else (25, 50, 100),
    )  # fmt: skip
    batches = (16, 32) if asked.quick else BATCHES
    own = (2, 4) if asked.quick else OUR_BATCHES
    exact = Side("subjax", ours, dict(model=model, questions=first if asked.part == "first" else every, batches=own))
    if asked.part != "sampled":
        return [exact, Side("transformers", theirs, {**exact.setup, "batches": batches})]
    return [
        exact,
        Side("subjax, sampled", "benchmarks.ours.sampling:start", answers),
        Side("transformers, sampled", "benchmarks.pytorch.sampling:start", answers),
    ]


def samples_needed(p: np.ndarray, within: float = WITHIN) -> np.ndarray:
    """Samples a question after which the mean over questions has a standard error within `within` times the exact one.

    With p (questions, candidates), a candidate's exact mean varies by var(p) over questions; n samples a question add
    mean(p (1 - p)) / n to that (the binomial's variance). (candidates,), infinite where p does not vary.
    """
    between, drawn = p.var(0, ddof=1), (p * (1 - p)).mean(0)
    with np.errstate(divide="ignore"):
        return drawn / (between * (within**2 - 1))


def readings(found: Mapping[str, Any], side: str) -> np.ndarray | None:
    """The probabilities that a side read, (questions, candidates); None where no round of it got through them."""
    rows = [row["p"] for row in found.get(side, {"rounds": []})["rounds"] if "p" in row]
    return np.array(rows[-1]) if rows else None


def run(asked: Options) -> dict[str, Any]:
    """Measure a part; see the module."""
    chosen = sides(asked)
    samples = 4 if asked.quick else SAMPLES
    found = harness.compare(chosen, asked)
    exact, scored = readings(found, "subjax"), readings(found, "transformers")
    assert exact is not None
    apart: dict[str, Any] = {}
    if scored is not None:
        apart["largest_difference"] = float(np.abs(exact - scored).max())
    if asked.part == "sampled":
        needed = samples_needed(exact)
        spread = harness.spread(needed[np.isfinite(needed)].tolist())
        apart |= {"samples_for_equal_error": {"within": WITHIN, **spread}, "samples": samples}
    for name, side in found.items():
        scale = samples if name.endswith("sampled") else 1  # from answers to questions
        side["rounds"] = [
            {key: value for key, value in row.items() if key != "p"}
            | {"units": row["units"] / scale, "rate": row["rate"] / scale}
            for row in side["rounds"]
        ]
        side["summary"] = harness.spread([row["rate"] for row in side["rounds"]])
    judged: dict[str | None, list[tuple[str, str, float | None]]] = {
        "forms": [("subjax", "transformers", WANTED)],
        "first": [("subjax", "transformers", None)],
        "sampled": [
            ("subjax", "transformers, sampled", None), ("subjax, sampled", "transformers, sampled", None),
        ],
    }  # fmt: skip
    questions = chosen[0].setup["questions"]
    return harness.result(
        "evaluation", asked, found, unit="questions", judged=judged[asked.part],
        settings=dict(
            questions=len(questions["prompts"]), candidates=len(questions["forms"]),
            forms=sum(map(len, questions["forms"])), sample_tokens=SAMPLE_TOKENS,
            dtype=chosen[0].setup["model"]["dtype"],
        ),
        extra=apart,
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "evaluation", __doc__ or "", parts=PARTS)
