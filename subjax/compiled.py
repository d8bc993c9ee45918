"""Where compiled programs are kept between runs and shared by workers. Needs no JAX, and is settled before it."""

import hashlib
import os
import pathlib
import platform
import sys

FOLDER = "JAX_COMPILATION_CACHE_DIR"


def keep() -> None:
    """Keep programs that took a second to compile under the user's cache folder; JAX's own variable wins.

    No bound is set on its size: JAX's way to keep one is not safe where several processes write. It may be deleted.
    Programs for a CPU are made for its instructions, so each kind of CPU has a folder of its own: a home folder may be
    shared by machines of several kinds.
    """
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    os.environ.setdefault(FOLDER, str(home / "subjax" / f"compiled-{_kind_of_cpu()}"))
    if "jax" in sys.modules:  # it read the variable when it was imported
        import jax

        jax.config.update("jax_compilation_cache_dir", os.environ[FOLDER])


def _kind_of_cpu() -> str:
    facts = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        facts += next([line] for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
