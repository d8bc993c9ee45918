"""Runs a study on this machine: `python -m launch.local --config=FILE --workdir=DIR`, with the flags of `subjax run`.

The engine is run's own executor: workers side by side on CPU, one process on a GPU or TPU.
"""

import sys
from collections.abc import Sequence

from subjax import cli


def main(words: Sequence[str] | None = None) -> int:
    """Plan, execute here, write the report; gives the exit status of `subjax run`."""
    return cli.main(["run", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    sys.exit(main())
