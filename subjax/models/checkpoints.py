"""Parameters to disk and back through orbax, as flat dicts of arrays.

In a job of several processes `save` and `load` are called by all of them together: each writes the shards that it has,
and reads those that it wants, of a checkpoint of whatever mesh and number of processes.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from subjax import files
from subjax.cards import digest_pieces
from subjax.errors import SubjaxError
from subjax.parallel.processes import group

_OWN_FILES = 1 << 20  # bytes that orbax may write beside the arrays
_PIECE = 1 << 28  # bytes of an array that are read at a time for its digest

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
    begin(path, arrays)()


def begin(path: epath.Path, arrays: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Begin a `save`; what it gives waits for the end, from any thread. On CPU the arrays must live as long.

    Both raise as `save` does.
    """
    full = None
    try:
        _require_room(path, arrays)
    except OSError as error:
        full = error
    # All of them stop before the save, or none: one that stops alone would leave the others waiting in it.
    if group().either(full is not None)[0]:
        raise full or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
    checkpointer = ocp.StandardCheckpointer()
    try:
        checkpointer.save(path, _nested(arrays))
    except BaseException:
        checkpointer.close()
        raise
    return checkpointer.close  # which waits


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
        raise _unreadable(path, error) from error
    return {name.replace(".", "/"): value for name, value in restored.items()}


def _unreadable(path: epath.Path, error: Exception) -> SubjaxError:
    cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return SubjaxError(
        f"checkpoint {path} cannot be read ({cause}); delete the folder of its node and run again: it is made anew"
    )


def digest(path: epath.Path) -> str:
    """`digest_arrays` of what `save` wrote at `path`, read a piece at a time: no array is ever whole in memory.

    Raises:
        SubjaxError: the checkpoint is missing, truncated or damaged; the path is named.
    """
    try:
        # Not through orbax, whose calls are for all processes together, and this one is for any alone.
        keys = tensorstore.KvStore.open(_kvstore(path)).result().list().result()
        names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
        if not names:
            raise ValueError("it holds no arrays")
        return digest_pieces(_read(path, name) for name in sorted(names, key=lambda name: name.replace(".", "/")))
    except Exception as error:
        raise _unreadable(path, error) from error


def _read(path: epath.Path, name: str) -> tuple[list[str], str, tuple[int, ...], Iterator[np.ndarray]]:
    spec = {"driver": "zarr", "kvstore": _kvstore(path, f"{name}/")}
    array = tensorstore.open(spec, open=True, read=True).result()
    return [name.replace(".", "/")], array.dtype.name, array.shape, _pieces(array)


def _kvstore(path: epath.Path, inside: str = "") -> dict[str, Any]:
    """Where orbax keeps the arrays of a checkpoint, as tensorstore is told of it."""
    base = {"driver": "file", "path": f"{os.fspath(path)}/"} if files.is_local(path) else f"{os.fspath(path)}/"
    return {"driver": "ocdbt", "base": base, "path": inside}


def _pieces(array: tensorstore.TensorStore) -> Iterator[np.ndarray]:
    """The array in C order, in parts of its leading dimensions that are not much larger than `_PIECE` bytes."""
    if not array.rank or array.size * array.dtype.numpy_dtype.itemsize <= _PIECE:
        yield array.read().result()
        return
    row = array.size // array.shape[0] * array.dtype.numpy_dtype.itemsize
    if row > _PIECE:
        for place in range(array.shape[0]):
            yield from _pieces(array[place])
        return
    step = max(1, _PIECE // row)
    for first in range(0, array.shape[0], step):
        yield array[first : min(first + step, array.shape[0])].read().result()
