"""Compiled programs are kept between runs, where the user or JAX's own variable says."""

import os
import subprocess
import sys

import pytest

from subjax import compiled


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv(compiled.FOLDER, "")  # so that what the test sets is taken back
    monkeypatch.delenv(compiled.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_programs_are_kept_under_the_users_cache_by_the_kind_of_cpu(environment, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    compiled.keep()
    folder = os.environ[compiled.FOLDER]
    assert folder.startswith(str(environment / "subjax" / "compiled-"))
    monkeypatch.delenv(compiled.FOLDER)
    monkeypatch.setattr(compiled.platform, "machine", lambda: "another")
    compiled.keep()
    assert os.environ[compiled.FOLDER] != folder


def test_what_the_user_says_wins(environment, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv(compiled.FOLDER, "elsewhere")
    compiled.keep()
    assert os.environ[compiled.FOLDER] == "elsewhere"


PROGRAM = """
import sys
from subjax import compiled
early = sys.argv[1] == "early"
if early: import jax
compiled.keep()
import jax, jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))), len(hits))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_second_run_compiles_nothing(environment, when):
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, when], capture_output=True, text=True, check=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert said[0] == ["512.0", "0"]
    assert said[1][0] == "512.0"
    assert int(said[1][1]) > 0
