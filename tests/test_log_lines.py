"""What the package logs in a command: lines of one form, whatever other libraries install."""

import subprocess
import sys

SAYS = """
import logging
from subjax import log_lines

log_lines.show()
from absl import logging as absl_logging
absl_logging.vlog(1, "absl installs a handler of its own, where there is none")
logging.getLogger("subjax.store").warning("the lock of %s\\ncould not be freed", "corpus/1")
logging.getLogger("subjax.store").info("not for the eye")
logging.getLogger("other").warning("of its own")
"""


def test_what_is_logged_is_one_line_said_once():
    done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "subjax: warning: the lock of corpus/1 could not be freed",
        "WARNING:other:of its own",
    ]
