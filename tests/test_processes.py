"""Several processes as one job: who is missing is named, what they agree on is the same, and what ends one ends all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import roll_call
import tiny_checkpoint
from etils import epath
from test_crash import small  # noqa: F401  # the study that nobody interrupted
from tiny_study import ROOT, SMALL, Study, cards, command, run_words
from two import Job, free_port, job

from subjax.errors import UsageError
from subjax.models import checkpoints
from subjax.parallel import cluster, native

CRASH = f"{Path(__file__).parent / 'crash'}{os.pathsep}{Path(__file__).parent.parent}"


# ------------------------------------------------------------------------------------------------ which job it is


def test_flags_name_a_job():
    assert cluster.of_flags("", None, None) is None
    assert cluster.of_flags("a:7000", 4, 3) == cluster.Job("a:7000", 4, 3)
    for given, words in [
        (("", 2, 0), "--coordinator is missing"),
        (("a:7000", None, 0), "--processes is missing"),
        (("a:7000", 2, None), "--process is missing"),
        (("a", 2, 0), "'a' of --coordinator"),
        (("a:7000", 2, 2), "process 2 of 2"),
    ]:
        with pytest.raises(UsageError, match=words):
            cluster.of_flags(*given)


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:8080"}
NAMED = {"JAX_COORDINATOR_ADDRESS": "job-0.set:5000", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, cluster.Job("n1:61517", 4, 3, (1,), ("n1", "n1", "n2", "n2"))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:61000"},
         cluster.Job("127.0.0.1:61000", 4, 3, (1,), ("n1", "n1", "n2", "n2"))),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
         cluster.Job("n1:61517", 2, 1, None, ("n1", "n2"))),
        (SLURM | {"SLURM_DISTRIBUTION": "cyclic"}, cluster.Job("n1:61517", 4, 3, (1,))),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (TPU, cluster.Job("t0:8482", 2, 1, None, ("t0", "t1"))),
        (TPU | SLICES, cluster.Job("s0:8482", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (NAMED, cluster.Job("job-0.set:5000", 3, 2)),
        (NAMED | {"JAX_PROCESS_ID": "1"}, cluster.Job("job-0.set:5000", 3, 1)),
    ],
)  # fmt: skip
def test_the_environment_names_a_job(environment, found):
    assert cluster.detected(environment) == found


def test_an_environment_that_cannot_be_read_says_so():
    with pytest.raises(UsageError, match=r"a job of Slurm, whose variables cannot be read .*give --coordinator"):
        cluster.detected(SLURM | {"SLURM_NTASKS": "many"})


def test_slurms_lists_of_nodes():
    assert cluster.hosts_of("gpu[1-3,07],login") == ["gpu1", "gpu2", "gpu3", "gpu07", "login"]
    assert cluster.hosts_of("a") == ["a"]
    assert cluster.hosts_of("r[08-11]s") == ["r08s", "r09s", "r10s", "r11s"]


def test_the_roll_call_is_held_next_to_the_coordinator():
    assert cluster.Job("a:7000", 2, 0).roll_call_port == 7001
    assert cluster.Job("a:65535", 2, 0).roll_call_port == 65534
    assert cluster.Job("[::1]:7000", 2, 0).host == "::1"


# ------------------------------------------------------------------------------------------------ the roll call


class Calls:
    """Processes of `roll_call.py` on one port."""

    def __init__(self) -> None:
        self.port, self.started = free_port(), []

    def start(self, count: int, index: int, *do: str, timeout: float = 30.0) -> subprocess.Popen:
        words = [sys.executable, roll_call.__file__, self.port, count, index, timeout, *do]
        process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    def both(self, do: str) -> list[tuple[int, str, str]]:
        """What became of two that did a thing, and then agreed."""
        for index in range(2):
            self.start(2, index, do, "agree")
        return self.ended()

    def ended(self, seconds: float = 60.0) -> list[tuple[int, str, str]]:
        """(status, stdout, stderr) of each."""
        said = [process.communicate(timeout=seconds) for process in self.started]
        return [(p.returncode, out.strip(), err.strip()) for p, (out, err) in zip(self.started, said, strict=True)]


@pytest.fixture
def calls():
    made = Calls()
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_processes_agree_and_leave(calls):
    for index in (2, 0, 1):
        calls.start(3, index, "agree", "either", "agree")
    told = json.dumps([[0, 10, 20], "of 0"])
    for status, out, err in calls.ended():
        assert (status, err) == (0, "")
        assert out.splitlines() == ["joined", told, "[true, false]", told, "closed"]


def test_a_process_that_is_connected_to_itself_asks_again(calls):
    for index, do in ((1, ["itself", "agree"]), (0, ["agree"])):
        calls.start(2, index, *do)
    assert [(status, out.split()[-1], err) for status, out, err in calls.ended()] == [(0, "closed", "")] * 2


def test_who_does_not_come_is_named(calls):
    calls.start(4, 0, "slow", timeout=3)  # also where the others are gone before it has said so
    calls.start(4, 2, timeout=3)
    (zero, out, _), (two, silent, err) = calls.ended()
    assert (zero, two, silent, err) == (1, 1, "", "")
    assert out.startswith("refused: processes 1 (host1), 3 (host3) of 4 did not come within 3 s; there: 0 (")
    assert "--init-timeout" in out


def test_a_coordinator_that_does_not_come_is_named(calls):
    calls.start(2, 1, timeout=1)
    [(status, out, err)] = calls.ended()
    assert (status, err) == (1, "")
    assert f"process 0 did not answer at 127.0.0.1, port {calls.port + 1}, within 1 s" in out


def test_processes_that_do_not_belong_together_are_refused(calls):
    calls.start(2, 0)
    calls.start(3, 1)
    (zero, out, _), (one, _, _) = calls.ended()
    assert (zero, one) == (1, 1)
    assert "was told of 3 processes, this one of 2; give all the same --processes" in out


def test_two_processes_of_one_number_are_refused(calls):
    calls.start(3, 0)
    calls.start(3, 1)
    calls.start(3, 1)
    found = calls.ended()
    assert [status for status, _, _ in found] == [1, 1, 1]
    assert "two processes say that they are number 1" in found[0][1]


@pytest.mark.parametrize("dead", [1, 0])
def test_a_process_that_is_killed_ends_the_others_at_once(calls, dead):
    begun = time.monotonic()
    for index in range(2):
        calls.start(2, index, "agree", "die" if index == dead else "sleep")
    found = calls.ended()
    assert time.monotonic() - begun < 50  # the other one sleeps for 60 s
    assert found[dead][0] == -signal.SIGKILL
    status, _, err = found[1 - dead]
    assert status == 1
    assert len(err.splitlines()) == 1
    assert err.startswith(f"subjax: process {dead} (")
    assert "is gone: killed" in err


def test_a_process_that_says_nothing_more_is_lost(calls):
    calls.start(2, 0, "silent=2", "agree", "sleep")
    calls.start(2, 1, "silent=2", "agree", "stop")
    _, err = calls.started[0].communicate(timeout=50)
    assert calls.started[0].returncode == 1
    assert err.strip().startswith("subjax: process 1 (")
    assert "has not been heard of for 2 s" in err


@pytest.mark.parametrize(("do", "words"), [("fail", "the disk is full"), ("wrong", "NaN at step 3")])
def test_a_failure_of_one_is_told_once_and_ends_all(calls, do, words):
    calls.start(3, 0, "agree", "either")
    calls.start(3, 1, "agree", do)
    calls.start(3, 2, "agree", "either")
    found = calls.ended()
    assert [status for status, _, _ in found] == [1, 1, 1]
    assert [err for _, _, err in found][1:] == ["", ""]
    err = found[0][2]
    assert len(err.splitlines()) == 1
    assert err.startswith("subjax: process 1 (")
    assert err.endswith(words)


def test_a_bug_in_one_process_is_told_with_its_traceback(calls):
    (zero, out, err), (one, theirs, _) = calls.both("bug")
    assert (zero, one) == (0, 0)
    assert "process 1: ValueError: no such row (a bug: its traceback is above)" in out
    assert "ValueError: no such row" in theirs
    assert err.splitlines()[0].startswith("Traceback")
    assert err.splitlines()[-1] == "ValueError: no such row"


def test_a_full_disk_of_one_process_is_told_as_one(calls):
    (zero, out, err), (one, theirs, _) = calls.both("full")
    assert (zero, one, err) == (0, 0, "")
    assert "DiskFull: process 1: disk full at /scratch" in out
    assert "DiskFull: disk full at /scratch" in theirs


def test_what_process_0_cannot_look_at_fails_in_all(calls):
    (zero, out, _), (one, theirs, _) = calls.both("look")
    assert (zero, one) == (0, 0)
    assert "Input/output error" in out
    assert "process 0: " in theirs
    assert all('["failed", ' in said for said in (out, theirs))


SPEAKS = """
import os, sys, time
from subjax import cli_job
from subjax.cli_arguments import Arguments, Command

def do(arguments):
    kept = sys.stderr  # as progress keeps it
    os.write(2, b"[Gloo] Rank 0 is connected to 1 peer ranks. \\n1\\nnative, at the end\\n")
    print("at once", file=kept, flush=True)
    time.sleep(0.2)
    return 0

arguments = Arguments(coordinator="127.0.0.1:{port}", processes=2, process={index}, init_timeout=20)
sys.exit(cli_job.in_job(Command(do), arguments))
"""


def test_what_python_says_is_written_at_once_and_what_native_code_says_is_not_lost(calls):
    words = [[sys.executable, "-c", SPEAKS.format(port=calls.port, index=index)] for index in range(2)]
    calls.started += [
        subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for each in words
    ]
    assert [(status, err) for status, _, err in calls.ended()] == [(0, "at once\nnative, at the end")] * 2


GREETING = "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"


@pytest.mark.parametrize(
    ("line", "noise"),
    [
        (GREETING, True),
        # Two threads that greet at once: the end of one is left behind the other's line.
        ("[Gloo] Rank [Gloo] Rank 11 is connected to  is connected to 11 peer ranks. ", True),
        ("1", True),
        ("", True),
        ("[Gloo] Rank 1 cannot connect to peer 0: timed out", False),
        (f"{GREETING}: lost", False),
        ("out of memory at step 11", False),
        ("E0101 coordination_service_agent.cc:1: heartbeat failed", True),
    ],
)
def test_greetings_of_gloo_are_noise_however_they_are_broken_and_its_errors_are_none(line, noise):
    assert native.noise(line.encode() + b"\n") is noise


# ------------------------------------------------------------------------------------------------ the command


def test_a_platform_that_is_not_there_is_named(tmp_path):
    done = command(tmp_path, "run", f"--config={SMALL}", f"--workdir={tmp_path / 'w'}", JAX_PLATFORMS="nonsense")
    assert done.status == 2
    assert done.line.startswith("subjax: JAX_PLATFORMS=nonsense gives no device (")
    assert "set JAX_PLATFORMS=cpu" in done.line


def test_the_command_names_who_is_missing_before_anything_else(tmp_path):
    [done] = job(tmp_path, *_words(tmp_path / "w", "--init-timeout=1"), only=(0,)).ended()
    assert done.status == 1
    assert done.line.startswith("subjax: process 1 of 2 did not come within 1 s; there: 0 (")
    assert not (tmp_path / "w").exists()


def _words(workdir: Path, *more: str) -> list[str]:
    return ["run", f"--config={SMALL}", f"--workdir={workdir}", "--quiet", *more]


def _one_line(runs: Job, whom: int, moment: str) -> None:
    """Process `whom` was killed, and the other ended with one line that says so."""
    ended = runs.ended()
    assert ended[whom].status == -signal.SIGKILL, f"{moment}: {ended[0].err}{ended[1].err}"
    assert ended[1 - whom].status == 1
    assert ended[1 - whom].line.startswith(f"subjax: process {whom} (")
    assert "is gone" in ended[1 - whom].line


def _killed(shared: Path, workdir: Path, whom: int, moment: str, *words: str) -> None:
    """Run the study in two processes until one of them is killed at a moment."""
    markers = workdir.parent / "markers"
    markers.mkdir(exist_ok=True)
    both = lambda value: {0: str(value), 1: str(value)}  # noqa: E731
    runs = job(
        shared, *words, KILL={whom: f"worker:{moment}"}, KILL_SAVES=both(1), KILL_MARKERS=both(markers),
        PYTHONPATH=both(CRASH),
    )  # fmt: skip
    _one_line(runs, whom, moment)


def _near(workdir: Path, other: Path) -> None:
    """The corpora of two workdirs are the same; losses and readings are, within 2e-6 and 1e-6."""
    mine, theirs = cards(workdir), cards(other)
    assert mine.keys() == theirs.keys()
    for node, card in mine.items():
        folders = [w / node / c["payload"] for w, c in ((workdir, card), (other, theirs[node]))]
        if card["kind"] == "corpus":
            assert card["digest"] == theirs[node]["digest"]
        elif card["kind"] == "evaluation":
            found = [json.loads((folder / "readings.json").read_text())["categories"] for folder in folders]
            for category in found[0]:
                p = [[q["p"] for q in readings[category]["questions"]] for readings in found]
                np.testing.assert_allclose(p[0], p[1], rtol=0, atol=1e-6)
        elif "loss" in card["metrics"]:  # a checkpoint has none
            assert card["metrics"]["loss"] == pytest.approx(theirs[node]["metrics"]["loss"], rel=2e-6)


def test_a_base_in_two_processes_killed_in_training_goes_on_in_one(small: Study, tmp_path):  # noqa: F811
    """kill -9 of one of two; then one process alone takes up what both had saved."""
    workdir = tmp_path / "work"
    base = next(path.name for path in (small.workdir / "base").iterdir())
    assert command(small.shared, "plan", f"--config={SMALL}", f"--workdir={workdir}").status == 0
    stage = ["stage", base, f"--workdir={workdir}", "--quiet"]
    _killed(small.shared, workdir, 1, "base-step", *stage, "--mesh=fsdp:2")
    # The second block of 11 steps was under way, and the first's state saved, or still on its way to the disk.
    saved = [path.name for path in (workdir / "partial" / f"base-{base}").glob("step-*")]
    assert set(saved) <= {"step-00000011", "step-00000022"}
    done = command(small.shared, *stage, "--mesh=fsdp:2")
    assert (done.status, done.err) == (0, "")
    card, alone = cards(workdir)[f"base/{base}"], cards(small.workdir)[f"base/{base}"]
    assert card["profile"]["mesh"] == {"replica": 1, "fsdp": 2, "tensor": 1}
    assert card["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=2e-6)
    assert checkpoints.digest(epath.Path(workdir / "base" / base / card["payload"] / "arrays")) == card["digest"]


@pytest.fixture(scope="module")
def pair(small: Study, tmp_path_factory) -> Path:  # noqa: F811
    """The study, made by two processes with two virtual devices each, that nobody interrupted."""
    workdir = tmp_path_factory.mktemp("pair") / "work"
    first, second = job(small.shared, *_words(workdir, "--mesh=fsdp:4")).ended()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert (first.err, second.out, second.err) == ("", "", "")
    assert "Gloo" not in first.out
    return workdir


@pytest.mark.slow
def test_two_processes_make_what_one_makes(pair, small):  # noqa: F811
    _near(pair, small.workdir)
    assert {card["profile"]["processes"] for card in cards(pair).values()} == {2}
    done = command(small.shared, "verify", "--all", f"--workdir={pair}")
    assert done.status == 0, done.err
    assert not list((pair / "partial").iterdir())


@pytest.mark.slow
def test_a_second_run_in_two_processes_finds_all_done(pair, small):  # noqa: F811
    before = cards(pair)
    first, second = job(small.shared, *_words(pair, "--mesh=fsdp:4")).ended()
    assert (first.status, second.status, first.err, second.err) == (0, 0, "", "")
    assert cards(pair) == before


COHORT = "--config.compute.cohort=8"


def _trained_together(workdir: Path) -> list[int]:
    """How many students trained with each student, itself counted."""
    return [len(card["extra"].get("cohort", [])) for card in cards(workdir).values() if card["kind"] == "student"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:4", "replica:2,tensor:2"])
def test_students_who_train_together_in_two_processes_are_those_who_train_alone_in_one(small, tmp_path, mesh):  # noqa: F811
    workdir = tmp_path / "work"
    first, second = job(small.shared, *_words(workdir, f"--mesh={mesh}", COHORT)).ended()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert _trained_together(workdir) == [2] * 2
    assert _trained_together(small.workdir) == [0] * 2
    _near(workdir, small.workdir)


@pytest.mark.slow
def test_two_processes_make_a_pretrained_study(small, tmp_path):  # noqa: F811
    """Weights read onto the mesh, packed chats, LoRA, constrained rows and tries, tensor parallel over processes; and
    both students in one program.
    """
    model = tiny_checkpoint.write(tmp_path / "model")
    config = f"--config={ROOT}/tests/configs/tiny_pretrained.py:model={model}"
    alone = command(small.shared, "run", config, f"--workdir={tmp_path / 'one'}", "--workers=0", "--quiet")
    assert alone.status == 0, alone.err
    words = ["run", config, f"--workdir={tmp_path / 'two'}", "--mesh=fsdp:2,tensor:2"]
    first, second = job(small.shared, *words).ended()
    assert (first.status, second.status, second.err) == (0, 0, ""), first.err
    _near(tmp_path / "two", tmp_path / "one")
    words[2] = f"--workdir={tmp_path / 'together'}"
    again = [done.status for done in job(small.shared, *words, COHORT).ended()]
    assert again == [0, 0]
    assert _trained_together(tmp_path / "together") == [2] * 2
    _near(tmp_path / "together", tmp_path / "one")
    # The table, once, before the work.
    assert first.err.startswith("processes  2\ndevices    4 x cpu, 2 a process\nmesh       fsdp:2,tensor:2; models are")
    assert first.err.count("bytes per device") == 1
    assert "tiny/0: 62.2 k parameters; 1 base, 2 teachers, 2 corpora, 5 evaluations, 2 students" in first.err


MOMENTS = ((1, "base-step"), (0, "base-step"), (1, "saving"), (0, "state-save"), (0, "sampling"), (1, "sampling"))


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "moment"), MOMENTS)
def test_one_of_two_is_killed_and_both_go_on(pair, small, tmp_path, whom, moment):  # noqa: F811
    """On the same numerics profile, bit for bit."""
    workdir = tmp_path / "work"
    _killed(small.shared, workdir, whom, moment, *_words(workdir, "--mesh=fsdp:4"))
    made = cards(workdir)
    first, second = job(small.shared, *_words(workdir, "--mesh=fsdp:4")).ended()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    now, whole = cards(workdir), cards(pair)
    assert {node: card["digest"] for node, card in now.items()} == {n: card["digest"] for n, card in whole.items()}
    assert {node: now[node] for node in made} == made


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["base-step", "sampling"])
def test_one_of_two_is_killed_and_one_goes_on(small, tmp_path, moment):  # noqa: F811
    """On another numerics profile, within the tolerance."""
    workdir = tmp_path / "work"
    _killed(small.shared, workdir, 0, moment, *_words(workdir, "--mesh=fsdp:2"))
    shutil.rmtree(workdir / "report", ignore_errors=True)
    assert command(small.shared, *run_words(workdir)).status == 0
    _near(workdir, small.workdir)


@pytest.mark.slow
def test_sigterm_of_one_stops_all_at_the_same_step(small, tmp_path):  # noqa: F811
    workdir = tmp_path / "work"
    steps = tmp_path / "steps"
    runs = job(
        small.shared, *_words(workdir, "--mesh=fsdp:2"), PYTHONPATH={1: CRASH}, KILL_SAVES={1: "1"},
        KILL_STEPS={1: str(steps)},
    )  # fmt: skip
    while not steps.exists() and runs.processes[1].poll() is None:
        time.sleep(0.02)
    runs.processes[1].terminate()
    ended = runs.ended()
    assert [done.status for done in ended] == [75, 75]
    assert ended[0].line.startswith("subjax: stopped by SIGTERM: ")
    assert ended[1].err == ""
    assert list((workdir / "partial").glob("base-*/step-*"))
    first, second = job(small.shared, *_words(workdir, "--mesh=fsdp:2")).ended()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    _near(workdir, small.workdir)
