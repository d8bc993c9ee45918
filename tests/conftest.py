"""Settings that every test runs under."""

import gc
import os
import signal
import tempfile
from pathlib import Path

import jax
import pytest
import quick

from subjax.accelerator import without_tpu

# With libtpu installed to plan with, JAX would look for a TPU, in commands that tests start too.
without_tpu()
if "JAX_PLATFORMS" in os.environ:
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

# Compiled programs that commands keep are the test session's own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="subjax-tests-")

quick.compile_here()

# An accidental broadcast between ranks is a bug that a loss curve hides; here it is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files that take longest, first: with these last, one of two workers would end long before the other.
LONGEST = (
    "slots", "bad_input", "packed", "check", "text_stages", "cohort", "sharding", "sampler", "hf_families", "processes",
    "benchmarks", "export", "rehearsal", "constraint", "cohorts", "stages", "mesh_equivalence", "trainer", "models",
    "golden", "tries", "crash", "optimizers", "report", "ensemble", "adapters",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Put the tests of `LONGEST` before the others, each file's in their order."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


# Commands that tests start must hear Ctrl-C also where the tests run in the background, with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Let compiled programs go in time. Each takes several mappings of memory, of which Linux gives a process 65,530;
    where there are no more, the compiler ends the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles():
    """For files whose programs run a few steps: what is saved in compiling them is most of their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
