"""Progress for a person: bars on a terminal, a plain line now and then elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

LINE_INTERVAL_S = 10.0


class Node(Protocol):
    """What is shown of a node."""

    @property
    def id(self) -> str:
        """Its identity."""

    @property
    def kind(self) -> str:
        """Its kind."""

    @property
    def label(self) -> str:
        """Its name for people."""

    @property
    def flops(self) -> float:
        """Floating point operations to make it; 0 where unknown."""


def duration(seconds: float) -> str:
    """Write a time span for people: 42s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _figures(rate: float) -> str:
    """Write a rate in three figures, or whole where it is larger."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def title(node: Node) -> str:
    """Name a node for people, its kind first."""
    return node.label if node.label.startswith(node.kind) else f"{node.kind} {node.label}"


class Running:
    """A node in the making, as a worker tells of it."""

    def __init__(self, node: Node, now: float):
        self.node = node
        self.begun = now
        self.done, self.total, self.unit = 0, 0, ""
        self.first: tuple[float, int] | None = None  # the rate leaves imports and the first compile out
        self.rate = 0.0

    def tell(self, done: int, total: int, unit: str, now: float) -> None:
        """Take in one progress message."""
        if self.first is None or unit != self.unit or done < self.done:
            self.first = (now, done)
        elif now > self.first[0]:
            self.rate = (done - self.first[1]) / (now - self.first[0])
        self.done, self.total, self.unit = done, total, unit

    @property
    def fraction(self) -> float:
        """The part of the node that is done, as far as it is known."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def text(self) -> str:
        """Say what runs, how far it is and how fast."""
        if not self.total:
            return title(self.node)
        rate = f", {_figures(self.rate)} {self.unit}/s" if self.rate else ""
        return f"{title(self.node)} {self.done}/{self.total} {self.unit}{rate}"


class Progress:
    """How far a run is, its nodes weighted by flops where they are known (else as the least of them)."""

    def __init__(
        self,
        todo: list[Node],
        workers: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.count = len(todo)
        known = [node.flops for node in todo if node.flops > 0]
        least = min(known, default=1.0)
        self.weights = {node.id: node.flops if node.flops > 0 else least for node in todo}
        self.whole = sum(self.weights.values()) or 1.0
        self.ended: set[str] = set()
        self.running: dict[int, Running] = {}
        self.begun = self.spoken = clock()
        self.quiet = quiet
        self.bars: list[Any] = []
        if not quiet and todo and self.stream.isatty():
            self._open_bars(max(1, workers))

    def start(self, worker: int, node: Node) -> None:
        """Begin showing a node on a worker's line."""
        self.running[worker] = Running(node, self.clock())

    def tell(self, worker: int, done: int, total: int, unit: str) -> None:
        """Show how far the worker's node is."""
        if worker in self.running:
            self.running[worker].tell(done, total, unit, self.clock())

    def end(self, worker: int) -> None:
        """Clear a worker's line."""
        self.running.pop(worker, None)

    def count_out(self, identity: str) -> None:
        """Count a node as through: made, found, failed or skipped."""
        if identity in self.weights:
            self.ended.add(identity)

    def fraction(self) -> float:
        """The part of the work that is done, in [0, 1]."""
        done = sum(self.weights[identity] for identity in self.ended)
        done += sum(self.weights.get(run.node.id, 0.0) * run.fraction for run in self.running.values())
        return min(1.0, done / self.whole)

    def summary(self) -> str:
        """Say how far the run is, at what rate, and how long it will yet take."""
        seconds, fraction = self.clock() - self.begun, self.fraction()
        text = f"{len(self.ended)}/{self.count} nodes, {fraction:.0%} of the work, {duration(seconds)}"
        if fraction > 0 and seconds > 0:
            text += f", {_figures(len(self.ended) * 60 / seconds)} nodes/min"
        if fraction > 0.005:  # before that, imports and first compiles are all there is to go by
            text += f", about {duration(seconds * (1 - fraction) / fraction)} left"
        return text

    def tick(self) -> None:
        """Draw, if it is time to; call it a few times a second."""
        if self.quiet or not self.count:
            return
        if self.bars:
            self._draw()
        elif self.clock() - self.spoken >= LINE_INTERVAL_S:
            self.spoken = self.clock()
            now = "; ".join(run.text() for _, run in sorted(self.running.items()))
            self.write(f"subjax: {self.summary()}" + (f"; running: {now}" if now else ""))

    def write(self, text: str) -> None:
        """Print a line (also when quiet: it is for errors), above the bars where there are any."""
        if self.bars:
            self.bars[0].write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal clean, the last state of the first bar standing."""
        if self.bars:
            self.running.clear()
            self._draw()
            for bar in reversed(self.bars):
                bar.close()
            self.bars = []

    def _open_bars(self, workers: int) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # it would start a thread to redraw; tick does
        shape = "{percentage:3.0f}%|{bar:24}| {desc}"
        common: dict[str, Any] = {"file": self.stream, "dynamic_ncols": True, "mininterval": 0}
        self.bars = [tqdm(total=1.0, bar_format=shape, position=0, **common)]
        for line in range(1, workers + 1):
            self.bars.append(tqdm(bar_format="  {desc}", position=line, leave=False, **common))

    def _draw(self) -> None:
        self.bars[0].n = self.fraction()
        self.bars[0].set_description_str(self.summary(), refresh=False)
        for index, bar in enumerate(self.bars[1:]):
            run = self.running.get(index)
            bar.set_description_str(run.text() if run else "", refresh=False)
        for bar in self.bars:
            bar.refresh()
