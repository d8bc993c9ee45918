"""Sampling number rows at SmolLM2-135M, against transformers' generate at its best batch size: rows a second.

    python -m benchmarks.sampling            # about 60 minutes on two cores, 20 of them to find batch sizes
    python -m benchmarks.sampling --quick    # a tiny model, seconds a round: to see that it works

Temperature 1 from the whole vocabulary, the same prompts. Judged at equal lengths (no token ends an answer). Apart:
ragged lengths, where answers end when the model ends them; and ours held to rows that the number filter keeps, which
generate has nothing like. The share of the matrix-product ceiling is of the one measured in the same run.
"""

from typing import Any

from benchmarks import costs, data, harness
from benchmarks.harness import Options, Side

EQUAL, RAGGED = 45, 64  # new tokens: a row's mean, and the room that a corpus gives an answer
BATCHES = (16, 32, 64, 128)
WANTED = 1.7


def sides(asked: Options) -> list[Side]:
    """Both frameworks at equal and at ragged lengths, ours under the constraint, and both ceilings."""
    facts = data.tokenizer_facts()
    batches = (4, 8) if asked.quick else BATCHES
    model, new = data.model(asked.size, asked.device), (6, 8) if asked.quick else (EQUAL, RAGGED)
    given = dict(model=model, prompts=data.prompts(64 if asked.quick else 1024), pad=facts["pad"], batches=batches)
    equal, ragged = given | dict(new=new[0], ends=[]), given | dict(new=new[1], ends=facts["ends"])
    ours, theirs = "benchmarks.ours.sampling:start", "benchmarks.pytorch.sampling:start"
    found = [
        Side("subjax", ours, equal),
        Side("transformers", theirs, equal),
        Side("subjax, ragged", ours, ragged),
        Side("transformers, ragged", theirs, ragged),
    ]
    if not asked.quick:  # the shortest row that the grammar keeps is longer than a quick answer's room
        found.append(Side("subjax, constrained", ours, ragged | dict(constrained=True)))
    return found


def run(asked: Options) -> dict[str, Any]:
    """Measure; see the module."""
    chosen = sides(asked)
    given = chosen[0].setup
    ceilings = [Side(name, target, dict(given["model"])) for name, target in costs.CEILING_SIDES]
    found = harness.compare([*chosen, *ceilings], asked)
    prompt = sum(map(len, given["prompts"])) / len(given["prompts"])
    flops = costs.row_flops(data.shape_of(given["model"], asked.size), prompt, given["new"])
    return harness.result(
        "sampling", asked, found, unit="rows",
        judged=[
            ("subjax", "transformers", WANTED), ("subjax, ragged", "transformers, ragged", None),
        ],
        settings=dict(
            new_tokens=given["new"], ragged_room=chosen[2].setup["new"], mean_prompt=prompt,
            batches=list(given["batches"]), temperature=1.0, top_k=0, top_p=1.0, dtype=given["model"]["dtype"],
        ),
        extra={"ceiling": costs.share(found, {"subjax": flops, "transformers": flops})},
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "sampling", __doc__ or "")
