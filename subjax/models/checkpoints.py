"""Parameters to disk and back through orbax, as flat dicts of arrays."""

from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from subjax.errors import SubjaxError


def _nested(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # orbax would read a slash in a key as a level of the tree.
    return {name.replace("/", "."): value for name, value in flat.items()}


def save(path: epath.Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write a flat dict of arrays as an orbax checkpoint at `path`, which must not exist yet. Atomic."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _nested(arrays))


def load(path: epath.Path, shardings: Mapping[str, jax.sharding.Sharding] | None = None) -> dict[str, jax.Array]:
    """Read what `save` wrote, onto `shardings` where given (else host arrays); any mesh can read any other's.

    Raises:
        SubjaxError: the checkpoint is missing, truncated or damaged; the path is named.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree

            def target(name: str, meta) -> jax.ShapeDtypeStruct | np.ndarray:
                if shardings is None:
                    return np.empty(meta.shape, meta.dtype)
                return jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=shardings[name.replace(".", "/")])

            restored = checkpointer.restore(path, {name: target(name, meta) for name, meta in tree.items()})
    except SubjaxError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for one cause: the files are not whole
        cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise SubjaxError(
            f"checkpoint {path} cannot be read ({cause}); delete the node's folder and run again to make it anew"
        ) from error
    return {name.replace(".", "/"): value for name, value in restored.items()}
