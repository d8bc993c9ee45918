"""Checkpoints as sources: folders of safetensors that open, their digests, and every way in which they can be wrong."""

import json
import mmap
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjax.errors import SubjaxError, UsageError
from subjax.models import source
from subjax.models.source import Tensor, content_digest, open_source

CONFIG = {"model_type": "llama", "hidden_size": 4}
TENSORS = {
    "model.embed.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.norm.weight": np.array([1.5, -2.25, 0.5], ml_dtypes.bfloat16),
    "model.proj.weight": np.array([[1, 2], [3, 4]], np.float16),
    "scale": np.array(3.0, np.float32),
}
MASK = {"attn.mask": np.tril(np.ones((3, 3), bool)), "attn.positions": np.arange(3)}


def write_model(folder: pathlib.Path, *, sharded: bool = False) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("about")
    (folder / "trainer_state.json").write_text("{}")
    if not sharded:
        safetensors.numpy.save_file({**TENSORS, **MASK}, folder / "model.safetensors", {"format": "pt"})
        return folder
    names, weight_map = sorted(TENSORS), {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file({name: TENSORS[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def shards(tmp_path) -> pathlib.Path:
    return write_model(tmp_path / "model", sharded=True)


def refused(model, kind: type[SubjaxError] = UsageError) -> str:
    """The one line that refuses `model`."""
    with pytest.raises(SubjaxError) as error:
        open_source(str(model))
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def header_of(path: pathlib.Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def write_raw(path: pathlib.Path, header, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


# Folders


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_gives_its_config_and_its_tensors(tmp_path, sharded):
    folder = write_model(tmp_path / "model", sharded=sharded)
    opened = open_source(str(folder))
    assert opened.where == str(folder)
    assert opened.revision is None
    assert opened.config == CONFIG
    assert opened.tensors == {name: Tensor(array.shape, array.dtype.name) for name, array in TENSORS.items()}
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(opened.read(name), array, strict=True)
    weights = {path.name for path in folder.glob("model*")}
    assert set(opened.files) == {"config.json", "tokenizer.json"} | weights
    assert len(weights) == (3 if sharded else 1)
    assert all(path == epath.Path(folder) / name for name, path in opened.files.items())


def test_a_tensor_is_a_view_of_the_mapped_file(folder):
    opened = open_source(str(folder))
    for name in TENSORS:
        array = opened.read(name)
        assert not array.flags.writeable
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)


def test_one_file_goes_before_an_index(shards):
    safetensors.numpy.save_file({"only": np.ones(2, np.float32)}, shards / "model.safetensors")
    opened = open_source(str(shards))
    assert list(opened.tensors) == ["only"]
    assert set(opened.files) == {"config.json", "tokenizer.json", "model.safetensors"}


def test_bytes_that_lie_unaligned_are_read(folder):
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)
    assert (8 + len(text)) % 4 == 3
    write_raw(folder / "model.safetensors", text, np.array([1.0, -7.5], np.float32).tobytes())
    np.testing.assert_array_equal(open_source(str(folder)).read("x"), np.array([1.0, -7.5], np.float32))


def test_an_empty_tensor_is_read(folder):
    safetensors.numpy.save_file({"none": np.zeros((0, 4), np.float32)}, folder / "model.safetensors")
    assert open_source(str(folder)).read("none").shape == (0, 4)


def test_a_missing_folder_names_its_nearest_sibling(folder):
    said = refused(folder.parent / "modle")
    assert "no such folder" in said
    assert "did you mean 'model'?" in said
    deeper = refused(folder.parent / "modle" / "a" / "b")
    assert "has no 'modle', did you mean 'model'?" in deeper
    assert "did you mean" not in refused(folder.parent / "zzz")


def test_a_file_that_is_no_checkpoint_is_refused(folder):
    assert "neither a folder nor a .gguf file" in refused(folder / "config.json")
    assert "no such folder or file" in refused(folder / "absent.gguf")
    (folder / "bad.gguf").write_bytes(b"nonsense, not a model")
    assert "bad.gguf" in refused(folder / "bad.gguf")


@pytest.mark.parametrize("model", ["gs://bucket/model", "https://huggingface.co/org/name"])
def test_a_remote_path_is_refused(model):
    said = refused(model)
    assert repr(model) in said
    assert "local disk" in said


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)
    (folder / "q.gguf").touch()
    assert "give the path of 'q.gguf'" in refused(folder)
    (folder / "adapter_config.json").touch()
    assert "holds an adapter" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "JSON list"),
        (b"[" * 9999, "JSON"),
    ],
)
def test_a_bad_config_is_refused(folder, content, words):
    (folder / "config.json").write_bytes(content)
    said = refused(folder)
    assert str(folder / "config.json") in said
    assert words in said


def test_a_folder_without_weights_says_what_it_has_in_their_place(folder):
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    said = refused(folder)
    assert "'pytorch_model.bin' is a pickle" in said
    assert "save_pretrained" in said
    (folder / "q.gguf").touch()
    assert "give the path of 'q.gguf'" in refused(folder)
    (folder / "model-00001-of-00001.safetensors").touch()
    assert "neither 'model.safetensors' nor named by 'model.safetensors.index.json'" in refused(folder)


def test_a_quantized_checkpoint_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}))
    assert "quantized (gptq)" in refused(folder)
    write_raw(folder / "model.safetensors", {"x": entry("F8_E4M3", (8,))}, bytes(8))  # which is told before its dtype
    assert "quantized (gptq)" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "no 'weight_map'"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "'../model.safetensors'"),
        ('{"weight_map": {"x": "model.bin"}}', "'model.bin'"),
        ('{"weight_map": {"x": 3}}', "into 3"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_index_is_refused(shards, content, words):
    (shards / "model.safetensors.index.json").write_text(content)
    said = refused(shards)
    assert str(shards / "model.safetensors.index.json") in said
    assert words in said


def test_a_missing_shard_is_named(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert "names the shard 'model-00002-of-00002.safetensors', not in" in refused(shards)
    (shards / "model-00001-of-00002.safetensors").unlink()
    assert "names the shard 'model-00001-of-00002.safetensors' and 1 more" in refused(shards)


def test_a_tensor_that_is_not_in_its_shard_is_named(shards):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    said = refused(shards)
    assert "'model.extra.weight'" in said
    assert "'model-00002-of-00002.safetensors', which does not hold it" in said


def test_a_file_cut_anywhere_is_refused_with_its_numbers(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        said = refused(folder)
        assert f"{path}: truncated: holds {length} bytes" in said
        assert "fetch" in said
    assert f"where its header wants {len(whole)}" in said
    path.write_bytes(whole + b"\0")
    assert f"damaged: holds {len(whole) + 1} bytes where its header wants {len(whole)}" in refused(folder)


def test_files_of_another_kind_are_told(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert "git lfs pull" in refused(folder)
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    assert "not a safetensors file" in refused(folder)
    path.unlink()
    path.mkdir()
    assert "cannot be read" in refused(folder)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not json", "header is damaged"),
        ([1, 2], "header is damaged"),
        ({"x": 5}, "header is damaged"),
        ({"x": {"dtype": "F32"}}, "header is damaged"),
        ({"x": entry(dtype=["F32"])}, "header is damaged"),
        ({"x": entry(shape=(3,))}, "tensor 'x' of shape [3] in F32 has 8 bytes"),
        ({"x": entry(dtype="BF16")}, "tensor 'x' of shape [2] in BF16 has 8 bytes"),
        ({"x": entry(shape=(-2,), offsets=(8, 0))}, "tensor 'x'"),
        ({"x": entry(shape=(1.0, 2))}, "tensor 'x'"),
        ({"x": entry(offsets=(0, 4, 8))}, "header is damaged"),
        ({"x": entry(offsets=(4, 12))}, "gap or an overlap before tensor 'x'"),
        ({"x": entry(), "y": entry()}, "gap or an overlap before tensor 'y'"),
        ({"x": entry(shape=(4,), offsets=(0, 16))}, "truncated: holds"),
        ({"x": entry("F8_E4M3", (8,))}, "tensor 'x' is F8_E4M3"),
        ({"x": entry("F64", (1,))}, "tensor 'x' is F64"),
        ({"x.weight": entry("I8", (8,))}, "tensor 'x.weight' is I8"),
        ({"mask": entry("I64", (1,))}, "no weights"),
        ({}, "damaged: holds"),
    ],
)
def test_a_bad_header_is_refused(folder, header, words):
    write_raw(folder / "model.safetensors", header, bytes(8))
    assert words in refused(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_byte_of_the_header_ends_in_one_line_or_in_other_names(folder, data):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    at = data.draw(st.integers(0, 8 + int.from_bytes(whole[:8], "little") - 1))
    damaged = bytearray(whole)
    damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        opened = open_source(str(folder))
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert all(opened.read(name).shape == tensor.shape for name, tensor in opened.tensors.items())
    finally:
        path.write_bytes(whole)


# Digests


def test_the_digest_is_of_names_and_contents_and_not_of_the_place(folder, tmp_path):
    digest = content_digest(open_source(str(folder)))
    copy = pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text("other words")
    assert content_digest(open_source(str(copy))) == digest

    (copy / "tokenizer.json").write_text("[]")
    changed = content_digest(open_source(str(copy)))
    assert changed != digest
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    assert content_digest(open_source(str(copy))) not in (digest, changed)


def test_the_digest_sees_weights_written_again_at_one_size(folder):
    path = folder / "model.safetensors"
    before, status = content_digest(open_source(str(folder))), path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert content_digest(open_source(str(folder))) != before


def test_a_file_is_hashed_once_in_a_process(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(source, "sha256_file", lambda path: hashed.append(path.name) or "0")
    for _ in range(2):
        content_digest(open_source(str(folder)))
    assert sorted(hashed) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_lone_file_keeps_its_digest_under_another_name(tmp_path):
    class OneFile:
        where, revision = "x.gguf", None

        def __init__(self, path):
            self.files = {path.name: path}

    paths = [epath.Path(tmp_path) / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for path, content in zip(paths, ("same", "same", "other"), strict=True):
        path.write_text(content)
    one, two, other = (content_digest(OneFile(path)) for path in paths)
    assert one == two != other
