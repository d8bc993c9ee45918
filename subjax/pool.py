"""Workers side by side: they are given the nodes of a run, and the dead among them are replaced (contract 12)."""

import os
import signal
import time
from multiprocessing.connection import wait
from typing import Any

from subjax.errors import SubjaxError
from subjax.run_state import RunState
from subjax.signals import handled
from subjax.workers import Orders, Worker

TICK_S = 0.2
PATIENCE_S = {signal.SIGINT: 10.0, signal.SIGTERM: 25.0}  # a cluster kills about 30 s after its SIGTERM


class Pool:
    """The workers of a run: hands out batches, takes in events, replaces the dead."""

    def __init__(self, run: RunState, workers: int, cores: int, execute: str):
        self.run, self.cores, self.execute = run, cores, execute
        self.stillborn = 0
        self.hurry = False
        self.workers: dict[int, Worker] = {}
        self.size = min(workers, len(run.schedule.open))

    def go(self) -> None:
        """Run until all is made, failed or skipped, or a signal says stop."""
        with handled({signal.SIGINT: self.on_signal, signal.SIGTERM: self.on_signal}):
            try:
                for index in range(self.size):
                    self.hire(index)
                while self.run.schedule.open and not self.run.ending:
                    self.run.poll_foreign()
                    self.hand_out()
                    self.take_in()
                if self.run.ending:
                    self.wind_down()
                for worker in self.workers.values():
                    worker.end()
            finally:
                for worker in self.workers.values():
                    worker.kill()

    def hire(self, index: int) -> None:
        """Start the worker with this index, in place of a dead one if there was one."""
        self.workers[index] = Worker(Orders(index, self.cores, str(self.run.store.root), self.execute, os.getpid()))

    def on_signal(self, number: int, _frame: Any) -> None:
        """Note the signal; the loop sees it within a tick. A second Ctrl-C means at once."""
        self.hurry = number == signal.SIGINT and self.run.stop_signal is not None
        self.run.stop_signal = self.run.stop_signal or signal.Signals(number)

    def wind_down(self) -> None:
        """Let the workers save what they are at, for a while; what is not begun they give back."""
        for worker in self.workers.values():
            worker.stop()
        deadline = time.monotonic() + PATIENCE_S[self.run.stop_signal or signal.SIGINT]
        while any(worker.batch for worker in self.workers.values()):
            if self.hurry or time.monotonic() > deadline:
                for worker in self.workers.values():
                    worker.kill()
                return
            self.take_in()

    def hand_out(self) -> None:
        """Give every idle worker a batch."""
        for worker in self.workers.values():
            if worker.ready and not worker.batch:
                others = {pair for other in self.workers.values() if other is not worker for pair in other.compiled}
                batch = self.run.schedule.take(worker.compiled, others, len(self.workers))
                if batch:
                    worker.hand([self.run.record(id) for id in batch])

    def take_in(self) -> None:
        """Wait a tick for events, and act on them."""
        wait([worker.pipe for worker in self.workers.values()], timeout=TICK_S)
        for worker in list(self.workers.values()):
            said, alive = worker.events()
            for event in said:
                if event.what == "broken":
                    self.run.progress.write(event.trace.rstrip())
                    raise SubjaxError(f"a worker could not start: {event.text}")
                worker.heard(event)
                self.run.on(worker.index, event)
            if not alive:
                self.bury(worker)
        self.run.progress.tick()

    def bury(self, worker: Worker) -> None:
        """Give back what a dead worker had, and put a fresh one in its place."""
        worker.kill()
        del self.workers[worker.index]
        self.run.progress.end(worker.index)
        running = [id for id in worker.batch if id in worker.running]
        if running:
            self.run.lost(running, worker.death())
        for id in worker.batch:
            if id not in worker.running:
                self.run.schedule.again(id)
        if not worker.ready:
            self.stillborn += 1
            if self.stillborn >= 3:
                raise SubjaxError(f"workers do not start: {worker.death()}; --workers=0 may show why")
        if not self.run.ending:
            self.hire(worker.index)
