"""Errors that a person reads: one line each, with the exit status that the command ends with."""


def one_line(text: object) -> str:
    """Give `text` on one line, white space collapsed."""
    return " ".join(str(text).split())


def bug(error: Exception) -> str:
    """The line of a failure that is a bug, whose traceback is shown first."""
    return f"{type(error).__name__}: {one_line(error)} (a bug: its traceback is above)"


class SubjaxError(Exception):
    """A failure of the work itself (no valid row, NaN, full disk). The message is one line: what, where, the mend."""

    exit_status = 1

    def within(self, what: str) -> "SubjaxError":
        """The same failure, said to be within `what`, as the nearest kind of error that is a message alone."""
        kinds = type(self).__mro__
        plain = next(kind for kind in kinds if kind.__init__ is Exception.__init__)  # type: ignore[misc]
        assert issubclass(plain, SubjaxError)
        return plain(f"{what}: {self}")


class UsageError(SubjaxError):
    """A mistake in the command line, the config or an input file."""

    exit_status = 2


class ConfigError(UsageError):
    """A mistake in a config file, its argument or an override: one line with the file, the key and the mend."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Preempted(SubjaxError):
    """The process was asked to stop (SIGTERM) and saved what it had; the same command goes on from there."""

    exit_status = 75
