"""A job of several processes on this machine: the same command in each, as a launcher would start it."""

import dataclasses
import socket
import subprocess
from concurrent import futures
from pathlib import Path

import pytest
from tiny_study import Done, end, start


def free_port() -> int:
    """A port such that it and the next are free, for JAX's service and for the roll call."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@dataclasses.dataclass
class Job:
    """Processes that were started, in their order."""

    processes: list[subprocess.Popen]

    def ended(self, seconds: float = 300.0) -> list[Done]:
        """How each of them ended; where one does not end in time, what all that did not end were at."""
        with futures.ThreadPoolExecutor(len(self.processes)) as pool:
            found = [pool.submit(end, process, seconds) for process in self.processes]
        late = [f"process {i}: {one.exception()}" for i, one in enumerate(found) if one.exception() is not None]
        if late:
            others = [f"process {i}: {one.result()}" for i, one in enumerate(found) if one.exception() is None]
            pytest.fail("\n".join([*late, *others]))
        return [one.result() for one in found]


def job(shared: Path, *words: object, count: int = 2, only: tuple[int, ...] = (), **more: dict[int, str]) -> Job:
    """Begin `subjax WORDS` in each of `count` processes, or in some of them; `more` are variables by process."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    started = []
    for index in only or range(count):
        variables = {name: values[index] for name, values in more.items() if index in values}
        flags = (address, f"--processes={count}", f"--process={index}")
        started.append(start(shared, *words, *flags, **variables))
    return Job(started)
