"""`python -m subjax` is the `subjax` command."""

import sys

from subjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
