"""Share of the matrix-product ceiling reached in training (MFU), and of memory bandwidth in decoding (MBU).

    python -m benchmarks.utilization            # about 40 minutes on two cores
    python -m benchmarks.utilization --quick    # a tiny model, seconds a round: to see that it works

Ceilings are measured in the same run, side by side with the work: large products in JAX and in torch, a layer's own
products, and a triad over memory. How FLOPs and bytes are counted stands in `benchmarks/costs.py`.
"""

from typing import Any

from benchmarks import costs, data, harness, training
from benchmarks.harness import Options, Side
from subjax.schema import Tuning

DECODE_PROMPT, DECODE_NEW, DECODE_BATCHES = 16, 128, (1, 8, 64)
STREAM, LAYER = "triad", "a layer's products"


def sides(asked: Options) -> list[Side]:
    """Ceilings, training by LoRA and (up to 1.5B) in full, and decoding at several batches."""
    model = data.model(asked.size, asked.device)
    shape = data.shape_of(model, asked.size)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products: Any = [
        [shape.width, queries], [shape.width, keys], [shape.width, keys], [queries, shape.width],
        [shape.width, shape.hidden], [shape.width, shape.hidden], [shape.hidden, shape.width],
    ]  # fmt: skip
    dtype: dict[str, Any] = {"dtype": model["dtype"]}
    found = [Side(name, target, dtype) for name, target in costs.CEILING_SIDES]
    found.append(Side(LAYER, "benchmarks.ours.ceilings:shapes", dtype | dict(shapes=products)))
    found.append(Side(STREAM, "benchmarks.ours.ceilings:stream", dtype))
    chats, chosen = data.chats(), training.settings(asked)
    for kind in ("lora", "full") if asked.size != "8B" else ("lora",):
        given = dict(model=model, chats=chats, settings=chosen | dict(kind=kind))
        found.append(Side(f"training, {kind}", "benchmarks.ours.training:start", given))
    prompts = [prompt[:DECODE_PROMPT] for prompt in data.prompts(max(DECODE_BATCHES))]
    new = 16 if asked.quick else DECODE_NEW
    for batch in DECODE_BATCHES[:2] if asked.quick else DECODE_BATCHES:
        asking = dict(model=model, prompts=prompts, new=new, ends=[], batches=[batch])
        found.append(Side(f"decoding, {batch}", "benchmarks.ours.sampling:start", asking))
    return found


def run(asked: Options) -> dict[str, Any]:
    """Measure; see the module."""
    chosen = sides(asked)
    found = harness.compare(chosen, asked)
    model = data.model(asked.size, asked.device)
    shape, lengths = data.shape_of(model, asked.size), data.length_facts(data.chats())
    mfu, mbu, most = {}, {}, costs.ceiling(found)
    bandwidth = 1e9 * found[STREAM]["summary"]["median"]
    new = 16 if asked.quick else DECODE_NEW
    tunings = {"lora": Tuning(kind="lora"), "full": Tuning(kind="full")}
    for side in chosen:
        rate = found[side.name]["summary"]["median"]
        what, _, which = side.name.partition(", ")
        if what == "training":
            flops = costs.training_flops(shape, tunings[which], lengths["prompt"], lengths["completion"])
            mfu[which] = {"flops_a_row": flops, "rows_a_second": rate, "share": rate * flops / most}
        if what == "decoding":
            batch, steps = int(which), rate * new / int(which)
            moved = costs.decode_bytes(shape, batch, DECODE_PROMPT + new / 2, 4 if model["dtype"] == "float32" else 2)
            mbu[which] = {"bytes_a_step": moved, "steps_a_second": steps, "share": steps * moved / bandwidth}
    return harness.result(
        "utilization", asked, found, unit="GFLOP, GB or rows",
        settings={
            **training.settings(asked), "mean_tokens": lengths, "decode_prompt": DECODE_PROMPT, "decode_new": new,
            "dtype": model["dtype"],
        },
        extra={
            "ceilings": {"flops_a_second": most, "bytes_a_second": bandwidth}, "mfu": mfu, "mbu": mbu,
            "counted": "LoRA 4 N + 6 A, full 6 N, and attention; see benchmarks/costs.py",
        },
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "utilization", __doc__ or "")
