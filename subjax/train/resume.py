"""The state of a training on disk: saved while the next steps are taken, and read back by whoever goes on."""

import contextlib
import json
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from subjax.errors import SubjaxError
from subjax.models import checkpoints
from subjax.models.network import Params
from subjax.parallel.processes import group
from subjax.train.step import Program


class Saves:
    """The checkpoints of one training under a folder. `wait` before the end: what went wrong is raised there.

    A save is under way while training goes on; the next one waits for it. There is always one whole checkpoint: older
    ones go when a newer one is whole, which `progress.json` beside the arrays says, written last.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tuned: Params, state: Any, record: Mapping[str, Any]) -> None:
        """Begin to save the state after `step` steps; `record` is what stands beside it, plain data."""
        self.wait()
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"step-{step:08d}"
        if target.exists() and group().first:
            target.rmtree()
        group().barrier("room for a checkpoint")
        arrays = _leaves(tuned, state)
        if next(iter(jax.tree.leaves(arrays)[0].devices())).platform == "cpu":
            arrays = jax.tree.map(jnp.copy, arrays)  # the next step's donation would write over what is being saved
        finish = checkpoints.begin(target / "arrays", arrays)
        text = json.dumps({"step": step, **record})
        self._writing = threading.Thread(target=self._finish, args=(finish, target, text), name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Wait until what is being saved is whole. Raises what went wrong: OSError for a full disk."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(self, finish: Any, target: epath.Path, text: str) -> None:
        try:
            finish()
            if not group().first:
                return
            (target / "progress.json").write_text(text)
            for old in self._folder.glob("step-*"):
                if old.name < target.name:
                    old.rmtree()
        except BaseException as error:
            self._error = error


def _leaves(tuned: Params, state: Any) -> dict[str, jax.Array]:
    return {f"tuned/{n}": v for n, v in tuned.items()} | {f"state/{i}": v for i, v in enumerate(jax.tree.leaves(state))}


def restore(
    folder: epath.Path, compiled: Program, tuned: Params, state: Any
) -> tuple[Params, Any, dict[str, Any]] | None:
    """The newest whole checkpoint under `folder`, onto the run's own shardings, and its record with its `step`.

    None where there is none.
    """
    wanted = {f"tuned/{n}": s for n, s in compiled.tuned_shardings.items()}
    wanted |= {f"state/{i}": s for i, s in enumerate(jax.tree.leaves(compiled.state_shardings))}
    found = sorted((path.name for path in folder.glob("step-*")) if folder.exists() else [], reverse=True)
    for name in group().share("checkpoints", found):
        path = folder / name
        # A checkpoint cut off by a crash is passed over: an older one, or the start, gives the same result.
        with contextlib.suppress(SubjaxError, OSError, ValueError, KeyError):
            progress = _progress(path)
            arrays = checkpoints.load(path / "arrays", wanted)
            restored = {n: arrays[f"tuned/{n}"] for n in tuned}
            leaves = [arrays[f"state/{i}"] for i in range(len(jax.tree.leaves(state)))]
            rebuilt = jax.tree.unflatten(jax.tree.structure(state), leaves)
            return restored, rebuilt, progress
    return None


def _progress(checkpoint: epath.Path) -> dict[str, Any]:
    """What stands beside a checkpoint's arrays, last: without it they are not whole. Read by process 0 for all."""
    text = None
    with contextlib.suppress(OSError):
        text = (checkpoint / "progress.json").read_text() if group().first else None
    return json.loads(group().share("progress of a checkpoint", text) or "")
