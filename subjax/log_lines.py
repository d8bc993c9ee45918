"""What the package logs, as lines that a command writes to stderr."""

import logging
import sys

from subjax.errors import one_line


class Lines(logging.Handler):
    """Writes records to what `sys.stderr` is by then; of the package, each as a line `subjax: warning: MESSAGE`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a stream that takes no more loses it, since a warning ends no work."""
        if record.name.partition(".")[0] == "subjax":
            line = f"subjax: {record.levelname.lower()}: {one_line(record.getMessage())}"
        else:
            line = self.format(record)
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            return


def show() -> None:
    """Let this process write what is logged; where a handler stands already, as in a program of one's own, it stays.

    Without it absl, once it is imported, installs a handler of its own form.
    """
    lines = Lines()
    lines.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logging.basicConfig(handlers=[lines])
