"""Parameters to disk and back through orbax, as flat dicts of arrays."""

import errno
import logging
import os
import shutil
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from subjax import files
from subjax.errors import SubjaxError

_OWN_FILES = 1 << 20  # bytes that orbax may write beside the arrays

# What goes wrong in orbax is raised, and told in one line; its own log would tell it again in hundreds.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _nested(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # orbax would read a slash in a key as a level of the tree.
    return {name.replace("/", "."): value for name, value in flat.items()}


def _require_room(path: epath.Path, arrays: Mapping[str, jax.Array]) -> None:
    """Raise the system's error for a full disk before a save begins, where it can be foreseen.

    A save that meets it midway fails too, but not quietly: threads of orbax's own go on, and complain on stderr.
    """
    if files.is_local(path):
        folder = next(parent for parent in path.parents if parent.exists())
        if shutil.disk_usage(folder).free < sum(array.nbytes for array in arrays.values()) + _OWN_FILES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


def save(path: epath.Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write a flat dict of arrays as an orbax checkpoint at `path`, which must not exist yet. Atomic.

    Raises OSError if the disk is full, or has less than 1 MiB beside the arrays.
    """
    _require_room(path, arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _nested(arrays))


def load(path: epath.Path, shardings: Mapping[str, jax.sharding.Sharding] | None = None) -> dict[str, jax.Array]:
    """Read what `save` wrote, onto `shardings` where given (else host arrays); any mesh can read any other's.

    Raises:
        SubjaxError: the checkpoint is missing, truncated or damaged; the path is named.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("its manifest is missing or not whole")
            tree = metadata.tree

            def target(name: str, meta) -> jax.ShapeDtypeStruct | np.ndarray:
                if shardings is None:
                    return np.empty(meta.shape, meta.dtype)
                return jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=shardings[name.replace(".", "/")])

            restored = checkpointer.restore(path, {name: target(name, meta) for name, meta in tree.items()})
    except Exception as error:  # orbax and tensorstore raise many kinds for one cause: the files are not whole
        cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise SubjaxError(
            f"checkpoint {path} cannot be read ({cause}); delete the folder of its node and run again: it is made anew"
        ) from error
    return {name.replace(".", "/"): value for name, value in restored.items()}
