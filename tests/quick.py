"""How tests have their programs compiled, which is most of the time: they are many, and their arithmetic is small."""

import os
from unittest import mock

import jax

# XLA's older code for fused operations compiles in half the time. XLA ends a process that gives it a flag which it does
# not know, so that a version that may have dropped this one is not given it.
FUSION = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
USERS = {"xla_cpu_use_fusion_emitters": True} if FUSION else {}  # as `compiler_options`: a program as users have it
PLAIN = "--xla_backend_optimization_level=0"


def environment(*flags: str) -> dict[str, str]:
    """The environment of a script that a test starts on CPU: this process's own, but with these flags for XLA."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def compile_here() -> None:
    """Have this process's programs compiled so. XLA reads its flags once, with the first program: commands that tests
    start later have a user's own.
    """
    flags = f"{FUSION} {os.environ.get('XLA_FLAGS', '')}".strip()
    with mock.patch.dict(os.environ, XLA_FLAGS=flags):
        jax.jit(lambda x: x + 1)(0).block_until_ready()
