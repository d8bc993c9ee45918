"""Signals while something runs."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled(handlers: dict[signal.Signals, Callable[..., Any]]) -> Iterator[None]:
    """Handle signals for a while; an ignored one stays so, and only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    taken = {number for number in handlers if before[number] is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
