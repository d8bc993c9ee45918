"""A checkpoint as a source of named tensors, wherever it lies and whatever format it has.

Everything above reads weights through `Source`: Hugging Face's names, Hugging Face's layout and a config in the form of
config.json. A format of files is one class with these members.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from subjax.errors import UsageError
from subjax.files import sha256_file
from subjax.models import places

_PACKAGE = "package:"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What is known of a stored tensor before it is read; `dtype` is "float32", "float16" or "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str


class Source(Protocol):
    """An opened checkpoint: its description is read and checked, its weights are still on disk."""

    @property
    def where(self) -> str:
        """The path, package or hub id that the user gave, for messages."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The architecture in the form of Hugging Face's config.json."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every weight by Hugging Face's name ("model.layers.0.self_attn.q_proj.weight"), in Hugging Face's layout."""

    @property
    def files(self) -> Mapping[str, epath.Path]:
        """Every file that counts for identity, by name: config, weights and tokenizer, or the one .gguf."""

    @property
    def revision(self) -> str | None:
        """The resolved commit of a hub id, else None."""

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, one of `tensors`, of that shape and dtype; a read-only view of the file where possible."""


def open_source(model: str) -> Source:
    """Open the checkpoint that `model` names.

    Args:
        model: a folder (config.json and safetensors), a path to a .gguf file, a hub id "org/name" or
            "org/name@revision" (taken from the local cache first), or "package:NAME" or "package:NAME/file.gguf", a
            .gguf inside an installed Python package. A folder of that name goes before a hub id.

    Raises:
        UsageError: nothing is there, it cannot be had from the hub, or it is not a sound checkpoint.
    """
    if model.startswith(_PACKAGE):
        return _open_file(places.package_file(model.removeprefix(_PACKAGE)), model)
    if "://" in model:  # before it becomes a path: one of an unknown scheme cannot
        raise UsageError(
            f"model {model!r}: weights are memory-mapped, so they must lie on a local disk; copy them there and give "
            "that folder, or give a hub id as 'org/name'"
        )
    path = epath.Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, model)
    if path.exists():
        return _open_file(path, model)
    if not places.is_hub_id(model):
        raise UsageError(f"model {model!r}: no such folder or file{places.nearest(path)}; a hub id is 'org/name'")
    try:
        folder = places.hub_folder(model)
    except UsageError as error:
        if not path.parent.is_dir():
            raise
        # "models/lama" may be a slip in a path as well as a hub id.
        raise UsageError(f"{error} (there is no such folder here either{places.nearest(path)})") from error
    return _open_folder(folder, model, revision=folder.name)  # the cache names a snapshot's folder by its commit


def _open_folder(path: epath.Path, where: str, revision: str | None = None) -> Source:
    from subjax.models import safetensors_folder  # which knows Tensor from here

    return safetensors_folder.open_folder(path, where, revision)


def _open_file(path: epath.Path, where: str) -> Source:
    if path.suffix.lower() == ".gguf":
        from subjax.models import gguf_file  # which knows Tensor from here

        return gguf_file.open_gguf(path, where)
    raise UsageError(f"model {where!r}: neither a folder nor a .gguf file; give the folder that holds config.json")


def content_digest(source: Source) -> str:
    """Hex sha256 that tells one checkpoint from another, whatever path it was opened by.

    A hub id counts by its resolved commit; a folder by the names and contents of `source.files`, so it keeps its digest
    when it is moved; a lone file by its content. A hub id and a copy of its files have two digests.
    """
    if source.revision is not None:
        name = source.where.partition("@")[0]
        return hashlib.sha256(f"hub:{name}@{source.revision}".encode()).hexdigest()
    whole = hashlib.sha256()
    for name, path in sorted(source.files.items()):
        status = os.stat(path)
        known_as = name if len(source.files) > 1 else ""
        whole.update(f"{known_as}\0{_file_digest(os.fspath(path), status.st_size, status.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@functools.cache
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    # Size and time are only the key: a file that was written again is read again.
    return sha256_file(epath.Path(path))
