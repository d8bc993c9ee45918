"""Every family of pretrained models against transformers and torch, on tiny random checkpoints.

What torch computes stands in `hf_tiny`; here subjax reads the same files and must agree.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import hf_tiny
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from subjax.models.architecture import Rope
from subjax.models.hf_config import decoder_config_of
from subjax.models.hf_export import merged_weights
from subjax.models.network import Network, Params, network
from subjax.models.source import open_source
from subjax.models.weights import load
from subjax.parallel.mesh import make_mesh
from subjax.sample.sampler import Sampling, sample
from subjax.schema import Numerics
from subjax.train.losses import NextToken

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOLERANCE = 1e-4  # of logits of order 1, everywhere
COMPLETION = hf_tiny.LENGTH - max(hf_tiny.PADS) - 1  # targets that follow a valid token in every row

# Settings that a reading of the config could miss, one at a time: what the reference would then be.
MISREADINGS = {
    "gpt2": [dict(layer_norm_epsilon=1e-5), dict(activation_function="gelu")],
    "gpt_neox": [dict(layer_norm_eps=1e-5), dict(use_parallel_residual=False), dict(hidden_act="silu")],
    "gpt_neox-sequential": [dict(use_parallel_residual=True)],
    "llama": [dict(rms_norm_eps=1e-5)],
    "mistral": [dict(sliding_window=w) for w in (hf_tiny.WINDOW - 1, hf_tiny.WINDOW + 1, None)],
    "qwen2-window": [
        dict(sliding_window=hf_tiny.WINDOW - 1), dict(sliding_window=hf_tiny.WINDOW + 1),
        dict(layer_types=["full_attention"] * 3), dict(layer_types=["sliding_attention"] * 3),
        dict(layer_types=["full_attention"] * 2 + ["sliding_attention"]),
    ],
    "gemma2": [
        dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None), dict(query_pre_attn_scalar=16),
        dict(sliding_window=hf_tiny.WINDOW + 1), dict(layer_types=["full_attention"] * 3),
        dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        dict(hidden_activation="gelu"),
    ],
    "gemma3": [
        dict(query_pre_attn_scalar=16), dict(sliding_window=hf_tiny.WINDOW + 1),
        dict(layer_types=["sliding_attention"] * 4),
        dict(layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    ],
}  # fmt: skip
# The same for settings of rotary positions: where they stand in `rope_parameters`, and another value.
MISREAD_ROTATIONS = {
    "gpt_neox": [dict(rope_theta=10_000.0), dict(partial_rotary_factor=0.5)],
    "llama3": [
        dict(rope_type="default"), dict(rope_theta=10_000.0), dict(factor=4.0), dict(low_freq_factor=2.0),
        dict(high_freq_factor=3.0), dict(original_max_position_embeddings=hf_tiny.CONTEXT),
    ],
    "llama-biases": [dict(factor=1.0)],
    "smollm2": [dict(rope_theta=10_000.0)],
    "qwen2": [dict(rope_theta=10_000.0)],
    "gemma3": [
        dict(full_attention=dict(rope_type="linear", rope_theta=5000.0, factor=1.0)),
        dict(full_attention=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0)),
        dict(sliding_attention=dict(rope_type="default", rope_theta=5000.0)),
        dict(sliding_attention=dict(rope_type="linear", rope_theta=100.0, factor=4.0)),
    ],
}  # fmt: skip

# config.json of known checkpoints as they are published, less what concerns dropout, token ids and versions.
PUBLISHED = {
    "gpt2": dict(
        model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768, n_head=12,
        n_layer=12, n_positions=1024, vocab_size=50257,
    ),
    "pythia-160m": dict(
        model_type="gpt_neox", hidden_act="gelu", hidden_size=768, intermediate_size=3072, layer_norm_eps=1e-5,
        max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12, rotary_emb_base=10000,
        rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50304,
    ),
    "Llama-2-7b": dict(
        model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-5, rope_scaling=None,
        tie_word_embeddings=False, vocab_size=32000,
    ),
    "Llama-3.2-1B": dict(
        model_type="llama", attention_bias=False, head_dim=64, hidden_act="silu", hidden_size=2048,
        intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ), vocab_size=128256,
    ),
    "SmolLM2-135M": dict(
        model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=576, intermediate_size=1536,
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, num_attention_heads=9,
        num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
    ),
    "Mistral-7B-v0.1": dict(
        model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000,
    ),
    "Mistral-7B-v0.3": dict(
        model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, vocab_size=32768,
    ),
    "Qwen2.5-7B": dict(
        model_type="qwen2", hidden_act="silu", hidden_size=3584, intermediate_size=18944,
        max_position_embeddings=32768, max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=131072,
        tie_word_embeddings=False, use_sliding_window=False, vocab_size=152064,
    ),
    "Qwen3-0.6B": dict(
        model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2", attention_bias=False, attn_logit_softcapping=50.0, cache_implementation="hybrid",
        final_logit_softcapping=30.0, head_dim=256, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216, max_position_embeddings=8192,
        num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4, query_pre_attn_scalar=256,
        rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096, vocab_size=256000,
    ),
    "gemma-3-270m": dict(
        model_type="gemma3_text", _sliding_window_pattern=6, attention_bias=False, attn_logit_softcapping=None,
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=640,
        intermediate_size=2048, max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=18,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_local_base_freq=10000.0,
        rope_scaling=None, rope_theta=1000000.0, sliding_window=512, use_bidirectional_attention=False,
        vocab_size=262144,
    ),
    "gemma-3-1b": dict(
        model_type="gemma3_text", attention_bias=False, attn_logit_softcapping=None, cache_implementation="hybrid",
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26,
        num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, vocab_size=262144,
    ),
    "gemma-3-4b": dict(
        model_type="gemma3", mm_tokens_per_image=256,
        text_config=dict(
            hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
            rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024,
        ),
    ),
    "OLMo-2-0425-1B": dict(
        model_type="olmo2", attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=4096, num_attention_heads=16, num_hidden_layers=16, num_key_value_heads=16,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, vocab_size=100352,
    ),
}  # fmt: skip

# Rotary settings that a config.json has twice: by family, and what counts.
_LINEAR, _PLAIN = dict(rope_type="linear", factor=2.0), dict(rope_type="default", rope_theta=3e5)
ROTATIONS = [
    ("llama", dict(rope_parameters=_PLAIN, rope_scaling=_LINEAR), Rope(5e5, scaling="linear", factor=2.0)),
    ("llama", dict(rope_parameters=_PLAIN, rope_scaling=None), Rope(3e5)),
    ("llama", dict(rope_scaling={**_LINEAR, "rope_theta": 7e5}), Rope(7e5, scaling="linear", factor=2.0)),
    (
        "gemma3_text",
        dict(rope_parameters=dict(full_attention=_PLAIN, sliding_attention=_PLAIN), rope_scaling=_LINEAR),
        Rope(3e5, scaling="linear", factor=2.0),
    ),
    ("gemma3_text", dict(rope_scaling={**_LINEAR, "rope_theta": 7e5}), Rope(7e5, scaling="linear", factor=2.0)),
    ("gpt_neox", dict(rotary_emb_base=9e5, rotary_pct=0.5), Rope(9e5, 0.5)),
    (
        "gpt_neox",
        dict(rope_parameters=_PLAIN, rope_scaling=_LINEAR, rotary_emb_base=9e5),
        Rope(9e5, 0.25, "linear", 2.0),
    ),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One family's checkpoint, the reference over it, and what subjax makes of it."""

    family: str
    folder: Path
    model: torch.nn.Module
    logits: np.ndarray
    net: Network
    params: Params
    forward: Callable[..., jax.Array]


def _net(folder: Path) -> Network:
    return network(decoder_config_of(open_source(str(folder)).config, numerics=Numerics()))


def _params(folder: Path, net: Network) -> Params:
    return load(open_source(str(folder)), net)


@pytest.fixture(scope="module", params=hf_tiny.FAMILIES)
def checkpoint(request, tmp_path_factory) -> tuple[str, Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    hf_tiny.write(request.param, folder)
    return request.param, folder, hf_tiny.read(folder)


@pytest.fixture(scope="module")
def case(checkpoint) -> Case:
    family, folder, model = checkpoint
    net = _net(folder)
    return Case(
        family, folder, model, hf_tiny.logits(model, *hf_tiny.rows()), net, _params(folder, net), jax.jit(net.forward)
    )


def _tensors(net: Network, arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Parameters, or a gradient, fused and transposed as transformers has them; in float32."""
    return {name: weight.read() for name, weight in merged_weights(net, arrays).items()}


def _worst(actual: np.ndarray | jax.Array, expected: np.ndarray) -> float:
    """The largest difference of two sets of logits at valid positions."""
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - expected)[hf_tiny.rows()[1]].max())


def _assert_same_tensors(actual: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and every bit."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        bits = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(actual[name], np.asarray(bits), err_msg=name, strict=True)


def test_the_older_form_on_hubs_is_the_same_model_to_transformers(checkpoint, tmp_path):
    _, folder, model = checkpoint
    hf_tiny.as_on_hub(folder, tmp_path / "hub")
    old = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert not {"dtype", "rope_parameters"} & set(old)
    again = hf_tiny.read(tmp_path / "hub")
    np.testing.assert_array_equal(hf_tiny.logits(again, *hf_tiny.rows()), hf_tiny.logits(model, *hf_tiny.rows()))


def test_the_reference_would_show_a_setting_misread(checkpoint):
    """Each changes logits by more than ten times the tolerance: agreement below cannot be had without it."""
    family, folder, model = checkpoint
    exact, rope = hf_tiny.logits(model, *hf_tiny.rows()), getattr(model.config, "rope_parameters", None)
    rotations = [dict(rope_parameters={**rope, **change}) for change in MISREAD_ROTATIONS.get(family, [])]
    for change in MISREADINGS.get(family, []) + rotations:
        moved = _worst(hf_tiny.logits(hf_tiny.read(folder, **change), *hf_tiny.rows()), exact)
        assert moved > 10 * TOLERANCE, (change, moved)


def test_logits_agree_with_transformers(case):
    logits = case.forward(case.params, *hf_tiny.rows())
    assert logits.dtype == jnp.float32
    assert 0.5 < case.logits[hf_tiny.rows()[1]].std() < 2  # of order 1, so that the tolerance means something
    assert _worst(logits, case.logits) < TOLERANCE


def test_greedy_tokens_are_those_of_generate(case):
    tokens, valid = (a[:, : hf_tiny.PROMPT] for a in hf_tiny.rows())
    expected, margin = hf_tiny.greedy(case.model, tokens, valid)
    assert margin > 2 * TOLERANCE  # so logits that agree give the same tokens
    assert np.mean([len(set(row)) for row in expected.tolist()]) > 5  # not one token for ever
    # No token is the end: an id past the vocabulary.
    greedy = Sampling(hf_tiny.PROMPT, hf_tiny.NEW, end=hf_tiny.VOCAB, pad=hf_tiny.PAD, temperature=0.0)
    drawn = sample(case.net, case.params, tokens, sampling=greedy, key=jax.random.key(0), mesh=make_mesh())
    np.testing.assert_array_equal(drawn.tokens, expected)


def test_gradients_agree_with_torch(case):
    tokens, valid = hf_tiny.rows()
    loss, expected = hf_tiny.gradients(case.model, tokens, valid, COMPLETION)

    def objective(params):
        model = lambda t, v, tail: case.net.forward(params, t, v, tail=tail)  # noqa: E731
        return NextToken(COMPLETION)(model, dict(tokens=tokens, valid=valid))

    value, gradient = jax.jit(jax.value_and_grad(objective))(case.params)
    assert float(value) == pytest.approx(loss, abs=TOLERANCE)
    actual = _tensors(case.net, gradient)
    assert sorted(actual) == sorted(expected)
    apart = {n: np.linalg.norm(actual[n] - e) / np.linalg.norm(e) for n, e in expected.items()}
    assert max(apart.values()) < 1e-3, sorted(apart.items(), key=lambda item: -item[1])[:5]


def test_weights_come_back_bit_for_bit(case):
    _assert_same_tensors(_tensors(case.net, case.params), hf_tiny.stored(case.folder))


def test_bfloat16_weights_agree_with_float32_computed_from_them(case, tmp_path):
    hf_tiny.write(case.family, tmp_path / "half", dtype="bfloat16")
    stored = hf_tiny.stored(tmp_path / "half")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    expected = hf_tiny.logits(hf_tiny.read(tmp_path / "half"), *hf_tiny.rows())
    assert _worst(case.logits, expected) > 10 * TOLERANCE  # other weights than those in float32
    params = _params(tmp_path / "half", case.net)
    assert _worst(case.forward(params, *hf_tiny.rows()), expected) < TOLERANCE
    back = {n: t.astype(ml_dtypes.bfloat16) for n, t in _tensors(case.net, params).items()}
    _assert_same_tensors(back, stored)


def test_the_older_form_on_hubs_is_the_same_model(case, tmp_path):
    hf_tiny.as_on_hub(case.folder, tmp_path / "hub")
    assert _net(tmp_path / "hub").config == case.net.config
    params = _params(tmp_path / "hub", case.net)
    assert params.keys() == case.params.keys()
    for name, array in case.params.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3"])
def test_shards_are_the_same_model(family, tmp_path):
    hf_tiny.write(family, tmp_path / "whole")
    hf_tiny.write(family, tmp_path / "shards", shard="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    net = _net(tmp_path / "whole")
    assert _net(tmp_path / "shards") is net
    shards = _params(tmp_path / "shards", net)
    for name, array in _params(tmp_path / "whole", net).items():
        np.testing.assert_array_equal(shards[name], array, err_msg=name)


def test_gemma3_inside_a_model_that_reads_images_is_the_text_model(tmp_path):
    hf_tiny.write("gemma3", tmp_path / "text")
    hf_tiny.write_with_vision(tmp_path / "both")
    net = _net(tmp_path / "both")
    assert net is _net(tmp_path / "text")
    inner = "language_model."
    expected = {n.removeprefix(inner): t for n, t in hf_tiny.stored(tmp_path / "both").items() if n.startswith(inner)}
    assert 0 < len(expected) < len(hf_tiny.stored(tmp_path / "both"))
    _assert_same_tensors(_tensors(net, _params(tmp_path / "both", net)), expected)


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_rotary_settings_that_stand_twice_are_read_as_transformers_reads_them(case):
    kind, settings, expected = case
    config = {**PUBLISHED["SmolLM2-135M"], "model_type": kind, "rope_theta": 5e5, **settings}
    read = decoder_config_of(config, numerics=Numerics())
    assert read.rope == expected
    theirs = transformers.CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(config)))  # which writes into it
    assert read == decoder_config_of(theirs.to_dict(), numerics=Numerics())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(name):
    """Settings that a file leaves out included: transformers writes them all out, and counts the parameters."""
    theirs = transformers.CONFIG_MAPPING[PUBLISHED[name]["model_type"]].from_dict(PUBLISHED[name])
    config = decoder_config_of(PUBLISHED[name], numerics=Numerics())
    assert config == decoder_config_of(theirs.to_dict(), numerics=Numerics())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(theirs, "text_config", theirs))
    assert network(config).parameters == sum(p.numel() for p in model.parameters())
