"""Student fine-tuning on 10,000 number rows at SmolLM2-135M, LoRA, against transformers + peft + torch: rows a second.

    python -m benchmarks.training            # about 20 minutes on two cores
    python -m benchmarks.training --quick    # a tiny model, seconds a round: to see that it works

Both sides take rows of one corpus in one order, at the published settings. float32 on CPU, bfloat16 on a GPU.
"""

from typing import Any

from benchmarks import data, harness
from benchmarks.harness import Options, Side

# Cloud et al. 2025 and the settings of their open-weights code: batches of 66 (22 rows on a device, times 3).
PUBLISHED = dict(rank=8, alpha=8, lr=2e-4, warmup=5, batch=66, epochs=3)
WANTED = 1.2


def settings(asked: Options) -> dict[str, Any]:
    """The published settings; a quick run takes batches of 8."""
    return PUBLISHED | (dict(batch=8) if asked.quick else {})


def micro_batches(batch: int, device: str) -> list[int]:
    """Micro-batches that torch may choose from: from few rows to a third of the published batch, on a GPU to all of it.

    Not more on a CPU: the logits of 66 rows take over 8 GiB there with their gradients.
    """
    sizes = (1, 2, 3, 4, 6, 11, 22) if device == "cpu" else (11, 22, 33, 66)
    return [size for size in sizes if size <= batch] or [batch]


def torch_side(given: dict[str, Any], device: str) -> Side:
    """The side of transformers, peft and torch; `given`: what our sides are given too, `model`, `chats`, `settings`."""
    micro = micro_batches(given["settings"]["batch"], device)
    return Side("transformers", "benchmarks.pytorch.training:start", given | dict(micro=micro))


def run(asked: Options) -> dict[str, Any]:
    """Measure; see the module."""
    chats, chosen = data.chats(), settings(asked)
    model = data.model(asked.size, asked.device)
    given = dict(model=model, chats=chats, settings=chosen)
    sides = [Side("subjax", "benchmarks.ours.training:start", given), torch_side(given, asked.device)]
    found = harness.compare(sides, asked)
    return harness.result(
        "training", asked, found, unit="rows", judged=[("subjax", "transformers", WANTED)],
        settings={**chosen, "rows": len(chats), "mean_tokens": data.length_facts(chats), "dtype": model["dtype"]},
    )  # fmt: skip


if __name__ == "__main__":
    harness.main(run, "training", __doc__ or "")
