"""Locks: who may build a node, when a dead owner's is taken over, and what is left when anybody is killed anywhere."""

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
from etils import epath

from subjax import files, locks
from subjax.files import StoreError
from subjax.store import Busy, Card, Store

START = 1_000_000.0
FOREIGN = locks.Process(host="elsewhere", machine="another boot", pid=4242, started=7.0, uptime=7.0)


class HandClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now=START):
        self._now = now
        self._moved = threading.Condition()
        self.sleeping = 0

    def now(self):
        return self._now

    def sleep(self, s):
        with self._moved:
            until = self._now + s
            self.sleeping += 1
            self._moved.wait_for(lambda: self._now >= until)
            self.sleeping -= 1

    def advance(self, s):
        with self._moved:
            self._now += s
            self._moved.notify_all()


def eventually(true):
    """Wait until `true()` holds; what another thread does is waited for, never timed."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "student" / "abc"


def take(folder, clock, *, heartbeat_s=10.0, process=None):
    """Acquire as `process` (this one by default)."""
    with pytest.MonkeyPatch.context() as patch:
        if process is not None:
            patch.setattr(locks, "this_process", lambda: process)
        return locks.acquire(folder, "student/abc", clock=clock, expiry_s=60.0, heartbeat_s=heartbeat_s)


def plant(folder, generation, clock, process, token="planted"):
    """A generation as `process` would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    now = clock.now()
    record = locks._Record(token, **dataclasses.asdict(process), since=now, heartbeat=now)
    (folder / f"lock-{generation}.json").write_text(record.text())


def dead_process():
    """This machine's record of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    uptime, started = locks._start(child.pid)
    child.communicate(b"\n")
    return dataclasses.replace(locks.this_process(), pid=child.pid, uptime=uptime, started=started)


def held_generations(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("lock-"))


# --- one owner at a time


def test_a_second_builder_is_told_who_is_busy(folder, clock):
    lock = take(folder, clock)
    clock.advance(3)
    with pytest.raises(Busy, match=f"student/abc is being made by process {os.getpid()} on .*3 s ago") as caught:
        take(folder, clock)
    owner = caught.value.owner
    assert (owner.pid, owner.token, owner.since, owner.heartbeat_age) == (os.getpid(), lock.token, START, 3.0)
    assert abs(owner.started - psutil.Process().create_time()) < 1
    assert "\n" not in str(caught.value)


def test_busy_survives_pickling(folder, clock):
    take(folder, clock)
    with pytest.raises(Busy) as caught:
        take(folder, clock)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.owner) == (str(caught.value), caught.value.owner)


def test_a_freed_lock_is_free_and_its_number_is_not_used_again(folder, clock):
    first = take(folder, clock)
    first.free(committed=False)
    assert locks.owner_of(folder, clock, 60.0) is None
    assert not first.owned()
    second = take(folder, clock)
    second.sweep()
    assert held_generations(folder) == ["lock-2.json"]
    second.free(committed=True)
    assert held_generations(folder) == []


def test_freeing_needs_no_space_on_the_disk(folder, clock, monkeypatch):
    lock = take(folder, clock)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", full, raising=False)
    lock.free(committed=False)
    assert locks.owner_of(folder, clock, 60.0) is None


def test_freeing_a_lost_lock_leaves_the_new_owner_alone(folder, clock):
    lost = take(folder, clock, process=FOREIGN, heartbeat_s=1e9)
    clock.advance(61)
    new = take(folder, clock)
    lost.free(committed=False)
    assert new.owned()
    lost.free(committed=True)
    assert new.owned()


# --- takeover


def test_a_dead_pid_of_this_machine_is_taken_over_at_once(folder, clock):
    plant(folder, 1, clock, dead_process())
    assert locks.owner_of(folder, clock, 60.0) is None
    assert take(folder, clock).owned()


def test_a_pid_that_started_at_another_time_is_another_process(folder, clock):
    me = locks.this_process()
    plant(folder, 1, clock, dataclasses.replace(me, uptime=me.uptime - 100))
    assert take(folder, clock).owned()


def test_a_killed_child_that_nobody_waited_for_is_dead(folder, clock):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        uptime, started = locks._start(child.pid)
        process = dataclasses.replace(locks.this_process(), pid=child.pid, uptime=uptime, started=started)
        plant(folder, 1, clock, process)
        with pytest.raises(Busy):
            take(folder, clock)
        child.kill()
        eventually(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert take(folder, clock).owned()
    finally:
        child.kill()
        child.communicate()


def test_a_live_process_of_this_machine_keeps_its_lock_without_heartbeats(folder, clock):
    lock = take(folder, clock, heartbeat_s=1e9)
    clock.advance(1e6)
    with pytest.raises(Busy):
        take(folder, clock)
    assert lock.owned()


def test_another_machine_is_taken_over_only_after_its_expiry(folder, clock):
    lost = take(folder, clock, process=FOREIGN, heartbeat_s=1e9)
    clock.advance(60)
    with pytest.raises(Busy, match="4242 on elsewhere"):
        take(folder, clock)
    clock.advance(0.5)
    lock = take(folder, clock)
    assert lock.owned()
    assert not lost.owned()
    with pytest.raises(StoreError, match=f"student/abc: the lock of this process was taken over by .* {os.getpid()} "):
        lost.require("student/abc")


def test_a_pid_of_another_machine_is_not_looked_up_here(folder, clock):
    plant(folder, 1, clock, dataclasses.replace(dead_process(), machine="another boot"))
    with pytest.raises(Busy):
        take(folder, clock)


def test_a_removed_lock_is_lost(folder, clock):
    lock = take(folder, clock)
    (folder / "lock-1.json").unlink()
    with pytest.raises(StoreError, match="removed"):
        lock.require("student/abc")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "null"])
def test_an_unreadable_lock_is_free(folder, clock, text):
    folder.mkdir(parents=True)
    (folder / "lock-3.json").write_text(text)
    assert locks.owner_of(folder, clock, 60.0) is None
    assert take(folder, clock).owned()
    assert held_generations(folder)[-1] == "lock-4.json"


def test_dead_tokens_are_those_that_cannot_write_again(folder, clock):
    plant(folder, 1, clock, FOREIGN, token="asleep")
    plant(folder, 2, clock, dead_process(), token="dead")
    lock = take(folder, clock)
    assert lock.dead_tokens() == ["dead"]
    lock.sweep()
    assert held_generations(folder) == ["lock-3.json"]


# --- takers that meet: every order of two takers' steps that matters


def interrupt_once(monkeypatch, meanwhile):
    """Run `meanwhile` between a taker's look and its create."""
    real, pending = files.write_new, [meanwhile]

    def write_new(path, text):
        if pending:
            pending.pop()()
        return real(path, text)

    monkeypatch.setattr(files, "write_new", write_new)


def test_the_slower_taker_is_busy(folder, clock, monkeypatch):
    plant(folder, 1, clock, dead_process())
    winners = []
    interrupt_once(monkeypatch, lambda: winners.append(take(folder, clock)))
    with pytest.raises(Busy):
        take(folder, clock)
    assert winners[0].owned()


def test_the_slower_taker_is_busy_although_the_faster_one_swept(folder, clock, monkeypatch):
    plant(folder, 1, clock, dead_process())
    winners = []

    def faster():
        winners.append(take(folder, clock))
        winners[0].sweep()

    interrupt_once(monkeypatch, faster)
    with pytest.raises(Busy):
        take(folder, clock)
    assert winners[0].owned()


def test_a_taker_that_looked_long_ago_steps_back(folder, clock, monkeypatch):
    """The name that it creates was used and swept meanwhile, so its create succeeds: a higher one stands."""
    plant(folder, 1, clock, dead_process())
    winners = []

    def two_later():
        plant(folder, 2, clock, dead_process())
        winners.append(take(folder, clock))
        winners[0].sweep()
        assert held_generations(folder) == ["lock-3.json"]

    interrupt_once(monkeypatch, two_later)
    with pytest.raises(Busy):
        take(folder, clock)
    assert winners[0].owned()
    assert held_generations(folder) == ["lock-3.json"]


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "takeover"])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_faster_taker_at_any_step_of_the_slower_one(folder, clock, monkeypatch, stale, step):
    """One takes the lock in full just before any of the other's calls of the file system: one of them is refused."""
    if stale:
        plant(folder, 1, clock, dead_process())
    calls, faster = [], []

    def counted(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) == step:
                try:
                    faster.append(take(folder, clock))
                except Busy:
                    faster.append(None)
            return real(*args, **kwargs)

        return call

    for name in ("_generations", "_read", "_runs", "this_process"):
        monkeypatch.setattr(locks, name, counted(getattr(locks, name)))
    monkeypatch.setattr(files, "write_new", counted(files.write_new))
    try:
        slower = take(folder, clock)
    except Busy:
        slower = None
    monkeypatch.undo()
    winners = [lock for lock in (slower, *faster) if lock is not None]
    assert len(winners) == 1
    assert winners[0].owned()


def test_a_taker_goes_on_when_the_faster_one_freed_the_lock(folder, clock, monkeypatch):
    plant(folder, 1, clock, dead_process())
    interrupt_once(monkeypatch, lambda: take(folder, clock).free(committed=False))
    lock = take(folder, clock)
    assert lock.owned()
    assert held_generations(folder)[-1] == "lock-3.json"


def test_a_taker_goes_on_when_the_node_folder_was_deleted(folder, clock, monkeypatch):
    interrupt_once(monkeypatch, folder.rmtree)
    assert take(folder, clock).owned()


def test_without_links_a_put_that_was_overwritten_is_no_lock(folder, clock, monkeypatch):
    monkeypatch.setattr(files, "is_local", lambda path: False)
    assert take(folder / "alone", clock).owned()
    real, pending = files.write_new, [True]

    def write_new(path, text):
        won = real(path, text)
        if pending:
            pending.pop()
            plant(folder, 1, clock, locks.this_process(), token="later")
        return won

    monkeypatch.setattr(files, "write_new", write_new)
    with pytest.raises(Busy) as caught:
        take(folder, clock)
    assert caught.value.owner.token == "later"


# --- heartbeats


def heartbeat(folder, generation=1):
    return json.loads((folder / f"lock-{generation}.json").read_text())["heartbeat"]


def test_heartbeats_follow_the_clock(folder, clock):
    lock = take(folder, clock)
    for beat in range(1, 4):
        eventually(lambda: clock.sleeping == 1)
        clock.advance(10)
        eventually(lambda beat=beat: heartbeat(folder) == START + 10 * beat)
    owner = locks.owner_of(folder, clock, 60.0)
    assert owner is not None
    assert owner.heartbeat_age == 0
    lock.free(committed=False)


def test_heartbeats_keep_a_lock_from_other_machines(folder, clock):
    lock = take(folder, clock, process=FOREIGN)
    for _ in range(10):
        eventually(lambda: clock.sleeping == 1)
        clock.advance(10)
        eventually(lambda: heartbeat(folder) == clock.now())
    with pytest.raises(Busy):
        take(folder, clock)
    assert lock.owned()


def test_a_failing_heartbeat_is_told_once_and_tried_again(folder, clock, monkeypatch, caplog):
    lock = take(folder, clock)
    real, failed = files.write_over, []

    def full(path, text):
        failed.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_over", full)
    for count in (1, 2):
        eventually(lambda: clock.sleeping == 1)
        clock.advance(10)
        eventually(lambda count=count: len(failed) == count)
    eventually(lambda: clock.sleeping == 1)
    assert lock.owned()
    assert len([record for record in caplog.records if "heartbeat" in record.message]) == 1
    monkeypatch.setattr(files, "write_over", real)
    clock.advance(10)
    eventually(lambda: heartbeat(folder) == START + 30)
    assert [path.name for path in folder.iterdir()] == ["lock-1.json"]


def test_heartbeats_end_with_the_lock(folder, clock):
    lock = take(folder, clock)
    eventually(lambda: clock.sleeping == 1)
    lock.free(committed=False)
    assert lock.beat() is False
    clock.advance(10)
    eventually(lambda: clock.sleeping == 0)
    assert (folder / "lock-1.json").read_text() == ""


def test_a_late_heartbeat_does_not_bring_a_lost_lock_back(folder, clock):
    lost = take(folder, clock, process=FOREIGN, heartbeat_s=1e9)
    clock.advance(61)
    new = take(folder, clock)
    new.sweep()
    assert lost.beat() is False
    assert held_generations(folder) == ["lock-2.json"]
    assert new.owned()


# --- real processes


def _race(folder, rounds, barrier, results):
    """In each round everybody tries at once, and who wins holds on until all have tried."""
    for turn in range(rounds):
        place = epath.Path(folder) / str(turn)
        barrier.wait(60)
        try:
            lock = locks.acquire(place, "n", clock=locks.SYSTEM_CLOCK, expiry_s=60.0, heartbeat_s=10.0)
        except Busy:
            lock = None
        results.put((turn, lock is not None and lock.owned()))
        barrier.wait(60)
        if lock is not None:
            results.put((turn, "still" if lock.owned() else "lost"))


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "takeover"])
def test_of_racing_processes_one_wins(tmp_path, clock, stale):
    rounds, racers = 15, 2 + stale
    if stale:
        dead = dead_process()
        for turn in range(rounds):
            plant(epath.Path(tmp_path) / str(turn), 1, clock, dead)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(racers), context.Queue()
    workers = [context.Process(target=_race, args=(str(tmp_path), rounds, barrier, results)) for _ in range(racers)]
    for worker in workers:
        worker.start()
    told = [results.get(timeout=60) for _ in range(rounds * (racers + 1))]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for turn in range(rounds):
        outcomes = [what for number, what in told if number == turn]
        assert sorted(map(str, outcomes)) == sorted(["True", "still"] + ["False"] * (racers - 1)), f"round {turn}"


KILLER = """
    import json, os, signal, sys
    from subjax.store import Card, Store

    CALLS = ("link", "unlink", "remove", "rmdir", "replace", "truncate", "fsync", "mkdir")

    def deadly(real, name, step, when):
        # A system call that dies by kill -9 at the step-th of them, or at the link of the card: before it, or after.
        def call(*args, **kwargs):
            global steps
            steps += 1
            hit = steps == step or (step == "card" and name == "link" and str(args[1]).endswith("card.json"))
            if hit and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if hit:
                    os.kill(os.getpid(), signal.SIGKILL)
        return call

    def live(workdir, step, when):
        global steps
        steps = 0
        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name), name, step, when))
        with Store(workdir).build("student", "abc") as build:
            if build.committed is None:
                (build.folder / "rows").write_text("equal")
                (build.partial / "step").write_text("1")
                build.commit(Card(1, "student", "abc", 1, {}, {}, {}, {}, {}, 0.0, 0, {}, {}, "d", "", "", {}))
        os._exit(0)

    for workdir, lives in json.load(sys.stdin):
        deaths = []
        for step, when in lives:
            pid = os.fork()
            if pid == 0:
                live(workdir, step, when)
            deaths.append(os.WTERMSIG(os.waitpid(pid, 0)[1]))
        print(json.dumps(deaths))
"""


def lives(scenarios):
    """Run builders one after the other, each of which dies at its step; which of them did die, for each workdir."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER)],
        input=json.dumps([(str(workdir), steps) for workdir, steps in scenarios]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [[death == signal.SIGKILL for death in json.loads(line)] for line in done.stdout.splitlines()]


def go_on(workdir):
    """What the same command does next: it finds the card, or it makes the node; either way nothing is left over."""
    store, node = Store(workdir), workdir / "student" / "abc"
    assert store.owner("student", "abc") is None
    outcome = "found" if store.card("student", "abc") else "made"
    if outcome == "made":
        with store.build("student", "abc") as build:
            payloads = [path.name for path in node.iterdir() if path.name.startswith("payload-")]
            assert payloads == [build.folder.name], "the dead one's payload is cleaned by the next owner"
            assert len(held_generations(epath.Path(node))) == 1, "and so is its lock"
            (build.folder / "rows").write_text("equal")
            build.commit(Card(1, "student", "abc", 1, {}, {}, {}, {}, {}, 0.0, 0, {}, {}, "d", "", "", {}))
        assert len(list(node.iterdir())) == 2, "only the card and its payload stay"
    assert not store.verify("student", "abc", rederive=lambda card: "abc", digest=lambda card, payload: "d")
    assert (store.payload("student", "abc") / "rows").read_text() == "equal"
    return outcome


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_builder_killed_at_any_step_leaves_a_node_that_the_next_one_makes(tmp_path, when):
    """Kill -9 at each system call that changes the workdir, through takeover, payload, card and tidying.

    The killed one itself takes over from one that was killed between payload and card, so those steps are all there.
    """
    scenarios = [(tmp_path / str(step), [("card", "before"), (step, when)]) for step in range(1, 60)]
    outcomes, deaths = [], []
    for (workdir, _), (first, second) in zip(scenarios, lives(scenarios), strict=True):
        assert first
        deaths.append(second)
        outcomes.append(go_on(workdir))
    steps = sum(deaths)
    assert 15 < steps < 59, "every step was hit, and the last builders outlived the list"
    assert deaths == [True] * steps + [False] * (59 - steps)
    assert outcomes == sorted(outcomes, reverse=True), "once the card stands it stays"
    assert {"made", "found"} == set(outcomes[:steps]), "kills fell on both sides of the card"


def test_builders_killed_three_times_in_a_row(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    rng = random.Random(seed)
    scenarios = [
        (tmp_path / str(turn), [(rng.randint(1, 20), rng.choice(["before", "after"])) for _ in range(3)])
        for turn in range(40)
    ]
    assert len(lives(scenarios)) == len(scenarios)
    for workdir, _ in scenarios:
        go_on(workdir)
