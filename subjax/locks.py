"""One builder a node: an owned, expiring lock made of nothing but exclusive creates.

A lock is a row of generations, `lock-1.json`, `lock-2.json`, …, of which the highest counts. Whoever wants a lock whose
owner is dead creates the next generation, exclusively. So
- of two takers one wins, because both try to create the same name;
- a taker that is killed leaves the old generation or a whole new one, never something between: there is no between;
- an owner that slept through its own expiry cannot harm the new one: whatever it writes is a lower generation.
The highest generation is not deleted while the node is uncommitted (an emptied file is a free lock), so a taker that
looked long ago always finds, after its create, that a higher one stands, and steps back. Where a store has no exclusive
create two builders may both go on; the commit's look at the lock, and cards that name their own payload, keep the
artifact whole.
"""

import dataclasses
import functools
import json
import logging
import os
import secrets
import socket
import threading
import time
from typing import Protocol

import psutil
from etils import epath

from subjax import files
from subjax.errors import SubjaxError
from subjax.files import StoreError

_log = logging.getLogger(__name__)
_SLICE_S = 1.0  # longest sleep of a heartbeat thread, so that one whose lock is free ends soon


class Clock(Protocol):
    """Where the time comes from; tests give one that they move by hand."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...

    def sleep(self, s: float) -> None:
        """Return after `s` seconds of this clock."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def sleep(self, s: float) -> None:
        """Sleep for `s` seconds."""
        time.sleep(s)


SYSTEM_CLOCK = SystemClock()


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, told apart from every other one that may have had its pid.

    `machine` tells hosts of one name apart, and containers, which count processes on their own (boot and pid namespace;
    the host's name where the system does not say);
    `started` is in seconds since the epoch, for people; `uptime` is the machine's, in seconds, when the process
    started: unlike `started` it does not move when the machine's clock is set.
    """

    host: str
    machine: str
    pid: int
    started: float
    uptime: float


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lock. `started` and `since` are in seconds since the epoch, `heartbeat_age` is in seconds."""

    host: str
    pid: int
    started: float
    token: str
    since: float
    heartbeat_age: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, last heard of {self.heartbeat_age:.0f} s ago"


class Busy(SubjaxError):
    """Another live process is making the node; `owner` says which."""

    def __init__(self, node: str, owner: Owner):
        super().__init__(f"{node} is being made by {owner}: wait for it, or stop that process and run again")
        self.node, self.owner = node, owner

    def __reduce__(self) -> tuple[type["Busy"], tuple[str, Owner]]:
        """Pickle by what it was made of, so that a worker can raise it in its parent."""
        return type(self), (self.node, self.owner)


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a generation's file holds; `heartbeat` and `since` are in seconds since the epoch."""

    token: str
    host: str
    machine: str
    pid: int
    started: float
    uptime: float
    since: float
    heartbeat: float

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def owner(self, now: float) -> Owner:
        age = max(0.0, now - self.heartbeat)
        return Owner(self.host, self.pid, self.started, self.token, self.since, age)


def this_process() -> Process:
    """The process that runs this."""
    uptime, started = _start(os.getpid())
    host = socket.gethostname()
    return Process(host, _machine() or host, os.getpid(), started, uptime)


@functools.cache
def _machine() -> str:
    """What tells this machine, or container, from all others; "" where the system does not say."""
    parts = []
    for path, read in (("/proc/sys/kernel/random/boot_id", _first_line), ("/proc/self/ns/pid", os.readlink)):
        try:
            parts.append(read(path))
        except OSError:  # not Linux: the host's name alone must do
            parts.append("")
    return " ".join(parts).strip()


def _first_line(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip()


def _start(pid: int) -> tuple[float, float]:
    """(machine's uptime when the process started, the same as seconds since the epoch). Raises psutil's errors."""
    boot = psutil.boot_time()
    started = psutil.Process(pid).create_time()
    return round(started - boot, 2), started


def _runs(record: _Record) -> bool:
    """Whether the process of `record`, of this machine, is still there: its pid lives and started when it says."""
    try:
        if psutil.Process(record.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False  # killed, and not yet waited for by its parent
        return abs(_start(record.pid)[0] - record.uptime) < 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _here(record: _Record) -> bool:
    return record.machine == this_process().machine


def _lives(record: _Record, now: float, expiry_s: float) -> bool:
    """Whether a lock is still held.

    On this machine the process itself is asked: a dead one is out at once, and a live one stays in even when its
    heartbeats stopped (a full disk stops them, and not the work). Of another machine only the heartbeats are known.
    """
    return _runs(record) if _here(record) else now - record.heartbeat <= expiry_s


def _path(folder: epath.Path, generation: int) -> epath.Path:
    return folder / f"lock-{generation}.json"


def _generations(folder: epath.Path) -> list[int]:
    """The generations that stand in a node's folder, ascending."""
    try:
        names = [child.name for child in folder.iterdir()]
    except FileNotFoundError:
        return []
    found = (name.removeprefix("lock-").removesuffix(".json") for name in names if name.startswith("lock-"))
    return sorted(int(number) for number in found if number.isdecimal())


def _read(folder: epath.Path, generation: int) -> _Record | None:
    """Who holds a generation; None if it is free: emptied, gone, or unreadable (nobody writes half of one here)."""
    try:
        return _Record(**json.loads(_path(folder, generation).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def owner_of(folder: epath.Path, clock: Clock, expiry_s: float) -> Owner | None:
    """The live owner of the lock in a node's folder, or None."""
    return _look(folder, clock, expiry_s)[1]


def _look(folder: epath.Path, clock: Clock, expiry_s: float) -> tuple[int, Owner | None]:
    """The highest generation (0 if there is none), and its owner if that one lives."""
    held = _generations(folder)
    generation = held[-1] if held else 0
    record = _read(folder, generation) if held else None
    now = clock.now()
    return generation, record.owner(now) if record is not None and _lives(record, now, expiry_s) else None


class Lock:
    """A lock that this process holds, kept alive by a daemon thread until `free`. Made by `acquire`."""

    def __init__(self, folder: epath.Path, generation: int, record: _Record, clock: Clock, heartbeat_s: float):
        self.token = record.token
        self._folder, self._generation, self._record = folder, generation, record
        self._clock, self._heartbeat_s = clock, heartbeat_s
        # Held around every write of the lock's file, so that no late heartbeat revives a lock that was set free.
        self._writing = threading.Lock()
        self._freed = False
        self._complained = False
        threading.Thread(target=self._beat_on, name=f"heartbeat {folder.name}", daemon=True).start()

    def owned(self) -> bool:
        """Whether this lock is still the one that counts."""
        held = _generations(self._folder)
        if not held or held[-1] != self._generation:
            return False
        record = _read(self._folder, self._generation)
        return record is not None and record.token == self.token

    def require(self, node: str) -> None:
        """Raise StoreError, naming who has it now, if the lock was lost."""
        if self.owned():
            return
        held = _generations(self._folder)
        record = _read(self._folder, held[-1]) if held else None
        now_with = f"taken over by {record.owner(self._clock.now())}" if record else "removed"
        raise StoreError(
            f"{node}: the lock of this process was {now_with}, so nothing was committed here; "
            "let the other one end, or run the same command again"
        )

    def beat(self) -> bool:
        """Say that the owner lives; False if the lock is no longer this one's. Raises OSError (a full disk)."""
        with self._writing:
            if self._freed or not self.owned():
                return False
            self._record = dataclasses.replace(self._record, heartbeat=self._clock.now())
            files.write_over(_path(self._folder, self._generation), self._record.text())
            return True

    def _beat_on(self) -> None:
        last = self._record.heartbeat
        while not self._freed:
            self._clock.sleep(min(self._heartbeat_s, _SLICE_S))
            if self._clock.now() - last < self._heartbeat_s:
                continue
            last = self._clock.now()
            try:
                if not self.beat():
                    return
            except Exception as error:  # whatever a file system raises: the work is worth more than its heartbeat
                if not self._complained:
                    _log.warning("heartbeat of %s failed and will be tried again: %s", self._folder, error)
                self._complained = True

    def dead_tokens(self) -> list[str]:
        """Tokens of earlier owners that can never write again: set aside on this machine and no longer running.

        An expired owner on another machine is not among them; it may only have slept.
        """
        tokens = []
        for generation in _generations(self._folder):
            record = _read(self._folder, generation) if generation < self._generation else None
            if record is not None and _here(record) and not _runs(record):
                tokens.append(record.token)
        return tokens

    def sweep(self) -> None:
        """Remove the generations below this one."""
        for generation in _generations(self._folder):
            if generation < self._generation:
                _path(self._folder, generation).unlink(missing_ok=True)

    def free(self, *, committed: bool) -> None:
        """Let the lock go, if it is still owned. On a committed node its files go: the card now keeps others out."""
        with self._writing:
            self._freed = True
            if not self.owned():
                return
            if committed:
                self.sweep()
                _path(self._folder, self._generation).unlink(missing_ok=True)
            else:
                # Not deleted, for a late taker must find it; and not rewritten, for that needs space on the disk.
                files.empty(_path(self._folder, self._generation))


def acquire(folder: epath.Path, node: str, *, clock: Clock, expiry_s: float, heartbeat_s: float) -> Lock:
    """Take the lock in a node's folder (made if need be); `node` names it in errors.

    Raises Busy if another live process, or another builder in this one, holds it; OSError as the system gave it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # One look for both: only the very generation that was seen to be dead or free may be succeeded.
        highest, owner = _look(folder, clock, expiry_s)
        if owner is not None:
            raise Busy(node, owner)
        generation = highest + 1
        now = clock.now()
        record = _Record(secrets.token_hex(6), **dataclasses.asdict(this_process()), since=now, heartbeat=now)
        try:
            won = files.write_new(_path(folder, generation), record.text())
        except FileNotFoundError:  # a mended node: its folder was deleted meanwhile
            continue
        if not won:
            continue  # somebody was faster; the next look says who
        if _generations(folder)[-1:] != [generation]:
            _path(folder, generation).unlink(missing_ok=True)  # a late taker: a higher generation stands
            continue
        if _read(folder, generation) != record:
            continue  # a store without exclusive create: the other one's put came last
        return Lock(folder, generation, record, clock, heartbeat_s)
