"""A GGUF file as a source of a model: config, names and layout as Hugging Face's, tensors dequantized one at a time."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from subjax.errors import UsageError
from subjax.models.gguf_config import config_of
from subjax.models.gguf_header import Header, StoredTensor, read_header
from subjax.models.gguf_names import Place, places
from subjax.models.source import Tensor

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_AT_A_TIME = 1 << 18  # values dequantized at a time: what the library needs beside its result stays in the cache


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """The `Source` of one GGUF file. The file stays mapped while the source or an array from `read` lives."""

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, epath.Path]
    header: Header = dataclasses.field(repr=False)
    places: Mapping[str, Place] = dataclasses.field(repr=False)
    revision: str | None = None

    def read(self, name: str) -> np.ndarray:
        """One tensor in Hugging Face's layout: float32 where it was quantized, else in its own dtype.

        A tensor that is neither quantized nor changed by the converter is a read-only view of the mapped file; any
        other is made anew, with little beside the result in memory. Raises KeyError for a name not in `tensors`.
        """
        place = self.places[name]
        stored = self.header.tensors[place.stored]
        values = _values(self.header, stored, _row_order(place, stored.shape[0]))
        if place.change == "transposed":
            return values.T
        if place.change == "raised":
            return values.astype(np.float32) - np.float32(1)
        return values

    def tokenizer_fields(self) -> dict[str, Any]:
        """The tokenizer's metadata as plain Python; a value that the file lacks is None.

        Its keys:
            model: str, "gpt2" (byte-level BPE by `merges`) or "llama" (SentencePiece pieces by `scores`)
            pre: str, llama.cpp's name of the split into words ("smollm", "qwen2", "llama-bpe", "default", ...)
            tokens: list[str] by id; byte-level BPE's in its own alphabet ("Ġthe"), SentencePiece's with "▁" and
                "<0x0A>"
            token_types: list[int] by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
            scores: list[float] by id
            merges: list[str], "left right", the first merge first
            bos_token_id, eos_token_id, eot_token_id, pad_token_id, unk_token_id: int
            add_bos, add_eos: bool, whether an encoding begins and ends with these tokens
            add_space_prefix: bool, whether a space is put before the text
            chat_template: str, in Jinja

        Raises:
            UsageError: the file has no tokenizer.
        """
        return _tokenizer_fields(self.header.metadata, self.where)


def open_gguf(path: epath.Path, where: str) -> GgufSource:
    """Open the GGUF file at `path`; messages call it `where`. No tensor is read, a vocabulary of 262,144 takes 0.3 s.

    Raises:
        UsageError: the file is missing, no GGUF file, truncated or damaged; its architecture, a type of its tensors, a
            tensor or a setting is not supported, or missing. One line that names the file, the fault and the mend.
    """
    header = read_header(path, where)
    config = config_of(header, where)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    heads = config.get("num_attention_heads") or config["n_head"]
    kv_heads = config.get("num_key_value_heads", heads)
    found = places(header.metadata["general.architecture"], header.tensors, layers, heads, kv_heads, where)
    return GgufSource(
        where=where,
        config=MappingProxyType(config),
        tensors=MappingProxyType({name: _tensor(place, header.tensors[place.stored]) for name, place in found.items()}),
        files=MappingProxyType({path.name: path}),
        header=header,
        places=MappingProxyType(found),
    )


def _tokenizer_fields(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    keys = {
        "model": "model",
        "pre": "pre",
        "tokens": "tokens",
        "token_types": "token_type",
        "scores": "scores",
        "merges": "merges",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "eot_token_id": "eot_token_id",
        "pad_token_id": "padding_token_id",
        "unk_token_id": "unknown_token_id",
        "add_bos": "add_bos_token",
        "add_eos": "add_eos_token",
        "add_space_prefix": "add_space_prefix",
    }
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    if not isinstance(found["model"], str) or not isinstance(found["tokens"], list):
        raise UsageError(
            f"{where}: this GGUF file has no tokenizer (tokenizer.ggml.model and .tokens); take one converted with it"
        )
    return found | {"chat_template": metadata.get("tokenizer.chat_template")}


def _tensor(place: Place, stored: StoredTensor) -> Tensor:
    plain = _PLAIN.get(stored.kind.name)
    shape = stored.shape[::-1] if place.change == "transposed" else stored.shape
    return Tensor(shape, plain.name if plain and place.change != "raised" else "float32")


def _row_order(place: Place, rows: int) -> np.ndarray | None:
    """For each of Hugging Face's rows, the stored row that it is."""
    numbers = np.arange(rows)
    if place.change == "rotary":  # stored as (head, pair, which of the pair)
        return numbers.reshape(place.heads, -1, 2).swapaxes(1, 2).ravel()
    if place.change == "thirds":  # stored as (query, key or value, head, row of the head)
        return numbers.reshape(3, place.heads, -1).swapaxes(0, 1).ravel()
    return None


def _values(header: Header, stored: StoredTensor, order: np.ndarray | None) -> np.ndarray:
    """A stored tensor's values, its rows in `order`: reordered while they are quantized, and small."""
    import gguf

    plain = _PLAIN.get(stored.kind.name)
    dtype = np.dtype(np.uint8) if plain is None else plain
    flat = np.frombuffer(header.data, dtype, stored.size // dtype.itemsize, stored.offset)
    raw = flat if order is None else flat.reshape(stored.shape[0], -1)[order]
    if plain is not None:
        return raw.reshape(stored.shape)
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored.kind]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), block), np.float32)
    step = max(1, _AT_A_TIME // block)
    for begin in range(0, len(blocks), step):
        some = blocks[begin : begin + step]
        out[begin : begin + step] = gguf.dequantize(some.reshape(1, -1), stored.kind).reshape(-1, block)
    return out.reshape(stored.shape)
