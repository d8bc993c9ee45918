"""Comparisons: sides in processes of their own, started together, working in turn, round by round.

Only one side works at a time and all live through the whole run, so a machine that is slower for a while is slower for
all. A round's load average, and the CPU time that the waiting sides took in it, are kept: a disturbed round shows. What
is judged is the ratio of medians over rounds, with a bootstrap interval.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from benchmarks import machine
from subjax.cpu import visible_cores
from subjax.errors import SubjaxError, UsageError

RESULTS = pathlib.Path(__file__).parent / "results"
QUICK = pathlib.Path("out") / "benchmarks"
ROUNDS, SECONDS = 5, 60.0  # of a real run; each round is at least so long
QUICK_ROUNDS, QUICK_SECONDS = 2, 3.0
RESAMPLES = 10_000
SIZES = ("135M", "0.5B", "1.5B", "8B")


@dataclasses.dataclass(frozen=True)
class Side:
    """One side: its name in the result, the function that makes it ready, and what that is given (plain data).

    `copies` processes of it work side by side, each on its share of the cores; their units add up.
    """

    name: str
    target: str
    setup: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    quick: bool
    rounds: int
    seconds: float
    device: str
    size: str
    out: pathlib.Path
    part: str | None = None  # of a comparison in parts: the one to run; None asks for all, one after another


def options(name: str, doc: str, argv: Sequence[str] | None = None, parts: Sequence[str] = ()) -> Options:
    """Read a comparison's command line; `doc`'s first line says what it compares, `parts` what it may be asked for.

    Raises:
        UsageError: no round, or rounds of no length.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rounds, to see that it works; no figure counts")
    parser.add_argument("--rounds", type=int, help=f"rounds a side ({ROUNDS}; quick: {QUICK_ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"least length of a round ({SECONDS}; quick: {QUICK_SECONDS})")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where both sides run; a GPU where there is one")
    parser.add_argument("--size", choices=("tiny", *SIZES), help="the model's shape (135M; quick: tiny)")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the result; quick ones go to out/benchmarks")
    if parts:
        parser.add_argument("--part", choices=parts, help="this part alone; all of them, one after another")
    asked = parser.parse_args(argv)
    device = asked.device or ("gpu" if machine.gpu() else "cpu")
    found = Options(
        asked.quick,
        asked.rounds if asked.rounds is not None else QUICK_ROUNDS if asked.quick else ROUNDS,
        asked.seconds if asked.seconds is not None else QUICK_SECONDS if asked.quick else SECONDS,
        device,
        asked.size or ("tiny" if asked.quick else SIZES[0]),
        asked.out or (QUICK if asked.quick else RESULTS),
        asked.part if parts else None,
    )
    if found.rounds < 1 or found.seconds <= 0:
        raise UsageError(f"--rounds={found.rounds} --seconds={found.seconds}: give at least one round of some length")
    return found


# ---- statistics ----


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles (linear between the order statistics), least and largest of the values."""
    low, first, middle, third, high = (float(x) for x in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    return {"median": middle, "first_quartile": first, "third_quartile": third, "min": low, "max": high}


def ratio(own: Sequence[float], other: Sequence[float], resamples: int = RESAMPLES) -> dict[str, float]:
    """Ratio of medians, with a 95 % percentile interval of a bootstrap over rounds (the same rounds on both sides).

    Raises:
        SubjaxError: the two have not the same number of rounds.
    """
    a, b = np.asarray(own, float), np.asarray(other, float)
    if a.shape != b.shape or not len(a):
        raise SubjaxError(f"a ratio over rounds wants as many of each side, and there are {len(a)} and {len(b)}")
    picked = np.random.default_rng(0).integers(0, len(a), (resamples, len(a)))
    found = np.median(a[picked], axis=1) / np.median(b[picked], axis=1)
    low, high = np.quantile(found, (0.025, 0.975))
    return {"value": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, side) in the order of work: each round every side once, every other round the other way about."""
    for index in range(rounds):
        yield from ((index, name) for name in (names if index % 2 == 0 else reversed(names)))


# ---- sides as processes ----


class _Process:
    """A running side."""

    def __init__(self, side: Side, index: int, cores: int, device: str, folder: pathlib.Path):
        setup = {**side.setup, "target": side.target, "index": index, "cores": cores, "device": device}
        path = folder / f"{side.name.replace(' ', '-')}-{index}.json"
        path.write_text(json.dumps(setup))
        self.name, self._log = side.name, path.with_suffix(".log")
        self.notes: dict[str, Any] = {}  # what it said when it was ready
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.side", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.open("w"), text=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
        self._watched = psutil.Process(self._child.pid)

    def ask(self, round_: int, seconds: float) -> None:
        """Begin a round."""
        assert self._child.stdin
        self._child.stdin.write(json.dumps({"round": round_, "seconds": seconds}) + "\n")
        self._child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for what the side says. Raises SubjaxError with its last words where it ended instead."""
        assert self._child.stdout
        line = self._child.stdout.readline()
        said = json.loads(line) if line else {"error": self._last_words()}
        if "error" in said:
            raise SubjaxError(f"side {self.name!r}: {said['error']}")
        return said

    def _last_words(self) -> str:
        status = self._child.wait()
        lines = self._log.read_text().strip().splitlines() or ["it said nothing"]
        return f"ended with status {status}: {lines[-1][:300]}"

    def cpu_seconds(self) -> float:
        """CPU time that it has taken so far."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def end(self) -> None:
        """Let it go."""
        with contextlib.suppress(OSError, ValueError):
            if self._child.stdin:
                self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()


def _die_with_parent() -> None:
    """Ctrl-C is the parent's to handle, and a parent that is killed takes its children with it (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _started(sides: Sequence[Side], device: str, folder: pathlib.Path) -> Iterator[dict[str, list[_Process]]]:
    """All sides, made ready one after another, so that none is tuned while another compiles."""
    processes: dict[str, list[_Process]] = {}
    try:
        for side in sides:
            cores = max(1, visible_cores() // side.copies)
            group = processes.setdefault(side.name, [])
            group.extend(_Process(side, i, cores, device, folder) for i in range(side.copies))
            for process in group:
                process.notes = process.answer()["ready"]
            print(f"{side.name}: ready {json.dumps(group[0].notes)}", flush=True)
        yield processes
    finally:
        for group in processes.values():
            for process in group:
                process.end()


def _work(group: Sequence[_Process], waiting: Sequence[_Process], round_: int, seconds: float) -> dict[str, Any]:
    """One round of one side, with what the machine did meanwhile."""
    before, idle = os.getloadavg()[0], [process.cpu_seconds() for process in waiting]
    for process in group:
        process.ask(round_, seconds)
    said = [process.answer() for process in group]
    spent = sum(process.cpu_seconds() - was for process, was in zip(waiting, idle, strict=True))
    took = max(answer["seconds"] for answer in said)
    units = sum(answer["units"] for answer in said)
    extra = {k: v for k, v in said[0].items() if k not in ("units", "seconds")} if len(said) == 1 else {}
    return {
        "round": round_, "units": units, "seconds": took,
        # Side by side, each copy's own rate: one that ended earlier did not slow down the sum.
        "rate": sum(answer["units"] / answer["seconds"] for answer in said),
        "load_before": before, "load_after": os.getloadavg()[0], "idle_cpu_seconds": round(spent, 2), **extra,
    }  # fmt: skip


def compare(sides: Sequence[Side], asked: Options) -> dict[str, dict[str, Any]]:
    """Run the sides in turn, one warm-up round each first, which is not counted.

    Ctrl-C or SIGTERM ends the run, and the rounds that every side has are kept.

    Returns:
        For each side by name: `notes`, `rounds` (units, seconds, rate in units a second, load) and the rate's
        `summary`.

    Raises:
        SubjaxError: a side failed.
    """
    names = [side.name for side in sides]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch, _started(sides, asked.device, pathlib.Path(scratch)) as running:
        for name in names:
            _work(running[name], [], -1, min(asked.seconds, 10.0))
        try:
            for index, name in turns(names, asked.rounds):
                waiting = [process for other in names if other != name for process in running[other]]
                found[name].append(_work(running[name], waiting, index, asked.seconds))
                last = found[name][-1]
                print(f"round {index + 1} {name}: {last['rate']:.4g} a second, {last['seconds']:.1f} s", flush=True)
        except KeyboardInterrupt:
            whole = min(len(rows) for rows in found.values())
            if not whole:
                raise
            print(f"stopped: {whole} of {asked.rounds} rounds are whole and kept", flush=True)
            found = {name: rows[:whole] for name, rows in found.items()}
        notes = {name: running[name][0].notes for name in names}
    return {
        name: {"notes": notes[name], "rounds": rows, "summary": spread([row["rate"] for row in rows])}
        for name, rows in found.items()
    }


# ---- results ----


def result(
    name: str,
    asked: Options,
    sides: Mapping[str, Any],
    *,
    unit: str,
    settings: Mapping[str, Any],
    judged: Sequence[tuple[str, str, float | None]] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole result of a comparison. `judged` lists (side, against side, wanted ratio or None)."""
    rates = {side: [row["rate"] for row in value["rounds"]] for side, value in sides.items()}
    return {
        "comparison": name,
        "part": asked.part,
        "unit": unit,
        "quick": asked.quick,
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "device": asked.device,
        "size": asked.size,
        "machine": machine.describe(),
        "packages": machine.packages(),
        "settings": {"rounds": asked.rounds, "seconds": asked.seconds, **settings},
        "sides": dict(sides),
        "ratios": [
            {"side": side, "against": other, "wanted": wanted, **ratio(rates[side], rates[other])}
            for side, other, wanted in judged
        ],
        **(extra or {}),
    }


def write(found: Mapping[str, Any], asked: Options) -> pathlib.Path:
    """Write a result where it belongs; one on a GPU stands beside the CPU's. Prints the ratios."""
    asked.out.mkdir(parents=True, exist_ok=True)
    tail = f"-{found['part']}" if found.get("part") else ""
    tail += f"-gpu-{found['size']}" if found["device"] == "gpu" else ""
    path = asked.out / f"{found['comparison']}{tail}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    for row in found.get("ratios", []):
        print(f"{row['side']} / {row['against']}: {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    print(path)
    return path


def main(
    run: Callable[[Options], dict[str, Any]], name: str, doc: str, argv: Sequence[str] | None = None,
    parts: Sequence[str] = (),
) -> None:  # fmt: skip
    """A comparison's command: options, the run of each part asked for, its result; a mistake or failure is one line."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        asked = options(name, doc, argv, parts)
        for part in parts if asked.part is None and parts else [asked.part]:
            of_part = dataclasses.replace(asked, part=part)
            found = run(of_part)
            write(found, of_part)
            if any(len(side["rounds"]) < asked.rounds for side in found["sides"].values()):
                sys.exit(130)  # stopped
    except SubjaxError as error:
        print(f"benchmarks.{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


def timed(piece: Callable[[int], float], seconds: float) -> dict[str, float]:
    """Do piece after piece, at least one, until `seconds` have gone by; `piece(i)` returns the units that it did."""
    start, units, count = time.perf_counter(), 0.0, 0
    while True:
        units += piece(count)
        count += 1
        took = time.perf_counter() - start
        if took >= seconds:
            return {"units": units, "seconds": took, "pieces": count}
