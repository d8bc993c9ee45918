"""LoRA students at SmolLM2-135M (8; 16 on a GPU): a cohort, in turn, side by side, transformers: rows a second.

    python -m benchmarks.cohort            # an hour or more on two cores
    python -m benchmarks.cohort --quick    # a tiny model, seconds a round: to see that it works

Rows of all students together. In turn and in transformers a student has the whole machine; side by side each of two
processes has half of the cores. Runs in turn do not touch each other, so one stands for all: its rate is theirs.
A CPU's batches are of 22 rows, the published rows a device: a step of eight students with 66 takes minutes there.
"""

from typing import Any

from benchmarks import data, harness, training
from benchmarks.harness import Options, Side

STUDENTS = {"cpu": 8, "gpu": 16}


def settings(asked: Options) -> dict[str, Any]:
    """The published settings, on a CPU with a smaller batch; see the module."""
    return training.settings(asked) | (dict(batch=22) if asked.device == "cpu" and not asked.quick else {})


def sides(asked: Options) -> list[Side]:
    """The ways to train eight students."""
    given = dict(model=data.model(asked.size, asked.device), chats=data.chats(), settings=settings(asked))
    found = [
        Side("subjax, cohort", "benchmarks.ours.cohort:start", given | dict(students=STUDENTS[asked.device])),
        Side("subjax, in turn", "benchmarks.ours.training:start", given),
    ]
    if asked.device == "cpu":
        found.append(Side("subjax, side by side", "benchmarks.ours.training:start", given, copies=2))
    return [*found, training.torch_side(given, asked.device)]


def run(asked: Options) -> dict[str, Any]:
    """Measure; see the module."""
    chosen = sides(asked)
    found = harness.compare(chosen, asked)
    pairs = [(name, "subjax, in turn", None) for name in found if name.startswith("subjax") and "turn" not in name]
    pairs += [(name, "transformers", None) for name in found if name.startswith("subjax")]
    return harness.result(
        "cohort", asked, found, unit="rows", judged=pairs,
        settings={**settings(asked), "students": STUDENTS[asked.device], "rows": data.CORPUS},
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "cohort", __doc__ or "")
