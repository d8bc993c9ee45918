"""Run as a program: load a checkpoint; print what the host held beside the device's arrays at the peak, in bytes."""

import json
import sys
import threading

import jax
import numpy as np

from subjax.models import weights
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import network
from subjax.models.source import open_source
from subjax.schema import Numerics


def anonymous() -> int:
    """Anonymous memory of this process: mapped files do not count."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folder: str) -> None:
    source = open_source(folder)
    net = network(decoder_config_of(source.config, numerics=Numerics()))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))  # the backend itself, before the baseline is taken
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = jax.block_until_ready(weights.load(source, net))
    done.set()
    watcher.join()
    held = sum(value.nbytes for value in params.values())
    largest = max(int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in source.tensors.values())
    print(json.dumps({"extra": peak[0] - before - held, "held": held, "largest": largest}))


if __name__ == "__main__":
    import ml_dtypes  # noqa: F401  (names bfloat16 for numpy)

    main(sys.argv[1])
