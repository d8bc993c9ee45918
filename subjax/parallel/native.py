"""What native code writes by itself in a job of several processes, held back until it is known to be worth reading.

When process 0 dies, JAX's service dies with it, and JAX ends every other process at once by an abort, behind a page of
C++ frames. Here the abort is caught and the page dropped, for `subjax.parallel.processes` says in one line what
happened; an abort for any other reason is shown whole. Nothing of this is done in a job of one process.
"""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

_HELD_S = 1.0  # longest that a line is held back
# What JAX's distributed service says when a process has gone.
_SERVICE = re.compile(rb"distributed service|coordination.service|CoordinationService", re.IGNORECASE)
# Gloo greets from several threads at once, a few words or a number at a time: a line may hold parts of several
# greetings, or a number alone.
_GREETINGS = re.compile(
    rb"(?:\[Gloo\] Rank|is connected to|peer ranks\.?|Expected number of connected peer ranks is|:|\d|\s)*"
)


def noise(line: bytes) -> bool:
    """Whether a line of native code tells a user nothing: blank, of Gloo's greetings alone, or of JAX's service."""
    return _GREETINGS.fullmatch(line) is not None or _SERVICE.search(line) is not None


class Filter:
    """Reads this process's file descriptors 1 and 2 from a pipe and passes on to stderr what is no noise, late.

    Python's own sys.stdout and sys.stderr, as they are from now on, write to the real ones, at once: whoever keeps one
    of them must ask for it after this.
    """

    def __init__(self, on_abort: Callable[[], None]):
        self._real = os.dup(2)
        reading, writing = os.pipe()
        sys.stdout, sys.stderr = _apart(sys.stdout, 1, writing), _apart(sys.stderr, 2, writing)
        os.close(writing)
        self._file = os.fdopen(reading, "rb", buffering=0)
        self._held: list[tuple[float, bytes]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True, name="native stderr").start()
        threading.Thread(target=self._pass_on, daemon=True, name="native stderr, late").start()
        self._on_abort = on_abort
        # Kept as long as the process, like the handler itself.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))
        self._default = lambda: libc.signal(signal.SIGABRT, None)
        atexit.register(self.flush)

    def _read(self) -> None:
        rest = b""
        while data := self._file.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            with self._lock:
                self._held += [(time.monotonic(), line + b"\n") for line in lines]

    def _pass_on(self) -> None:
        while True:
            time.sleep(_HELD_S / 4)
            self.flush(_HELD_S)

    def flush(self, older_than_s: float = 0.0) -> None:
        """Pass on what has been held for so long."""
        before = time.monotonic() - older_than_s
        with self._lock:
            due = [line for at, line in self._held if at <= before]
            self._held = self._held[len(due) :]
            with contextlib.suppress(OSError):
                os.write(self._real, b"".join(line for line in due if not noise(line)))

    def _aborted(self, _number: int) -> None:
        """Native code aborts, in whatever thread: say why, if that is known; else show what it wrote, and abort."""
        self._on_abort()
        time.sleep(0.1)
        self.flush()
        self._default()
        os.kill(os.getpid(), signal.SIGABRT)


def _apart(stream: TextIO, descriptor: int, writing: int) -> TextIO:
    """A stream of Python's own on what `descriptor` was, which from now on is `writing`."""
    stream.flush()
    own = os.fdopen(os.dup(descriptor), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(writing, descriptor)
    return own
