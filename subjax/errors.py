"""Errors that a person reads: one line each, with the exit status that the command ends with."""


class SubjaxError(Exception):
    """A failure of the work itself (no valid row, NaN, full disk). The message is one line: what, where, the mend."""

    exit_status = 1


class UsageError(SubjaxError):
    """A mistake in the command line, the config or an input file."""

    exit_status = 2


class Preempted(SubjaxError):
    """The process was asked to stop (SIGTERM) and saved what it had; the same command goes on from there."""

    exit_status = 75
