"""One side of a comparison, in a process of its own: it gets ready, then waits, and works only when it is told to.

    python -m benchmarks.side SETUP.json      # started by `benchmarks.harness`, never by hand

The setup names a function, "package.module:function", that takes the setup and returns a `Ready`. Talk goes by lines of
JSON: the process says {"ready": notes}; each {"round": i, "seconds": s} is answered by what `run(i, s)` returns, and
the end of its input ends it. Between its rounds it blocks in a read, and so leaves the machine to the other side.
Thread pools go to sleep by themselves within milliseconds, so no waiting policy is set, which would slow torch down in
its own rounds; the CPU time of waiting sides stands in every result.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from subjax import cpu
from subjax.errors import SubjaxError


@dataclasses.dataclass(frozen=True)
class Ready:
    """A side that is compiled and warm.

    `run(round, seconds)` works for about so long (whole pieces of work, at least one) and returns {"units": how many
    were done, "seconds": how long that took}, and whatever else shall stand beside. `notes` go to the result.
    """

    run: Callable[[int, float], Mapping[str, Any]]
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def start(setup: Mapping[str, Any]) -> Ready:
    """Import the side that a setup names and let it get ready."""
    module, _, function = setup["target"].partition(":")
    return getattr(importlib.import_module(module), function)(setup)


def _surroundings(setup: Mapping[str, Any]) -> None:
    """Cores and threads, before JAX or torch is imported. Both are given the same cores."""
    if setup["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        cpu.pin(setup["index"], setup["cores"])
    else:
        # Two frameworks on one card: neither may take all of its memory at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.update(setup.get("environment", {}))


def main() -> None:
    """Serve rounds until the input ends."""
    setup = json.loads(pathlib.Path(sys.argv[1]).read_text())
    # Replies have a stream of their own: what libraries print must not get between them.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _surroundings(setup)
    try:
        ready = start(setup)
        print(json.dumps({"ready": dict(ready.notes)}), file=replies)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(dict(ready.run(asked["round"], asked["seconds"]))), file=replies)
    except SubjaxError as error:
        print(json.dumps({"error": str(error)}), file=replies)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
