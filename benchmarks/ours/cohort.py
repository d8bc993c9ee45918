"""Our side of eight students at once: a cohort in one program. Runs in turn and side by side are in `training`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.side import Ready
from subjax.errors import SubjaxError


def start(setup: Mapping[str, Any]) -> Ready:
    """Setup: as that of `benchmarks.ours.training.in_turn`; units are rows of all members together.

    Raises:
        SubjaxError: always, as long as there is no trainer of cohorts. It goes here when there is one.
    """
    raise SubjaxError(
        f"a cohort of {setup['students']} students cannot be measured: subjax has no trainer of cohorts yet; fill in"
        " benchmarks/ours/cohort.py, or leave it out with BENCH_COHORT=0"
    )
