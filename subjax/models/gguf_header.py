"""The header of a GGUF file: its metadata as plain Python, and where in the file each tensor lies.

The format (little-endian, ggml's docs/gguf.md): magic, version, the numbers of tensors and of metadata entries; the
entries (name, type, value); the tensors' descriptions (name, dimensions from the fastest, type, offset); the data.
The `gguf` library has a reader of its own, which keeps an array object for every token: a vocabulary of 262,144 costs
it 10 s and 700 MB. So the header is read here, and the library's tables say what the types of tensors mean.
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from subjax.errors import UsageError
from subjax.files import is_local

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, where the metadata does not say
_MOST_DIMENSIONS = 4
# struct's and numpy's code of each type of a metadata value; strings and arrays have lengths before them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file has it: its shape (rows before columns, as numpy writes it), type, and bytes in the file."""

    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself, and the whole file as mapped memory."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    data: mmap.mmap


class _Cursor:
    """Walks the mapped file; whatever it is asked for must lie inside."""

    def __init__(self, data: mmap.mmap, where: str):
        self.data, self.where, self.at = data, where, 0

    def damaged(self, what: str) -> UsageError:
        return UsageError(f"{self.where}: damaged GGUF file: {what}; fetch the file again")

    def take(self, count: int) -> int:
        """Step over `count` bytes; where they begin."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise UsageError(
                f"{self.where}: truncated GGUF file: it ends at byte {len(self.data)}, inside its header;"
                " fetch the file again"
            )
        return begin

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        begin = self.take(length)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"bytes {begin} to {self.at} are no UTF-8 text") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.damaged(f"a metadata value is of type {kind}, which GGUF does not have")
        value = self.scalar(_SCALARS[kind])
        # The shortest decimal of a 32-bit float is what the model's config.json said (1e-05, not 9.99999974e-06).
        return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value

    def array(self) -> list:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self.damaged(f"a metadata array holds values of type {kind}, which GGUF does not have in arrays")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        begin = self.take(length * dtype.itemsize)
        return np.frombuffer(self.data, dtype, length, begin).tolist()


def read_header(path: epath.Path, where: str) -> Header:
    """Read the header of the GGUF file at `path`; messages call it `where`.

    Raises:
        UsageError: the file is missing, not local, no GGUF file, of another version or byte order, truncated or
            damaged, or has a tensor of a type that is unknown or cannot be dequantized.
    """
    cursor = _Cursor(_mapped(path, where), where)
    cursor.take(len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = "is big-endian" if swapped in _VERSIONS else f"has version {version}"
        raise UsageError(f"{where}: this GGUF file {found}; versions 2 and 3, little-endian, can be read: convert it")
    count, entries = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    described = [_description(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment <= 0:
        raise cursor.damaged(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _located(cursor, name, shape, kind, start + at) for name, shape, kind, at in described}
    _require_known_quantizations(tensors, where)
    return Header(metadata, tensors, cursor.data)


def _mapped(path: epath.Path, where: str) -> mmap.mmap:
    if not is_local(path):
        raise UsageError(f"{where}: a GGUF file is read as mapped memory; copy it to a local disk first")
    try:
        with open(os.fspath(path), "rb") as file:
            begin = file.read(len(_MAGIC))
            if begin != _MAGIC:
                raise UsageError(
                    f"{where}: not a GGUF file (it begins with {begin!r}, not {_MAGIC!r});"
                    " give a .gguf file, or a folder with config.json and *.safetensors"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UsageError(f"{where}: no such file; give the path of a .gguf file") from error
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror or error}); mend that first") from error


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type, and offset into the data of the next tensor."""
    name, dimensions = cursor.string(), cursor.scalar("I")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise cursor.damaged(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.damaged(f"tensor {name!r} has no values")
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _located(cursor: _Cursor, name: str, shape: tuple[int, ...], number: int, offset: int) -> StoredTensor:
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UsageError(
            f"{cursor.where}: tensor {name!r} has quantization type {number}, which gguf does not know;"
            " upgrade gguf, or take a file quantized otherwise (Q8_0, Q4_K_M)"
        ) from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.damaged(f"rows of tensor {name!r} have {shape[-1]} values, not a multiple of {block}")
    size = math.prod(shape) // block * block_bytes
    if offset + size > len(cursor.data):
        raise UsageError(
            f"{cursor.where}: truncated GGUF file: it ends at byte {len(cursor.data)}, and its tensor {name!r}"
            f" at {offset + size}; fetch the file again"
        )
    return StoredTensor(shape, kind, offset, size)


def _require_known_quantizations(tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Refuse a file before any of it is read, by dequantizing one block of zeros of each of its types."""
    import gguf

    for kind, name in {tensor.kind: name for name, tensor in tensors.items()}.items():
        try:
            gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            raise UsageError(
                f"{where}: tensor {name!r} has type {kind.name}, which gguf cannot dequantize;"
                " upgrade gguf, or take a file quantized otherwise (Q8_0, Q4_K_M)"
            ) from None
