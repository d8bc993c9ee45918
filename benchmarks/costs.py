"""Work counted by hand, and its share of what the machine can do: FLOPs of rows and tokens, bytes of a decoding step.

Conventions, stated with every figure: 2 FLOPs a scalar of a matrix a token; attention 4 a key a query a head dimension,
causal masking not counted as saving; a frozen matrix costs 2 forward and 2 backward, a trained one 2 more for its own
gradient. So LoRA counts 4 N + 6 A (N scalars in matrices, A in adapters), full tuning 6 N; padding counts for nothing.
"""

from collections.abc import Mapping
from typing import Any

from subjax.models.architecture import DecoderConfig
from subjax.schema import Tuning

# Large matrix products in either framework: the ceiling that shares are of. In units of GFLOP.
CEILING_SIDES = (
    ("ceiling, jax", "benchmarks.ours.ceilings:large"),
    ("ceiling, torch", "benchmarks.pytorch.ceilings:large"),
)


def row_flops(shape: DecoderConfig, prompt: float, new: int) -> float:
    """FLOPs of answering one prompt with `new` tokens: each token once through every layer, a logit row a new token."""
    layers = shape.matrices - shape.vocab * shape.width
    through = prompt + new - 1  # the last token drawn is read by nobody
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    pairs = prompt * prompt + sum(prompt + drawn for drawn in range(1, new))
    return 2.0 * (through * layers + new * shape.vocab * shape.width) + attention * pairs


def adapter_scalars(shape: DecoderConfig, rank: int) -> int:
    """Scalars in LoRA pairs on all seven matrices of every layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ends = 2 * (shape.width + queries) + 2 * (shape.width + keys) + 3 * (shape.width + shape.hidden)
    return shape.layers * rank * ends


def training_flops(shape: DecoderConfig, tuning: Tuning, prompt: float, completion: float) -> float:
    """FLOPs of one row's training step: the output matrix counts at the completion's positions alone."""
    tokens, head = prompt + completion, shape.vocab * shape.width
    layers = shape.matrices - head
    attention = 12 * shape.layers * shape.heads * shape.head_dim * tokens * tokens  # forward 4, backward 8
    if tuning.kind == "lora":
        adapters = 6.0 * adapter_scalars(shape, tuning.rank) * tokens
        return 4.0 * (layers * tokens + head * completion) + adapters + attention
    return 6.0 * (layers * tokens + head * completion) + attention


def decode_bytes(shape: DecoderConfig, batch: int, filled: float, bytes_each: int) -> float:
    """Bytes that a decoding step must read: every matrix once, and the keys and values of `filled` tokens a row."""
    cache = batch * filled * shape.layers * 2 * shape.kv_heads * shape.head_dim
    return bytes_each * (shape.matrices + cache)


def ceiling(found: Mapping[str, Any]) -> float:
    """FLOPs a second of the best of the run's ceilings, its median over rounds."""
    return 1e9 * max(found[name]["summary"]["median"] for name, _ in CEILING_SIDES if name in found)


def share(found: Mapping[str, Any], flops: Mapping[str, float]) -> dict[str, Any]:
    """What part of the ceiling each side reached: median units a second times FLOPs a unit."""
    most = ceiling(found)
    return {
        "flops_a_second": most,
        "flops_a_unit": dict(flops),
        "share": {name: found[name]["summary"]["median"] * count / most for name, count in flops.items()},
    }
