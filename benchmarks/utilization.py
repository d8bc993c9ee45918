"""Share of the matrix-product ceiling reached in training (MFU), and of memory bandwidth in decoding (MBU).

    python -m benchmarks.utilization --part=lora    # or full, or decoding; without, all, one after another
    python -m benchmarks.utilization --quick        # a tiny model, seconds a round: to see that it works

Ceilings are measured in the same run, side by side with the work: large products in JAX and in torch, on a CPU a
layer's own products, and for decoding a triad over memory. How FLOPs and bytes are counted stands in
`benchmarks/costs.py`.
"""

from typing import Any

from benchmarks import costs, data, harness, training
from benchmarks.harness import Options, Side
from subjax.errors import UsageError
from subjax.schema import Tuning

DECODE_PROMPT, DECODE_NEW = 16, 128
# On a GPU all sides' weights lie on one card together.
DECODE_BATCHES = {"cpu": (1, 8, 64), "gpu": (8, 64)}
STREAM, LAYER = "triad", "a layer's products"
PARTS = ("lora", "decoding", "full")


def batches(asked: Options) -> tuple[int, ...]:
    """Rows that are decoded together, by side."""
    return (1, 8) if asked.quick else DECODE_BATCHES[asked.device]


def new_tokens(asked: Options) -> int:
    """Tokens that a decoded row gets."""
    return 16 if asked.quick else DECODE_NEW


def sides(asked: Options) -> list[Side]:
    """Of a part: the ceilings, and training, or decoding at several batches."""
    model = data.model(asked.size, asked.device)
    dtype: dict[str, Any] = {"dtype": model["dtype"]}
    if asked.part == "decoding":
        found = [Side(STREAM, "benchmarks.ours.ceilings:stream", dtype)]
        prompts = [prompt[:DECODE_PROMPT] for prompt in data.prompts(max(batches(asked)))]
        for batch in batches(asked):
            asking = dict(model=model, prompts=prompts, new=new_tokens(asked), ends=[], batches=[batch])
            found.append(Side(f"decoding, {batch}", "benchmarks.ours.sampling:start", asking))
        return found
    found = [Side(name, target, dtype) for name, target in costs.CEILING_SIDES]
    if asked.device == "cpu":
        found.append(Side(LAYER, "benchmarks.ours.ceilings:shapes", dtype | dict(shapes=_products(asked))))
    given = dict(model=model, chats=data.chats(), settings=training.settings(asked) | dict(kind=asked.part))
    return [*found, Side(f"training, {asked.part}", "benchmarks.ours.training:start", given)]


def _products(asked: Options) -> list[list[int]]:
    """Inputs and outputs of a layer's matrices."""
    shape = data.shape_of(data.model(asked.size, asked.device), asked.size)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        [shape.width, queries], [shape.width, keys], [shape.width, keys], [queries, shape.width],
        [shape.width, shape.hidden], [shape.width, shape.hidden], [shape.hidden, shape.width],
    ]  # fmt: skip


def run(asked: Options) -> dict[str, Any]:
    """Measure a part; see the module.

    Raises:
        UsageError: 8B in full, whose optimizer fits no card.
    """
    if asked.part == "full" and asked.size == "8B":
        raise UsageError("an 8B model's optimizer fits no card; give --part=lora or --part=decoding, or a smaller size")
    found = harness.compare(sides(asked), asked)
    model = data.model(asked.size, asked.device)
    shape, lengths = data.shape_of(model, asked.size), data.length_facts(data.chats())
    if asked.part == "decoding":
        most = {"bytes_a_second": 1e9 * found[STREAM]["summary"]["median"]}
        width = 4 if model["dtype"] == "float32" else 2
        mbu = {}
        for batch in batches(asked):
            steps = found[f"decoding, {batch}"]["summary"]["median"] * new_tokens(asked) / batch
            moved = costs.decode_bytes(shape, batch, DECODE_PROMPT + new_tokens(asked) / 2, width)
            share = steps * moved / most["bytes_a_second"]
            mbu[str(batch)] = {"bytes_a_step": moved, "steps_a_second": steps, "share": share}
        return harness.result(
            "utilization", asked, found, unit="GB or rows",
            settings=dict(prompt=DECODE_PROMPT, new=new_tokens(asked), dtype=model["dtype"]),
            extra={"ceilings": most, "mbu": mbu},
        )  # fmt: skip
    tuning = Tuning(kind="lora") if asked.part == "lora" else Tuning(kind="full")
    flops, most = costs.training_flops(shape, tuning, lengths["prompt"], lengths["completion"]), costs.ceiling(found)
    rate = found[f"training, {asked.part}"]["summary"]["median"]
    return harness.result(
        "utilization", asked, found, unit="GFLOP or rows",
        settings={**training.settings(asked), "mean_tokens": lengths, "dtype": model["dtype"]},
        extra={
            "ceilings": {"flops_a_second": most},
            "mfu": {asked.part: {"flops_a_row": flops, "rows_a_second": rate, "share": rate * flops / most}},
            "counted": "LoRA 4 N + 6 A, full 6 N, and attention; see benchmarks/costs.py",
        },
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "utilization", __doc__ or "", parts=PARTS)
