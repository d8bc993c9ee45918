"""A command in a job of several processes: what ends one of them ends all, in one line."""

import logging
import os
import sys
import time
import traceback

from subjax.cli_arguments import Arguments, Command
from subjax.errors import SubjaxError, one_line
from subjax.parallel import cluster, native, processes


def in_job(command: Command, arguments: Arguments) -> int:
    """Do a command in the job of several processes that flags or the environment tell of, or alone.

    What ends one process ends all: process 0 says why, in one line.
    """
    given = arguments.coordinator, arguments.processes, arguments.process
    job = cluster.of_flags(*given) or cluster.detected(os.environ)
    if job is None:
        return command.do(arguments)
    group = processes.join(job, arguments.init_timeout)
    # An abort that JAX's service causes waits here for the reason, which ends the process in its own way. The command
    # begins behind it, since progress keeps the stderr that it finds.
    native.Filter(lambda: time.sleep(1.0 if group.first else 2 * processes.SILENCE_S))
    if not group.first:
        logging.getLogger("subjax").setLevel(logging.ERROR)  # process 0 warns for all
    # Process 0 is given the time to fail in the same way, and to say so.
    patience = 0.0 if group.first else 2.0
    try:
        status = group.share("status", command.do(arguments))
    except SubjaxError as error:
        group.fail(one_line(error), error.exit_status, patience)
        raise
    except KeyboardInterrupt:
        group.fail("stopped by Ctrl-C; the same command goes on from there", 130, patience)
        raise
    except Exception as error:
        traceback.print_exc()
        group.fail(f"{type(error).__name__} (a bug: its traceback is above)", 1, patience)
        raise
    if "jax" in sys.modules:
        from subjax.parallel import start

        start.leave()
    group.close()
    return int(status)
