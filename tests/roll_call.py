"""One process of a job without JAX: python roll_call.py PORT COUNT INDEX TIMEOUT DO... says what came of it on stdout.

DO, one behind the other: `agree`, `either`, `die` (kill -9), `sleep`, `fail` (this process alone), `wrong` (asks for
something else than the others), `stop` (SIGSTOP), `bug` (process 1 alone meets one in a node), `full` (its disk is full
there), `look` (process 0 cannot read a card). `silent=S`, `itself` (the first connection is to itself) and `slow` (to
raise what the roll call raises) come before the roll call.
"""

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from subjax import workers
from subjax.errors import SubjaxError
from subjax.parallel import processes
from subjax.parallel.cluster import Job
from subjax.stages import attempt

_connect: Any = socket.create_connection


def _itself(where: tuple[str, int], timeout: float) -> socket.socket:
    """What TCP may give where nobody listens yet."""
    socket.create_connection = _connect
    connection = socket.socket()
    connection.bind(("127.0.0.1", 0))
    connection.connect(connection.getsockname())
    return connection


def _slow(joining: Callable[[Job, float], processes.Group]) -> Callable[[Job, float], processes.Group]:
    def join(job: Job, timeout_s: float) -> processes.Group:
        try:
            return joining(job, timeout_s)
        except SubjaxError:
            time.sleep(1.0)
            raise

    return join


def _node(what: str, group: processes.Group) -> None:
    """A node whose making fails in process 1 alone."""

    def make() -> str:
        if group.first:
            return "made"
        if what == "bug":
            raise ValueError("no such row")
        with attempt.files.full_told("/scratch"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        print(attempt.in_step(make), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)


class Unreadable:
    """A store on a file system that gives an error."""

    def card(self, kind: str, id: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _never(*_: Any) -> None:
    raise AssertionError("nothing is made of what cannot be looked at")


def main(port: str, count: str, index: str, timeout: str, *do: str) -> int:
    job = Job(f"127.0.0.1:{port}", int(count), int(index), hosts=tuple(f"host{i}" for i in range(int(count))))
    join = _slow(processes.join) if "slow" in do else processes.join
    for word in do:
        if word.startswith("silent="):
            processes.SILENCE_S, processes.BEAT_S = float(word.removeprefix("silent=")), 0.2
        elif word == "itself":
            socket.create_connection = _itself
    try:
        group = join(job, float(timeout))
    except SubjaxError as error:
        print(f"refused: {error}", flush=True)
        return 1
    print("joined", flush=True)
    for word in do:
        if word == "agree":
            print(json.dumps([group.agree("a", int(index) * 10), group.share("s", f"of {index}")]), flush=True)
        elif word == "either":
            print(json.dumps(group.either(int(index) == 1, False)), flush=True)
        elif word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif word == "sleep":
            time.sleep(60)
        elif word == "fail":
            group.fail("the disk is full", 1)
        elif word == "wrong":
            group.agree("outcome", {"failed": "NaN at step 3"})
        elif word in ("bug", "full"):
            _node(word, group)
        elif word == "look":
            events: list[workers.Event] = []
            record = {"kind": "base", "id": "x", "group": "g", "hints": {}}
            workers.make_nodes([record], Unreadable(), _never, events.append, lambda: False)  # type: ignore[arg-type]
            print(json.dumps([[event.what, event.text] for event in events]), flush=True)
    group.close()
    print("closed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
