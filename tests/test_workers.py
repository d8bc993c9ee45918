"""What a worker that is killed leaves behind, where Python's tracker of shared resources removes it."""

import signal
import subprocess
import sys

import pytest

KILLED = """
import multiprocessing, os, signal
from multiprocessing import resource_tracker
from subjax import workers
{start}
lock = multiprocessing.get_context("spawn").Lock()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("start", "says"), [("workers.start_tracker()", False), ("resource_tracker.ensure_running()", True)]
)
def test_a_semaphore_of_a_killed_process_is_removed_in_silence(start, says):
    ended = subprocess.run(
        [sys.executable, "-c", KILLED.format(start=start)], stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )  # ends once the tracker too has closed the pipe
    assert ended.returncode == -signal.SIGKILL
    assert ("leaked semaphore" in ended.stderr) == says
    assert bool(ended.stderr) == says
