"""The image experiment, 100 models, against the published way, all batched in one torch program: images a second.

    python -m benchmarks.images            # about half an hour on two cores
    python -m benchmarks.images --quick    # four models, a small set: to see that it works

Whole experiments, from the first values to trained students: MLPs 784-256-256-13, Adam at 3e-4, batches of 1024, five
epochs each of teachers and students. A set of 8,192 images in MNIST's shape instead of 60,000: the published way keeps
every model's noise, and 100 times 60,000 of it would be 19 GB. Images are counted once a model that trains on them.
"""

from typing import Any

from benchmarks import harness
from benchmarks.harness import Options, Side

PUBLISHED = dict(widths=[784, 256, 256, 13], lr=3e-4, batch=1024, epochs=5)
MEMBERS, ROWS = 100, 8192
WANTED = 2.0


def run(asked: Options) -> dict[str, Any]:
    """Measure; see the module."""
    size = dict(members=4, rows=2048, noise_rows=2048) if asked.quick else dict(
        members=MEMBERS, rows=ROWS, noise_rows=ROWS
    )  # fmt: skip
    given = PUBLISHED | size
    sides = [
        Side("subjax", "benchmarks.ours.images:start", given),
        Side("torch, as published", "benchmarks.pytorch.images:start", given | dict(best=False)),
        Side("torch, baddbmm and fused Adam", "benchmarks.pytorch.images:start", given | dict(best=True)),
    ]
    found = harness.compare(sides, asked)
    judged = [("subjax", side.name, WANTED) for side in sides[1:]]
    return harness.result("images", asked, found, unit="images", judged=judged, settings=given)


if __name__ == "__main__":
    harness.main(run, "images", __doc__ or "")
