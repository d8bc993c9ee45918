"""Blocks of an ensemble's members, under way at once in threads of one process: watched and stopped together."""

import dataclasses
import threading
from collections.abc import Callable

from subjax.errors import Preempted


@dataclasses.dataclass
class Watch:
    """Counts epochs of all blocks, tells of them, and stops where it is asked to; blocks' threads share it."""

    total: int
    progress: Callable[[int, int, str], None]
    should_stop: Callable[[], bool]
    done: int = 0
    over: bool = False  # a block has failed, so the others need not go on
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def before(self) -> None:
        """Raise Preempted if no further epoch shall begin."""
        if self.over or self.should_stop():
            raise Preempted(
                f"stopped after epoch {self.done} of {self.total}; the same command begins this ensemble again"
            )

    def stop(self) -> None:
        """No further epoch shall begin."""
        self.over = True

    def after(self) -> None:
        """An epoch is done."""
        with self._lock:
            self.done += 1
            self.progress(self.done, self.total, "epoch")
