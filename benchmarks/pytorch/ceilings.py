"""What torch gets out of the machine with nothing else to do: large matrix products."""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.harness import timed
from benchmarks.pytorch import models
from benchmarks.side import Ready

LONGEST = 5.0  # seconds of a round, as on our side


def large(setup: Mapping[str, Any]) -> Ready:
    """GFLOP a second of a square product that fills the machine. Setup: `dtype`."""
    device = models.settle(setup)
    side = 2048 if setup["device"] == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, setup["dtype"])) for _ in range(2))

    def piece(_: int) -> float:
        a @ b
        models.fence(device)
        return 2e-9 * side**3

    piece(0)
    return Ready(lambda index, seconds: timed(piece, min(seconds, LONGEST)), {"side": side, "dtype": setup["dtype"]})
