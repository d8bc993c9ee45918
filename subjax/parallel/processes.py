"""Several processes as one job: the roll call at its start, what they agree on, and its end when one is lost.

JAX joins the processes' devices. What they say to each other besides goes over one TCP connection from each to process
0, in lines of JSON: who is there, decisions that must be the same everywhere (is this node to be made? stop here?), and
signs of life. So whoever is missing at the start has a name; a process that is killed closes its connection and ends
the job at once, with one line; and no decision waits for a device.
"""

import abc
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from subjax import __version__
from subjax.errors import SubjaxError
from subjax.parallel.cluster import Job

BEAT_S = 2.0  # between signs of life
SILENCE_S = 30.0  # without one a process counts as lost
PATIENCE_S = 30.0  # how long one that failed waits for the others, who may be failing in the same way
RETRY_S = 0.25
_AGAIN = "run the same command again: it goes on from what was saved"
_END_S = 3.0  # how long the others have to end before process 0 does


class Group:
    """The processes of this job; this class itself is a job of one."""

    index, count = 0, 1
    job: Job | None = None

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone looks at the store, decides, and speaks."""
        return self.index == 0

    def agree(self, what: str, value: Any) -> list[Any]:
        """Give every process's `value` (JSON) to every process, in their order. All must ask for the same `what`."""
        return [value]

    def share(self, what: str, value: Any = None) -> Any:
        """Give process 0's `value` to every process."""
        return self.agree(what, value if self.first else None)[0]

    def either(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is true in any process."""
        return tuple(map(any, zip(*self.agree("flags", list(flags)), strict=True)))

    def barrier(self, what: str) -> None:
        """Return when every process has come here."""
        self.agree(what, None)

    def fail(self, text: str, status: int, patience_s: float = 0.0) -> None:
        """End the whole job, with `text` on one line of process 0's stderr. In a job of one it does nothing."""

    def close(self) -> None:
        """Leave in peace, when the work is done."""


class _Line:
    """One end of a connection: JSON values, a line each."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._file = connection, connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; one that goes to a dead process is dropped, for reading tells of the death."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(data)

    def messages(self, silence_s: float) -> Iterator[dict[str, Any]]:
        """What the other end says, until it is gone; TimeoutError if it is silent for too long."""
        self._socket.settimeout(silence_s)
        with contextlib.suppress(ConnectionError, ValueError):
            while line := self._file.readline():
                yield json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class _Joined(Group, abc.ABC):
    """What process 0 and the others have in common."""

    job: Job

    def __init__(self, job: Job):
        self.index, self.count, self.job = job.process, job.processes, job
        self._round = 0
        self._answers: dict[int, list[Any]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._ending = threading.Lock()

    def agree(self, what: str, value: Any) -> list[Any]:
        """See `Group.agree`."""
        self._round += 1
        self._say(self._round, what, value)
        with self._changed:
            self._changed.wait_for(lambda: self._round in self._answers)
            return self._answers.pop(self._round)

    @abc.abstractmethod
    def _say(self, number: int, what: str, value: Any) -> None:
        """Tell process 0 this process's `value` of a round."""

    def _beat(self, send: Callable[[], None]) -> None:
        def on() -> None:
            while not self._closing:
                time.sleep(BEAT_S)
                send()

        threading.Thread(target=on, daemon=True, name="signs of life").start()

    def _exit(self, status: int, text: str = "") -> NoReturn:
        """End this process where it stands: its main thread may be waiting for one that is gone."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if text:
            with contextlib.suppress(OSError, ValueError):
                print(f"subjax: {text}", file=sys.stderr, flush=True)
        os._exit(status)


class _Hub(_Joined):
    """Process 0: holds the others' connections."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.lines: dict[int, _Line] = {}
        self.who: dict[int, str] = {0: _me()}
        self._rounds: dict[int, dict[int, tuple[str, Any]]] = {}
        self._refused = ""
        self._left: set[int] = set()
        self._callers: list[tuple[_Line, threading.Thread]] = []

    def call(self, timeout_s: float) -> None:
        """Wait for all others; SubjaxError says who did not come in time."""
        deadline = time.monotonic() + timeout_s
        family = socket.AF_INET6 if ":" in self.job.host else socket.AF_INET
        try:
            server = socket.create_server(("", self.job.roll_call_port), family=family, backlog=self.count)
        except OSError as error:
            raise SubjaxError(
                f"process 0 cannot listen on port {self.job.roll_call_port}, next to the coordinator's"
                f" ({error.strerror}); give another port in --coordinator, or end what has it"
            ) from error
        with server:
            server.settimeout(RETRY_S)
            while len(self.who) < self.count and not self._refused and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    line = _Line(server.accept()[0])
                    thread = threading.Thread(target=self._read, args=(line,), daemon=True, name="roll call")
                    self._callers.append((line, thread))
                    thread.start()
        with self._changed:
            missing = [i for i in range(self.count) if i not in self.who]
        if self._refused or missing:
            text = self._refused or self._absent(missing, timeout_s)
            self._ending.acquire()  # as in `_end`: that the others then go is no reason to be told
            for line, _ in self._callers:  # also those that were refused
                line.send(end=1)
            raise SubjaxError(text)
        for line in self.lines.values():
            line.send(welcome=True)
        self._beat(self._greet)

    def _greet(self) -> None:
        for line in self.lines.values():
            line.send(beat=1)

    def _absent(self, missing: list[int], timeout_s: float) -> str:
        names = [f"{i} ({self.job.hosts[i]})" if self.job.hosts else str(i) for i in missing[:8]]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        there = ", ".join(f"{i} ({who})" for i, who in sorted(self.who.items())[:8])
        return (
            f"process{'es' if len(missing) > 1 else ''} {', '.join(names)}{more} of {self.count} did not come within"
            f" {timeout_s:g} s; there: {there}; look at why they did not start, or raise --init-timeout"
        )

    def _read(self, line: _Line) -> None:
        """Hear one other process out; the target of a thread."""
        index = -1
        try:
            for message in line.messages(SILENCE_S):
                if index < 0:
                    index = self._admit(line, message)
                    if index < 0:
                        return
                elif "value" in message:
                    self._take(index, message["round"], message["what"], message["value"])
                elif "failed" in message:
                    self._end(f"{self._named(index)}: {message['failed']}", message["status"])
                elif "bye" in message:
                    self._left.add(index)
            why = "is gone: killed, out of memory, or its machine is down"
        except TimeoutError:
            why = f"has not been heard of for {SILENCE_S:g} s"
        if self._ending.locked():  # it was told to end
            return
        if index >= 0 and index not in self._left and not self._closing:
            self._end(f"{self._named(index)} {why}; {_AGAIN}", 1)

    def _admit(self, line: _Line, hello: dict[str, Any]) -> int:
        """Let a process in that says who it is; -1 if it is none of this job's."""
        index, who = hello.get("process", -1), str(hello.get("who"))
        if not isinstance(index, int) or not 0 < index < self.count:
            return -1
        with self._changed:
            if hello.get("processes") != self.count:
                self._refused = f"process {index} ({who}) was told of {hello.get('processes')} processes, this one of "
                self._refused += f"{self.count}; give all the same --processes"
            elif index in self.who:
                self._refused = f"two processes say that they are number {index} ({self.who[index]}, {who}); give each "
                self._refused += "its own --process"
            elif hello.get("version") != __version__:
                self._refused = f"process {index} ({who}) runs subjax {hello.get('version')}, this one {__version__}"
                self._refused += "; install one version everywhere"
            else:
                self.who[index] = who
            self.lines.setdefault(index, line)
        return index

    def _named(self, index: int) -> str:
        return f"process {index} ({self.who[index]})"

    def _say(self, number: int, what: str, value: Any) -> None:
        self._take(0, number, what, value)

    def _take(self, index: int, number: int, what: str, value: Any) -> None:
        """Take in a process's value of a round; when all are there, everyone gets them."""
        with self._changed:
            given = self._rounds.setdefault(number, {})
            given[index] = (what, value)
            asked = {asked for asked, _ in given.values()}
            whole = len(given) == self.count
            values = [given[i][1] for i in sorted(given)]
            if whole:
                del self._rounds[number]
        if len(asked) > 1:  # one failed while the others went on; a failure says so in its value
            failures = [(i, v) for i, (_, v) in sorted(given.items()) if isinstance(v, dict) and v.get("failed")]
            for i, failure in failures:
                print(failure.get("trace", ""), end="", file=sys.stderr, flush=True)
                self._end(f"{self._named(i)}: {failure['failed']}", 1)
            self._end(f"the processes are out of step ({', '.join(sorted(asked))}); this is a bug", 1)
        if whole:
            for line in list(self.lines.values()):
                line.send(round=number, values=values)
            with self._changed:
                self._answers[number] = values
                self._changed.notify_all()

    def fail(self, text: str, status: int, patience_s: float = 0.0) -> None:
        """See `Group.fail`."""
        time.sleep(patience_s)
        self._end(text, status)

    def _end(self, text: str, status: int) -> NoReturn:
        """End all processes. The first reason is the one that is told."""
        self._ending.acquire()  # never given back: a second reason waits here until the process has ended
        for line in self.lines.values():
            line.send(end=status)
        deadline = time.monotonic() + _END_S
        with contextlib.suppress(OSError, ValueError):
            print(f"subjax: {text}", file=sys.stderr, flush=True)
        for _, thread in self._callers:  # JAX's service ends with this process, so the others go first
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._exit(status)

    def close(self) -> None:
        """See `Group.close`."""
        self.barrier("end")
        self._closing = True
        for line in self.lines.values():
            line.send(bye=True)


class _Spoke(_Joined):
    """Any other process."""

    def __init__(self, job: Job):
        super().__init__(job)
        self._line: _Line
        self._welcome = False

    def call(self, timeout_s: float) -> None:
        """Say to process 0 that this one is there, and wait for its word that all are."""
        deadline = time.monotonic() + timeout_s
        where = (self.job.host, self.job.roll_call_port)
        while True:
            try:
                connection = socket.create_connection(where, timeout=max(RETRY_S, min(5.0, timeout_s)))
                # TCP connects a socket to itself where nobody listens and its own port happens to be the one asked for.
                if connection.getsockname() != connection.getpeername():
                    break
                connection.close()
                raise ConnectionRefusedError("nobody listens there")
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise SubjaxError(
                        f"process {self.index} of {self.count}: process 0 did not answer at {where[0]}, port"
                        f" {where[1]}, within {timeout_s:g} s ({error.strerror or error}); see why it did not"
                        " start, whether that name and port can be reached from here, or raise --init-timeout"
                    ) from error
                time.sleep(RETRY_S)
        self._line = _Line(connection)
        hello = {"process": self.index, "processes": self.count, "who": _me(), "version": __version__}
        self._line.send(**hello)
        self._beat(lambda: self._line.send(beat=1))
        threading.Thread(target=self._read, daemon=True, name="process 0").start()
        with self._changed:
            # Process 0 may have begun to wait later than this one did.
            if not self._changed.wait_for(lambda: self._welcome, timeout_s + _END_S):
                raise SubjaxError(f"process 0 ({where[0]}) took this one's name and then said nothing; see its message")

    def _read(self) -> None:
        try:
            for message in self._line.messages(1e6):  # until all are there, process 0 says nothing
                if "values" in message:
                    with self._changed:
                        self._answers[message["round"]] = message["values"]
                        self._changed.notify_all()
                elif "welcome" in message:
                    with self._changed:
                        self._welcome = True
                        self._changed.notify_all()
                    self._line._socket.settimeout(SILENCE_S)
                elif "end" in message:
                    self._exit(message["end"])
                elif "bye" in message:
                    self._closing = True
            why = "is gone: killed, out of memory, or its machine is down"
        except TimeoutError:
            why = f"has not been heard of for {SILENCE_S:g} s"
        if not self._closing:
            self._ending.acquire()
            self._exit(1, f"process 0 ({self.job.host}) {why}; {_AGAIN}")

    def _say(self, number: int, what: str, value: Any) -> None:
        self._line.send(round=number, what=what, value=value)

    def fail(self, text: str, status: int, patience_s: float = 0.0) -> None:
        """See `Group.fail`."""
        time.sleep(patience_s)
        self._line.send(failed=text, status=status)
        time.sleep(2 * _END_S)  # process 0 says the line and ends all
        self._exit(status, text)

    def close(self) -> None:
        """See `Group.close`."""
        self.barrier("end")
        self._closing = True
        self._line.send(bye=True)


def _me() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


_group: Group = Group()


def group() -> Group:
    """The processes of this job: this one alone, until `join`."""
    return _group


def join(job: Job, timeout_s: float) -> Group:
    """Wait until all processes of `job` are there, for up to `timeout_s` seconds.

    Raises:
        SubjaxError: some did not come (they are named), or do not belong together.
    """
    global _group
    joined = _Hub(job) if job.process == 0 else _Spoke(job)
    joined.call(timeout_s)
    _group = joined
    return joined
