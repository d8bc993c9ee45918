"""The executor on toy nodes: order, resume, failures, deaths of workers and of the run, two runs at once, signals."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import toy_run
from toy_run import Graph, notes

from subjax import run
from subjax.errors import SubjaxError, UsageError
from subjax.progress import Progress
from subjax.schedule import Schedule
from subjax.store import Store

TOY = "toy_run:execute"


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def chain_and_fan() -> Graph:
    """base -> a, b; a -> c; c and b -> d."""
    graph = Graph()
    graph.add("base", kind="base")
    graph.add("a", "base")
    graph.add("b", "base")
    graph.add("c", "a")
    graph.add("d", "b", "c", kind="end")
    return graph


def execute(graph: Graph, workdir: Path, workers: int = 0, **more) -> run.Outcome:
    more.setdefault("stream", io.StringIO())
    return run.execute_plan(graph.plan, Store(workdir), workers=workers, execute=TOY, **more)


def digests(graph: Graph, workdir: Path) -> dict[str, str]:
    store = Store(workdir)
    return {name: store.card(graph.nodes[id].kind, id).digest for name, id in graph.of.items()}


def start(graph: Graph, tmp_path: Path, workers: int = 2) -> subprocess.Popen:
    """The toy plan as a command of its own."""
    plan = graph.save(tmp_path / "plan.json")
    return subprocess.Popen(
        [sys.executable, toy_run.__file__, plan, tmp_path / "work", str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def wait_for(what, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
    return found


def begun(tmp_path: Path, count: int = 1) -> list[int]:
    """Wait until `count` nodes have begun; give the pids that are at them."""
    store = Store(tmp_path / "work")
    lines = wait_for(lambda: (found := [line for line in notes(store) if line[0] == "begin"])[count - 1 :] and found)
    return [int(line[2]) for line in lines]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---------------------------------------------------------------------------------------------------- scheduling


def test_schedule_takes_the_longest_chain_first():
    graph = Graph()
    graph.add("short", flops=10.0)
    graph.add("head", flops=1.0, group="other")
    graph.add("tail", "head", flops=100.0)
    schedule = Schedule(graph.nodes, ())
    assert schedule.take((), (), 2) == [graph.of["head"]]
    assert schedule.take((), (), 2) == [graph.of["short"]]
    assert schedule.take((), (), 2) == []
    schedule.there(graph.of["head"])
    assert schedule.take((), (), 2) == [graph.of["tail"]]


def test_schedule_prefers_what_is_compiled_then_what_nobody_else_has():
    graph = Graph()
    for name, group, flops in [("x0", "x", 12.0), ("x1", "x", 12.0), ("y0", "y", 10.0), ("y1", "y", 10.0)]:
        graph.add(name, group=group, flops=flops)
    graph.add("small", group="small", flops=1.0)
    schedule = Schedule(graph.nodes, ())
    assert schedule.take((), (), 2)[0] in (graph.of["x0"], graph.of["x1"])
    assert schedule.take((), {("toy", "x")}, 2)[0] in (graph.of["y0"], graph.of["y1"])
    assert schedule.take({("toy", "y")}, {("toy", "x")}, 2)[0] in (graph.of["y0"], graph.of["y1"])
    # A compiled group does not keep a worker from a chain more than twice as long.
    assert schedule.take({("toy", "small")}, (), 2)[0] in (graph.of["x0"], graph.of["x1"])
    assert schedule.take({("toy", "x")}, (), 2) == [graph.of["small"]]


def test_schedule_hands_out_batches_that_shrink_and_never_mix():
    graph = Graph()
    for number in range(40):
        graph.add(f"p{number}", group="p", flops=5.0)
    graph.add("q", group="q", flops=5.0)
    schedule, sizes = Schedule(graph.nodes, ()), []
    while batch := schedule.take({("toy", "p")}, (), 2):
        assert len({graph.nodes[id].group for id in batch}) == 1
        sizes.append(len(batch))
    assert sum(sizes) == 41
    assert max(sizes) == 4
    assert sizes[-4:] == [1, 1, 1, 1]


def test_schedule_ignores_what_is_done_already():
    graph = chain_and_fan()
    schedule = Schedule(graph.nodes, {graph.of["base"], graph.of["a"]})
    assert schedule.ready == {graph.of["b"], graph.of["c"]}


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("workers", [0, 2])
def test_inputs_come_first_and_a_second_run_makes_nothing(tmp_path, workers):
    graph = chain_and_fan()
    outcome = execute(graph, tmp_path, workers)
    assert sorted(outcome.made) == sorted(graph.nodes)
    assert not outcome.failed
    order = [line[1] for line in notes(Store(tmp_path)) if line[0] == "made"]
    assert order[0] == "base"
    assert order[-1] == "d"
    assert order.index("a") < order.index("c")
    again = execute(graph, tmp_path, workers)
    assert again.made == ()
    assert sorted(again.reused) == sorted(graph.nodes)
    assert len(notes(Store(tmp_path))) == 10  # begin and made, once each


def test_workers_and_this_process_make_the_same(tmp_path):
    graph = chain_and_fan()
    execute(graph, tmp_path / "here")
    execute(graph, tmp_path / "there", workers=2)
    assert digests(graph, tmp_path / "here") == digests(graph, tmp_path / "there")


def test_workers_are_pinned_before_jax_and_work_side_by_side(tmp_path):
    graph, store, gate = Graph(), Store(tmp_path / "work"), tmp_path / "gate"
    for number in range(4):
        graph.add(f"n{number}", gate=str(gate))
    opener = threading.Thread(target=lambda: (begun(tmp_path, count=2), gate.touch()))
    opener.start()
    execute(graph, tmp_path / "work", workers=2)  # would not end if one node waited for another
    opener.join()
    for id, node in graph.nodes.items():
        assert store.card(node.kind, id).profile == {"cores": 1, "NPROC": "1"}
    assert {line[3] for line in notes(store)} == {"False"}
    assert len({line[2] for line in notes(store)} - {str(os.getpid())}) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_costs_what_is_below_it_and_nothing_else(tmp_path, workers):
    graph = Graph()
    graph.add("base")
    graph.add("bad", "base", fail="no valid row\nin 100")
    graph.add("worse", "base", bug="oops")
    graph.add("below", "bad")
    graph.add("lowest", "below", "base")
    graph.add("good", "base")
    stream = io.StringIO()
    outcome = execute(graph, tmp_path, workers, stream=stream)
    of = graph.of
    assert sorted(outcome.made) == sorted([of["base"], of["good"]])
    assert outcome.failed[of["bad"]] == "no valid row in 100"
    assert outcome.failed[of["worse"]].startswith("ValueError: oops")
    assert "Traceback" in stream.getvalue()
    assert "in misbehave" in stream.getvalue()
    assert outcome.skipped == {
        of["below"]: f"needs toy bad ({of['bad']}), which failed",
        of["lowest"]: f"needs toy bad ({of['bad']}), which failed",
    }
    store = Store(tmp_path)
    assert store.failure("toy", of["bad"])["message"] == "no valid row in 100"
    assert store.owner("toy", of["bad"]) is None


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_killed_worker_is_replaced_and_its_node_tried_once_more(tmp_path, deaths):
    graph = Graph()
    graph.add("victim", deaths=deaths)
    graph.add("below", "victim")
    for number in range(3):
        graph.add(f"other{number}")
    stream = io.StringIO()
    outcome = execute(graph, tmp_path, workers=2, stream=stream)
    assert f"toy victim ({graph.of['victim']}): the worker was killed by signal 9, SIGKILL" in stream.getvalue()
    if deaths == 1:
        assert sorted(outcome.made) == sorted(graph.nodes)
    else:
        assert list(outcome.failed) == [graph.of["victim"]]
        assert "killed by signal 9, SIGKILL" in outcome.failed[graph.of["victim"]]
        assert list(outcome.skipped) == [graph.of["below"]]
        assert len(outcome.made) == 3


def test_a_worker_told_to_stop_by_somebody_else_saves_and_is_replaced(tmp_path):
    graph = Graph()
    graph.add("long", gate=str(tmp_path / "gate"))
    command = start(graph, tmp_path, workers=1)
    (pid,) = begun(tmp_path)
    os.kill(pid, signal.SIGTERM)
    begun(tmp_path, count=2)
    (tmp_path / "gate").touch()
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    assert json.loads(out)["made"] == 1
    assert [line[0] for line in notes(Store(tmp_path / "work"))] == ["begin", "saved", "begin", "made"]


def test_a_worker_that_cannot_start_is_one_error(tmp_path):
    with pytest.raises(SubjaxError, match="a worker could not start: ModuleNotFoundError"):
        run.execute_plan(
            chain_and_fan().plan, Store(tmp_path), workers=1, execute="no_such:thing", stream=io.StringIO()
        )


def test_only_makes_what_is_asked_and_wants_its_inputs(tmp_path):
    graph = chain_and_fan()
    with pytest.raises(UsageError, match=f"its in0, base \\({graph.of['base']}\\), is not made yet; .* subjax stage"):
        execute(graph, tmp_path, only=[graph.of["a"]])
    outcome = execute(graph, tmp_path, only=[graph.of["base"], graph.of["a"]])
    assert sorted(outcome.made) == sorted([graph.of["base"], graph.of["a"]])


def test_an_accelerator_has_one_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert run.worker_count(None) == 0
    with pytest.raises(UsageError, match="JAX_PLATFORMS=cpu"):
        run.worker_count(2)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert run.worker_count(3) == 3
    assert run.worker_count(None) >= 1


# ----------------------------------------------------------------------------------- deaths, signals, company


def gated_plan(tmp_path: Path) -> Graph:
    """One node that is soon made, and two that wait for the gate."""
    graph = Graph()
    graph.add("quick")
    for number in range(2):
        graph.add(f"long{number}", "quick", gate=str(tmp_path / "gate"))
    return graph


def test_a_killed_run_leaves_no_worker_and_the_next_one_takes_over(tmp_path):
    graph = gated_plan(tmp_path)
    command = start(graph, tmp_path)
    pids = begun(tmp_path, count=3)  # quick, and one long node on each worker
    command.kill()
    command.communicate(timeout=60)
    wait_for(lambda: all(gone(pid) for pid in pids))
    (tmp_path / "gate").touch()
    outcome = execute(graph, tmp_path / "work", workers=2)
    assert sorted(outcome.made) == sorted([graph.of["long0"], graph.of["long1"]])
    assert outcome.reused == (graph.of["quick"],)
    assert not outcome.failed


def test_two_runs_at_once_both_end_with_everything_and_share_the_work(tmp_path):
    graph = chain_and_fan()
    for number in range(4):
        graph.add(f"n{number}", "base", gate=str(tmp_path / "gate"))
    first, second = start(graph, tmp_path), start(graph, tmp_path)
    begun(tmp_path, count=5)  # base, and the four that wait
    (tmp_path / "gate").touch()
    for command in (first, second):
        out, err = command.communicate(timeout=120)
        assert command.returncode == 0, err
        outcome = json.loads(out)
        assert outcome["made"] + outcome["reused"] == 9
    made = [line[1] for line in notes(Store(tmp_path / "work")) if line[0] == "made"]
    assert sorted(made) == sorted(graph.of)  # each once


def test_a_busy_node_is_taken_when_its_owner_is_gone(tmp_path):
    graph = Graph()
    graph.add("held", gate=str(tmp_path / "gate"))
    owner = start(graph, tmp_path, workers=1)
    (pid,) = begun(tmp_path)
    heir = start(graph, tmp_path, workers=1)
    time.sleep(1.0)
    assert heir.poll() is None
    assert len(begun(tmp_path)) == 1
    owner.kill()
    owner.communicate(timeout=60)
    assert begun(tmp_path, count=2)[1] != pid
    (tmp_path / "gate").touch()
    out, err = heir.communicate(timeout=60)
    assert heir.returncode == 0, err
    assert json.loads(out)["made"] == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "status", "how"), [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 75, "SIGTERM")])
def test_a_signal_stops_in_one_line_and_loses_no_step(tmp_path, number, status, how, workers):
    graph = gated_plan(tmp_path)
    command = start(graph, tmp_path, workers)
    pids = begun(tmp_path, count=2 + (workers == 2))
    command.send_signal(signal.Signals[number])
    out, err = command.communicate(timeout=60)
    assert command.returncode == status, err
    assert err == f"subjax: stopped by {how}: 1 of 3 nodes are made; the same command goes on from there\n"
    assert out == ""
    wait_for(lambda: all(gone(pid) for pid in pids))
    store = Store(tmp_path / "work")
    if workers or number == "SIGTERM":
        assert len([line for line in notes(store) if line[0] == "saved"]) == max(1, workers)
    (tmp_path / "gate").touch()
    outcome = execute(graph, tmp_path / "work")
    assert len(outcome.made) == 2
    assert not outcome.failed


def test_ctrl_c_does_not_wait_for_a_node_that_does_not_listen(tmp_path):
    graph = Graph()
    graph.add("deaf", gate=str(tmp_path / "gate"), deaf=True)
    command = start(graph, tmp_path, workers=1)
    (pid,) = begun(tmp_path)
    command.send_signal(signal.SIGINT)
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)  # the second one means now
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert err.count("\n") == 1
    wait_for(lambda: gone(pid))


# ----------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Hand:
    """A clock moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(stream, **more) -> tuple[Progress, Hand, Graph]:
    graph, clock = Graph(), Hand()
    graph.add("big", flops=900.0)
    graph.add("small", flops=100.0)
    return Progress(list(graph.nodes.values()), 1, stream=stream, clock=clock, **more), clock, graph


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal():
    stream = io.StringIO()
    progress, clock, graph = shown(stream)
    big, small = graph.nodes.values()
    progress.start(0, small)
    progress.count_out(small.id)
    progress.end(0)
    progress.start(0, big)
    progress.tell(0, 0, 300, "steps")
    clock.now = 5.0
    progress.tick()
    assert stream.getvalue() == ""
    clock.now = 10.0
    progress.tell(0, 100, 300, "steps")
    progress.tick()
    progress.tick()
    line = "1/2 nodes, 40% of the work, 10s, 6 nodes/min, about 15s left; running: toy big 100/300 steps, 10 steps/s"
    assert stream.getvalue() == f"subjax: {line}\n"


def test_progress_draws_bars_on_a_terminal_and_writes_above_them():
    stream = Terminal()
    progress, clock, graph = shown(stream)
    progress.start(0, graph.nodes[graph.of["big"]])
    progress.tell(0, 0, 10, "steps")
    clock.now = 2.0
    progress.tell(0, 5, 10, "steps")
    progress.tick()
    progress.write("a line")
    progress.close()
    text = stream.getvalue()
    assert "45%|" in text
    assert "toy big 5/10 steps, 2.5 steps/s" in text
    assert "a line\n" in text


def test_quiet_shows_errors_only():
    stream = Terminal()
    progress, clock, _ = shown(stream, quiet=True)
    clock.now = 100.0
    progress.tick()
    progress.write("an error")
    progress.close()
    assert stream.getvalue() == "an error\n"
