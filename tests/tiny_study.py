"""The command as a process, on a whole study of a few seconds, for the tests of crashes and of bad input.

Compiled programs are kept in a folder that the runs of a test session share, and compiled without optimization: the
tests are about what becomes of artifacts. What is compared bit for bit is made under the same settings.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import quick

ROOT = Path(__file__).parent.parent
CONFIG = "tests/configs/tiny.py"
SMALL = f"{CONFIG}:inits=1"


def environment(shared: Path, **more: object) -> dict[str, str]:
    """The environment of a command; `shared` is where compiled programs are kept."""
    return {
        **quick.environment(quick.PLAIN),
        "PYTHONFAULTHANDLER": "1",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **{name: str(value) for name, value in more.items()},
    }


def start(shared: Path, *words: object, **more: object) -> subprocess.Popen:
    """Begin `subjax WORDS` as the leader of a process group of its own; `more` goes into its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "subjax", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env=environment(shared, **more),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said on stderr; whatever it is, no traceback."""
        assert "Traceback" not in self.err, self.err
        return self.err.splitlines()

    @property
    def line(self) -> str:
        """The one line that it said on stderr, under its own name."""
        assert len(self.lines) == 1, self.err
        assert self.err.startswith("subjax: ")
        return self.err.strip()


def end(process: subprocess.Popen, seconds: float = 300.0) -> Done:
    """Wait for a command's end; one that does not end is killed with its group, and the test fails.

    It is aborted first, on which Python says what each of its threads was at.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGABRT)
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"the command did not end in {seconds:.0f} s; it said:\n{out}{err}")
    return Done(process.returncode, out, err)


def command(shared: Path, *words: object, **more: object) -> Done:
    """Do `subjax WORDS`."""
    return end(start(shared, *words, **more))


def run_words(workdir: Path, config: str = SMALL, workers: int = 1) -> list[str]:
    """The words of the command that makes the study."""
    return ["run", f"--config={config}", f"--workdir={workdir}", f"--workers={workers}", "--quiet"]


def cards(workdir: Path) -> dict[str, dict]:
    """Every card of a workdir, by kind/id."""
    found = sorted(workdir.glob("*/*/card.json"))
    return {f"{path.parent.parent.name}/{path.parent.name}": json.loads(path.read_text()) for path in found}


def results(workdir: Path) -> bytes:
    """The bytes of results.json."""
    return (workdir / "report" / "results.json").read_bytes()


@dataclasses.dataclass(frozen=True)
class Study:
    """A study that was made without an interruption: where, from which config, and what is shared with others."""

    workdir: Path
    config: str
    workers: int
    shared: Path

    def words(self, workdir: Path) -> list[str]:
        """The command that makes the same study in another workdir."""
        return run_words(workdir, self.config, self.workers)

    def copy(self, workdir: Path, *, without: tuple[str, ...] = ()) -> Path:
        """Copy the workdir, without its report and the nodes of some kinds."""
        shutil.copytree(self.workdir, workdir, ignore=lambda folder, names: {"report", *without} & {*names})
        return workdir

    def assert_same(self, workdir: Path, *, clean: bool = True) -> None:
        """The same results bit for bit, the same artifacts and, if `clean`, nothing beside them."""
        assert results(workdir) == results(self.workdir)
        mine, theirs = cards(workdir), cards(self.workdir)
        assert {node: card["digest"] for node, card in mine.items()} == {
            n: card["digest"] for n, card in theirs.items()
        }
        for node, card in mine.items() if clean else ():
            assert {path.name for path in (workdir / node).iterdir()} == {"card.json", card["payload"]}
        assert not clean or not (workdir / "partial").exists() or not list((workdir / "partial").iterdir())


def make_study(tmp_path_factory: pytest.TempPathFactory, name: str, config: str, workers: int) -> Study:
    """Make a study once for all test files and all processes of the test session."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-study"
    shared.mkdir(exist_ok=True)
    study = Study(shared / name, config, workers, shared)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (study.workdir / "report" / "index.html").exists():
            done = command(shared, *study.words(study.workdir))
            assert done.status == 0, done.err
    return study
