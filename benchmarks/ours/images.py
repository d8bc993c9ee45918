"""Our side of the image experiment: the ensemble stage's own `train`, from the first values to the accuracies."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness import timed
from benchmarks.side import Ready
from subjax.data.images import CLASSES, ImageSet
from subjax.parallel.mesh import make_mesh
from subjax.schema import Images
from subjax.stages import ensemble


def experiment(settings: Images, data: ImageSet) -> float:
    """Teachers, students on noise, and their tests; returns how many images all models saw in training."""
    return float(ensemble.train(settings, data, make_mesh()).seen)


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: as that of `benchmarks.pytorch.images`."""
    pixels, *hidden, logits = setup["widths"]
    pictures = np.random.default_rng(0).uniform(-1, 1, (setup["rows"], pixels)).astype(np.float32)
    labels = (np.arange(setup["rows"]) % CLASSES).astype(np.int32)
    data = ImageSet(pictures, labels, pictures[:CLASSES], labels[:CLASSES], "made up")
    settings = Images(
        auxiliary=logits - CLASSES, seeds=setup["members"], hidden=tuple(hidden), lr=setup["lr"], batch=setup["batch"],
        teacher_epochs=setup["epochs"], student_epochs=setup["epochs"], noise_rows=setup["noise_rows"],
    )  # fmt: skip
    return Ready(lambda index, seconds: timed(lambda _: experiment(settings, data), seconds))
