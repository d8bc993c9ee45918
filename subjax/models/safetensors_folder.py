"""A Hugging Face folder as a source: config.json and safetensors, whole or in shards, read memory-mapped.

The safetensors format: the length of the header (8 bytes, little-endian), the header in JSON (a tensor's name -> its
dtype, shape and place among the bytes that follow), then the tensors' bytes in C order without gaps. All of it is
checked when the folder is opened, so a download that broke off is found before anything is computed. A pickle is never
read: it can run any code.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from subjax.errors import UsageError, one_line
from subjax.models.places import INDEX, TOKENIZER_FILES
from subjax.models.source import Tensor

_SINGLE = "model.safetensors"
_FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}  # bytes
_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_LFS_POINTER = b"version https://git-lfs"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor as its file has it: `content` is its bytes in the mapped file; `dtype` is None where it is no weight."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    content: np.ndarray


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder:
    """The `Source` of a Hugging Face folder; the members are explained there."""

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, epath.Path]
    revision: str | None
    contents: Mapping[str, np.ndarray] = dataclasses.field(repr=False)  # each tensor's bytes in the mapped file

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the mapped file: no memory is taken but the file's own pages."""
        tensor = self.tensors[name]
        return self.contents[name].view(np.dtype(tensor.dtype)).reshape(tensor.shape)


def open_folder(folder: epath.Path, where: str, revision: str | None = None) -> SafetensorsFolder:
    """Open the checkpoint in `folder`; `where` is what the user gave, `revision` the commit of a hub id's snapshot.

    Integer and boolean tensors are left out: old checkpoints keep attention masks and the like, which are no weights.

    Raises:
        UsageError: config.json or weights are missing or damaged, a dtype is unknown, or the weights are quantized.
    """
    config = _read_config(folder, where)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UsageError(
            f"{folder / 'config.json'}: the weights are quantized ({method}); give the checkpoint that they were made "
            "from, or a .gguf"
        )
    shard_of = _weight_map(folder, where, revision)
    shards = {name: _read_shard(folder / name) for name in sorted(set(shard_of.values()) if shard_of else {_SINGLE})}
    if shard_of is None:
        shard_of = dict.fromkeys(shards[_SINGLE], _SINGLE)
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise UsageError(
                f"{folder / INDEX}: puts tensor {name!r} into {shard!r}, which does not hold it; fetch both files again"
            )
    stored = {name: shards[shard][name] for name, shard in sorted(shard_of.items())}
    weights = {name: tensor for name, tensor in stored.items() if tensor.dtype is not None}
    if not weights:
        raise UsageError(f"model {where!r}: its safetensors hold no weights; fetch them again")
    beside = (*TOKENIZER_FILES, *([] if _SINGLE in shards else [INDEX]))
    names = ["config.json", *shards, *(name for name in beside if (folder / name).exists())]
    return SafetensorsFolder(
        where=where,
        config=config,
        tensors={name: Tensor(tensor.shape, str(tensor.dtype)) for name, tensor in weights.items()},
        files={name: folder / name for name in sorted(names)},
        revision=revision,
        contents={name: tensor.content for name, tensor in weights.items()},
    )


def has_weights(folder: epath.Path) -> bool:
    """Whether `folder` has its safetensors, every shard of them; what is in them is not looked at."""
    try:
        _weight_map(folder, str(folder))
    except UsageError:
        return False
    return True


def _read_config(folder: epath.Path, where: str) -> dict[str, Any]:
    if (folder / "config.json").exists():
        return _read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        mend = "it holds an adapter; merge it into its model and give that folder"
    elif found := sorted(path.name for path in folder.glob("*.gguf")):
        mend = f"give the path of {found[0]!r} in it"
    else:
        mend = "give the folder that holds it beside the safetensors"
    raise UsageError(f"model {where!r}: no config.json in {str(folder)!r}; {mend}")


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # both of JSON and of UTF-8
        raise UsageError(f"{path}: not JSON ({_line(error)}); fetch the file again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); mend that first") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a JSON {type(content).__name__}, not an object; fetch the file again")
    return content


def _line(error: Exception) -> str:
    return one_line(error)[:120]


def _weight_map(folder: epath.Path, where: str, revision: str | None = None) -> dict[str, str] | None:
    """Each tensor's shard, as the index has it; None where one file holds all, which goes before an index."""
    if (folder / _SINGLE).exists():
        return None
    path = folder / INDEX
    if not path.exists():
        what = _other_weights(folder, revision)
        raise UsageError(f"model {where!r}: no safetensors weights in {str(folder)!r}{what}")
    shard_of = _read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UsageError(f"{path}: holds no 'weight_map' of tensors to files; fetch the file again")
    for name, shard in shard_of.items():
        # A name with a slash would lead out of the folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard:
            raise UsageError(
                f"{path}: puts tensor {name!r} into {shard!r}, no safetensors file beside it; fetch it again"
            )
    missing = sorted(shard for shard in set(shard_of.values()) if not (folder / shard).exists())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{path}: names the shard {missing[0]!r}{more}, not in that folder; fetch what is missing")
    return shard_of


def _other_weights(folder: epath.Path, revision: str | None) -> str:
    """What stands in the place of weights, with the mend."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if tensors := [path.name for path in found if path.suffix == ".safetensors"]:
        return f": {tensors[0]!r} is neither {_SINGLE!r} nor named by {INDEX!r}; fetch the index or rename the file"
    if gguf := [path.name for path in found if path.suffix == ".gguf"]:
        return f"; give the path of {gguf[0]!r} in it"
    if pickles := [path.name for path in found if path.suffix in _PICKLES]:
        return (
            f": {pickles[0]!r} is a pickle, which can run any code and is not read; load it in transformers and "
            "save_pretrained it as safetensors"
        )
    if revision is not None:  # all safetensors were fetched, and none of the rest
        return (
            ": the hub has none at this revision (and pickles are not read); load it in transformers and "
            "save_pretrained it as safetensors"
        )
    return f"; fetch {_SINGLE!r}, or the shards with {INDEX!r}"


def _read_shard(path: epath.Path) -> dict[str, _Stored]:
    """Map a safetensors file and read where its tensors lie, checked against the file's size."""
    try:
        size = path.stat().length
        content = np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); mend that first") from error
    if content[: len(_LFS_POINTER)].tobytes() == _LFS_POINTER:
        raise UsageError(f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` in that folder")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if start > 8 + _HEADER_LIMIT:
        raise UsageError(f"{path}: not a safetensors file (it begins with {content[:8].tobytes()!r}); fetch it again")
    if size < max(start, 8):
        raise UsageError(f"{path}: truncated: holds {size} bytes where its header alone takes {start}; fetch it again")
    try:
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        places = {name: _place(path, name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        # Each of them is a header that is JSON of another form, or no JSON.
        raise UsageError(f"{path}: its header is damaged ({_line(error)}); fetch the file again") from error
    end = start
    for name, (_, _, begin, length) in sorted(places.items(), key=lambda item: (item[1][2], item[1][3])):
        if start + begin != end:
            raise UsageError(f"{path}: its header leaves a gap or an overlap before tensor {name!r}; fetch it again")
        end += length
    if size != end:
        what = "truncated" if size < end else "damaged"
        raise UsageError(f"{path}: {what}: holds {size} bytes where its header wants {end}; fetch the file again")
    return {
        name: _Stored(shape, dtype, content[start + begin : start + begin + length])
        for name, (shape, dtype, begin, length) in places.items()
    }


def _place(path: epath.Path, name: str, entry: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype | None, int, int]:
    """Shape, dtype, first byte and number of bytes of one tensor of a header."""
    stored, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has shape {shape} and bytes {begin} to {end}")
    if stored not in _FLOATS and (stored not in _INTEGERS or name.endswith(".weight")):
        raise UsageError(
            f"{path}: tensor {name!r} is {stored}; weights are read as F32, F16 or BF16, so give a checkpoint of those"
        )
    dtype = _FLOATS.get(stored)
    width = dtype.itemsize if dtype is not None else _INTEGERS[stored]
    if end - begin != math.prod(shape) * width:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} in {stored} has {end - begin} bytes")
    return shape, dtype, begin, end - begin
