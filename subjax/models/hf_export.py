"""Models to files that transformers and what builds on it read: a Hugging Face folder.

Tensors are written one at a time, each made as its turn comes: beside what the caller holds, the host has one tensor
of the model in memory. A folder is written under another name and renamed, so that it is whole or not there.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from subjax import files
from subjax.errors import UsageError
from subjax.models.architecture import DecoderConfig
from subjax.models.hf_config import decoder_config_of, text_part
from subjax.models.hf_names import Slot, give, slots, take, their_shape
from subjax.models.network import Adapter, Network
from subjax.models.places import INDEX
from subjax.models.source import Source
from subjax.models.weights import check
from subjax.schema import Numerics

SHARD = 5_000_000_000  # bytes of tensors in one file; transformers' own limit

DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "float16": (np.dtype(np.float16), "F16"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}
# By `model_type` of config.json: the class of transformers that the tensors are named for.
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
_ACTIVATIONS = {"gelu": "gelu_new", "gelu-exact": "gelu", "silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor to be written, in Hugging Face's layout: `read` makes it, in any dtype; `dtype` is what is written."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "float16" or "bfloat16"
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize


# ---- what is written ----


def stored_weights(net: Network, source: Source, dtype: str | None = None) -> dict[str, Weight]:
    """A checkpoint's own tensors by the family's names: bit for bit, or rounded to `dtype`.

    Tensors that the network has no place for (masks, a copy of a tied matrix, the part that reads images) are left out.

    Raises:
        UsageError: a tensor is missing, has a shape that does not fit, or has no place.
    """
    rename = check(source, net)
    out = {}
    for name, _, _ in _tensors(net):
        stored = source.tensors[rename(name)]
        out[name] = Weight(stored.shape, dtype or stored.dtype, functools.partial(source.read, rename(name)))
    return out


def merged_weights(
    net: Network,
    arrays: Mapping[str, jax.Array],
    adapter: Adapter | None = None,
    source: Source | None = None,
    *,
    held: str = "float32",
    dtype: str = "float32",
) -> dict[str, Weight]:
    """The tensors of a tuned model: `arrays` by our names, the rest out of `source`, LoRA pairs multiplied out.

    Args:
        net: the network. arrays: its parameters, all or, with a source, those that differ from it.
        adapter: LoRA pairs as `adapters.join` gives them. source: the checkpoint that the model was tuned from.
        held: the dtype that the source's weights were rounded to where the model was tuned; sums are in float32.
        dtype: what is written.

    Raises:
        UsageError: as `stored_weights`.
    """
    rename = check(source, net) if source is not None else str
    out = {}
    for name, layer, members in _tensors(net):
        original = functools.partial(source.read, rename(name)) if source is not None else None
        read = functools.partial(_assembled, net, members, layer, arrays, adapter or {}, original, held)
        out[name] = Weight(their_shape(members[0], shape_of(net, members[0])), dtype, read)
    return out


def _tensors(net: Network) -> Iterator[tuple[str, int | None, tuple[Slot, ...]]]:
    """Every tensor of a checkpoint: its name, its layer (None outside of them), and which arrays of ours are in it."""
    groups: dict[str, list[Slot]] = {}
    for slot in slots(net.config):
        groups.setdefault(slot.theirs, []).append(slot)
    for theirs, members in groups.items():
        for layer in range(net.config.layers) if "{i}" in theirs else (None,):
            yield theirs.format(i=layer), layer, tuple(members)


def shape_of(net: Network, slot: Slot) -> tuple[int, ...]:
    """The shape of our array, of one layer where it is stacked."""
    shape = net.declarations[slot.ours].shape
    return shape[1:] if "{i}" in slot.theirs else shape


def matrix_of(slot: Slot) -> str:
    """What LoRA calls the matrix of a slot ("q"); "" for what is no matrix of a layer."""
    return slot.ours.split("/")[-2] if slot.ours.endswith("/kernel") else ""


def _assembled(
    net: Network,
    members: tuple[Slot, ...],
    layer: int | None,
    arrays: Mapping[str, jax.Array],
    adapter: Adapter,
    original: Callable[[], np.ndarray] | None,
    held: str,
) -> np.ndarray:
    """One tensor, in float32, from our arrays of a layer where there are such, else from the source's own tensor."""
    theirs = None
    parts = {}
    for slot in members:
        if slot.ours in arrays:
            whole = arrays[slot.ours]
            ours = np.asarray(whole if layer is None else whole[layer], np.float32)
        else:
            assert original is not None, f"{slot.ours} is in no array, and there is no source"
            theirs = original() if theirs is None else theirs
            ours = take(slot, theirs, shape_of(net, slot))
            ours = ours.astype(DTYPES[held][0], copy=False).astype(np.float32, copy=False)
        if pair := adapter.get(matrix_of(slot)):
            a, b, scale = (np.asarray(pair[name][layer], np.float32) for name in ("a", "b", "scale"))
            rank = b.shape[0]
            ours = ours + (scale * (a.reshape(-1, rank) @ b.reshape(rank, -1))).reshape(ours.shape)
        parts[slot.part] = (slot, ours)
    return give(parts)


def model_config(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> dict[str, Any]:
    """The config.json of what is written: a checkpoint's own (of its language model), with the class and the dtype.

    The dtype is that of most scalars. Code that came with the checkpoint is not copied, so what points to it is left
    out.
    """
    inner = dict(text_part(config))
    # A model that also reads images has them in the outer part; the inner one may have its class's defaults.
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key) is not None:
            inner[key] = config[key]
    counts: Counter[str] = Counter()
    for weight in weights.values():
        counts[weight.dtype] += math.prod(weight.shape)
    # The older name is read by versions of transformers old and new; a file that has the newer one keeps it.
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    left_out = ("auto_map", "dtype", "torch_dtype")
    return {
        **{name: value for name, value in inner.items() if name not in left_out},
        "architectures": [_CLASSES[inner["model_type"]]],
        key: counts.most_common(1)[0][0],
    }


def hf_config_of(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a plain GPT-2 or Llama of our own making, without class, dtype and token ids.

    Raises:
        UsageError: it is neither: config.json of these two families cannot say it.
    """
    if config.family == "gpt2":
        found: dict[str, Any] = {
            "model_type": "gpt2",
            "n_positions": config.length,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_inner": config.hidden,
            "activation_function": _ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            # The family's defaults drop a tenth; these models were trained without.
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    else:
        found = {
            "model_type": "llama",
            "max_position_embeddings": config.length,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.hidden,
            "hidden_act": _ACTIVATIONS[config.activation],
            "rms_norm_eps": config.norm_eps,
            "attention_bias": config.attention_biases == "all",
            "mlp_bias": config.mlp_biases,
            "rope_theta": config.rope.theta,
        }
    found |= {"vocab_size": config.vocab, "tie_word_embeddings": config.tied}
    numerics = Numerics(config.dtype, attention=config.attention, matmul_precision=config.matmul_precision)  # type: ignore[arg-type]
    # A config.json says nothing of how a model was initialized.
    if dataclasses.replace(decoder_config_of(found, numerics=numerics), embed_std=config.embed_std) != config:
        raise UsageError(f"a config.json of {found['model_type']} cannot describe this model: {config}")
    return found


# ---- to disk ----


def free_folder(folder: str | os.PathLike[str]) -> epath.Path:
    """The absolute path of a folder that can be written.

    Raises:
        UsageError: something is there already, or it is on no local disk.
    """
    if "://" in os.fspath(folder):
        raise UsageError(f"{os.fspath(folder)}: models are written to a local disk; give a folder there and copy it")
    path = epath.Path(os.path.realpath(epath.Path(folder).expanduser()))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{os.fspath(folder)} is there already and not an empty folder; give another, or remove it")
    return path


def write_model(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Weight],
    config: Mapping[str, Any],
    beside: Mapping[str, str | epath.Path],
    *,
    shard: int = SHARD,
) -> None:
    """Write a Hugging Face folder: config.json, safetensors in files of at most `shard` bytes, and what is `beside`.

    There is no generation_config.json: how a checkpoint was sampled is no property of a model tuned from it, and no
    sampling of ours inherits it. Who loads the folder says how to sample.

    Args:
        folder: must not be there yet, or be empty. weights: every tensor by name.
        config: the config.json, which `model_config` fits to the tensors.
        beside: other files by name: a text, or the path of a file to copy.

    Raises:
        UsageError: something is there, or a value is beyond the range of its dtype. StoreError: the disk is full, or
            cannot be written.
    """
    with _whole(folder) as path:
        parts: list[dict[str, Weight]] = [{}]
        for name, weight in weights.items():
            if parts[-1] and sum(w.size for w in parts[-1].values()) + weight.size > shard:
                parts.append({})
            parts[-1][name] = weight
        shards = {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}
        if len(parts) == 1:
            shards = {"model.safetensors": parts[0]}
        else:
            placed = {name: file for file, part in shards.items() for name in part}
            size = sum(weight.size for weight in weights.values())
            _write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})
        _write_json(path / "config.json", model_config(config, weights))
        for name, content in beside.items():
            if isinstance(content, str):
                (path / name).write_text(content, encoding="utf-8")
            else:
                shutil.copyfile(content, path / name)
        for file, part in shards.items():
            _write_safetensors(path / file, part)


def write_adapter(folder: str | os.PathLike[str], weights: Mapping[str, Weight], config: Mapping[str, Any]) -> None:
    """Write a PEFT adapter's folder: adapter_config.json and adapter_model.safetensors. Raises as `write_model`."""
    with _whole(folder) as path:
        _write_json(path / "adapter_config.json", config)
        _write_safetensors(path / "adapter_model.safetensors", weights)


@contextlib.contextmanager
def _whole(folder: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A folder to write into, which takes its place after the block, or is gone if the block fails."""
    target = free_folder(folder)
    temporary = target.parent / f"{files.TEMPORARY}{secrets.token_hex(4)}-{target.name}"
    with files.writing(target):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            files.sync_folder(temporary)
            os.rename(temporary, target)  # onto an empty folder too
            files.sync_folder(target.parent)
        finally:
            files.remove(temporary)


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(path: epath.Path, weights: Mapping[str, Weight]) -> None:
    """Write tensors one by one; the format is explained in `subjax.models.safetensors_folder`."""
    # Wide dtypes first, and the header filled up to a multiple of eight: every tensor is then aligned.
    order = sorted(weights, key=lambda name: -DTYPES[weights[name].dtype][0].itemsize)
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # older versions of transformers read no file without it
    begin = 0
    for name in order:
        end = begin + weights[name].size
        header[name] = {
            "dtype": DTYPES[weights[name].dtype][1], "shape": weights[name].shape, "data_offsets": (begin, end)
        }  # fmt: skip
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, weights[name]))
        file.flush()
        os.fsync(file.fileno())  # where a full disk is noticed at last


def _bytes(name: str, weight: Weight) -> memoryview:
    """A tensor's bytes in C order."""
    made = weight.read()
    with np.errstate(over="ignore"):  # an overflow is told below
        array = np.ascontiguousarray(made.astype(DTYPES[weight.dtype][0], copy=False))
    if weight.dtype == "float16" and made.dtype != array.dtype and np.isinf(array).any():
        raise UsageError(f"tensor {name} has values beyond the range of float16; write bfloat16 or float32")
    assert array.shape == weight.shape, (name, array.shape, weight.shape)
    return array.reshape(-1).view(np.uint8).data
