"""Sampling number rows at SmolLM2-135M, against transformers' generate at its best batch size: rows a second.

    python -m benchmarks.sampling --part=equal    # or ragged; without, both, one after another
    python -m benchmarks.sampling --quick         # a tiny model, seconds a round: to see that it works

Temperature 1 from the whole vocabulary, the same prompts. Judged at equal lengths (no token ends an answer). Apart:
ragged lengths, where answers end when the model ends them, with ours held to rows that the number filter keeps, which
generate has nothing like. The share of the matrix-product ceiling is of the one measured in the same run.
"""

from typing import Any

from benchmarks import costs, data, harness
from benchmarks.harness import Options, Side

EQUAL, RAGGED = 45, 64  # new tokens: a row's mean, and the room that a corpus gives an answer
BATCHES = {"cpu": (16, 32, 64, 128, 256), "gpu": (256, 1024)}
WANTED = 1.7
PARTS = ("equal", "ragged")


def sides(asked: Options) -> list[Side]:
    """Both frameworks at the lengths of the part; at ragged ones ours under the constraint too."""
    facts = data.tokenizer_facts()
    batches = (4, 8) if asked.quick else BATCHES[asked.device]
    model, new = data.model(asked.size, asked.device), (6, 8) if asked.quick else (EQUAL, RAGGED)
    given = dict(model=model, prompts=data.prompts(64 if asked.quick else 1024), pad=facts["pad"], batches=batches)
    given |= dict(new=new[0], ends=[]) if asked.part == "equal" else dict(new=new[1], ends=facts["ends"])
    ours, theirs = "benchmarks.ours.sampling:start", "benchmarks.pytorch.sampling:start"
    found = [Side("subjax", ours, given), Side("transformers", theirs, given)]
    if asked.part == "ragged" and not asked.quick:  # the shortest row that the grammar keeps is longer than a quick one
        found.append(Side("subjax, constrained", ours, given | dict(constrained=True)))
    return found


def run(asked: Options) -> dict[str, Any]:
    """Measure a part; see the module."""
    chosen = sides(asked)
    given = chosen[0].setup
    equal = asked.part == "equal"
    ceilings = [Side(name, target, dict(given["model"])) for name, target in costs.CEILING_SIDES if equal]
    found = harness.compare([*chosen, *ceilings], asked)
    prompt = sum(map(len, given["prompts"])) / len(given["prompts"])
    flops = costs.row_flops(data.shape_of(given["model"], asked.size), prompt, given["new"])
    return harness.result(
        "sampling", asked, found, unit="rows", judged=[("subjax", "transformers", WANTED if equal else None)],
        settings=dict(
            new_tokens=given["new"], mean_prompt=prompt, batches=list(given["batches"]), temperature=1.0, top_k=0,
            top_p=1.0, dtype=given["model"]["dtype"],
        ),
        extra={"ceiling": costs.share(found, {"subjax": flops, "transformers": flops})} if equal else None,
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "sampling", __doc__ or "", parts=PARTS)
