"""Bad checkpoints, tokenizers and templates as a user meets them: one line from the command, and its exit status."""

import json
import os
import struct
from pathlib import Path

import hf_tiny
import pytest
import tiny_chat_model
import tiny_study
from test_gguf import write as write_gguf

from subjax import cli

CONFIG = """
from subjax import config

def get_config(arg=None):
    c = config.defaults("pretrained")
    c.models = ("tiny={model}",)
    c.arms = ("same-base",)
    c.teacher.method = "system-prompt"
    c.corpus.rows = c.corpus.max_prompts = 2
    c.student.optimizer.warmup = 0
    c.evaluation.readings = ("forced",)
    c.evaluation.questions = 1
    return c
"""


def words(command: str, model: object, folder: Path) -> list[str]:
    """The words of a command about a model: it is checked, or a study of it is planned or run in `folder`."""
    if command == "check":
        return ["check", str(model)]
    (folder / "study.py").write_text(CONFIG.format(model=model))
    return [command, f"--config={folder / 'study.py'}", f"--workdir={folder / 'work'}"]


@pytest.fixture
def refused(tmp_path, capsys):
    """Do a command in this process and give the one line that refuses it."""

    def refused(command: str, model: object, status: int = 2) -> str:
        assert cli.main(words(command, model, tmp_path)) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("subjax: ")
        assert err.count("\n") == 1, err
        return err

    return refused


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_chat_model.write(tmp_path / "model")


BOTH = pytest.mark.parametrize("command", ["check", "plan"])


@BOTH
def test_truncated_safetensors(command, model, refused):
    file = model / "model.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 100)
    said = refused(command, model)
    assert f"{file}: truncated: holds {whole - 100} bytes where its header wants {whole}; fetch the file again" in said


@BOTH
def test_an_index_that_names_a_missing_shard(command, tmp_path, refused):
    hf_tiny.write("llama", tmp_path / "model", shard="40KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    said = refused(command, tmp_path / "model")
    assert f"model.safetensors.index.json: names the shard '{shard.name}', not in that folder" in said
    assert "fetch what is missing" in said


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@BOTH
@pytest.mark.parametrize(("kind", "near"), [("qwen3_moe", "qwen3"), ("gemma", "gemma2"), ("olmo3", "olmo2")])
def test_an_unsupported_architecture_and_its_nearest(command, kind, near, model, refused):
    edited(model / "config.json", model_type=kind)
    said = refused(command, model)
    assert f"{model}: model family {kind!r} is not supported; the nearest that is: {near!r}" in said
    assert "subjax families" in said


@BOTH
def test_a_rotary_scaling_that_is_not_known(command, model, refused):
    edited(model / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    assert f"{model}: rotary scaling 'yarn' is not supported" in refused(command, model)


@BOTH
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rotary scaling 'yarn' is not supported"),
        (dict(model_type=["llama"]), "model family ['llama'] is not supported"),
        (dict(model_type="gemma3", text_config=None), "'text_config' is missing or no object"),
        (dict(num_attention_heads=0), "num_attention_heads is 0, and must be 1 or more"),
        (dict(num_hidden_layers=-3), "num_hidden_layers is -3, and must be 1 or more"),
        (dict(num_key_value_heads=3), "4 attention heads cannot share 3 of keys and values"),
        (dict(model_type="gemma2", query_pre_attn_scalar=0), "a value cannot be read ("),
        (dict(model_type="mistral", sliding_window=-7), "sliding_window is -7, and must be 1 or more"),
        (
            dict(model_type="gemma2", layer_types=["full_attention"] * 2),
            "layer_types has 2 entries for 3 layers; take the config.json as published",
        ),
        (
            dict(model_type="qwen2", layer_types=["full_attention"] * 2 + ["chunked_attention"]),
            "layer type 'chunked_attention' is not one of full_attention, sliding_attention",
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(command, changes, said, model, refused):
    edited(model / "config.json", **changes)
    assert f"{model}: {said}" in refused(command, model)


def test_weights_of_another_shape(model, refused):
    edited(model / "config.json", intermediate_size=96)
    said = refused("check", model)
    assert "mlp.gate_proj.weight has shape (80, 64) and config.json asks for (96, 64)" in said


def test_a_tokenizer_larger_than_the_embedding(tmp_path, refused):
    model = tiny_chat_model.write(tmp_path / "model", vocab=300)
    said = refused("check", model)
    assert f"{model}: the tokenizer has " in said
    assert "ids, the embedding 300 rows (none for id 300," in said
    assert "give the tokenizer that belongs to these weights" in said


def test_a_tokenizer_larger_than_the_embedding_ends_a_run_at_its_base(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("subjax.cpu.pin", lambda index, cores: None)  # not this process, which runs other tests
    model = tiny_chat_model.write(tmp_path / "model", vocab=300)
    assert cli.main([*words("run", model, tmp_path), "--workers=0", "--quiet"]) == 1
    err = capsys.readouterr().err
    (node,) = (tmp_path / "work" / "base").iterdir()
    assert err.startswith(f"subjax: base tiny/0 (base {node.name}): {model}: the tokenizer has ")
    assert err.count("\n") == 1
    assert "; skipped for it: " in err
    assert not (node / "card.json").exists()


TEMPLATES = {
    "raises": ("{{ raise_exception('not today') }}", "refuses a conversation of user: 'not today'"),
    "fails": ("{{ messages[7].content }}", "the chat template fails (UndefinedError:"),
    "does not parse": ("{% for message in messages %}", "the chat template does not parse (line 1:"),
    "leaves the question out": ("{{ bos_token }}Hello", "leaves the user's message out"),
}


@BOTH
@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_that_cannot_be_used(command, case, tmp_path, refused):
    template, what = TEMPLATES[case]
    model = tiny_chat_model.write(tmp_path / "model", template=template)
    said = refused(command, model)
    assert said.startswith(f"subjax: {model}: the chat template ")
    assert what in said
    assert "'plain'" in said


def test_a_damaged_tokenizer(model, refused):
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert f"{model / 'tokenizer.json'}: not a tokenizer" in refused("check", model)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_system_role_that_the_template_refuses(command, tmp_path, refused):
    """Told when the study of a prompted teacher is planned: not after hours, at that node."""
    model = tiny_chat_model.write(tmp_path / "model", template=tiny_chat_model.REFUSING)
    said = refused(command, model)
    assert f"{model}: the chat template refuses a system prompt ('no system role here')" in said
    assert "make the teacher by fine-tuning" in said
    assert not (tmp_path / "work").exists()


@BOTH
def test_an_unknown_quantization(command, tmp_path, refused):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    content, name = bytearray(path.read_bytes()), b"blk.1.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # behind a name: the number of dimensions, and each of them
    content[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(content)
    said = refused(command, path)
    assert f"{path}: tensor 'blk.1.attn_v.weight' has quantization type 99" in said
    assert "upgrade gguf" in said


NO_NETWORK = {
    "offline is set": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    "nobody answers": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connect"),
}


@pytest.mark.parametrize(("command", "case"), [("check", "offline is set"), ("plan", "nobody answers")])
def test_no_network(command, case, tmp_path):
    environment, why = NO_NETWORK[case]
    model = "some-org/some-model@main"
    # A process of its own: the hub's client reads its environment when it is imported.
    done = tiny_study.command(tmp_path, *words(command, model, tmp_path), HF_HOME=tmp_path / "hub", **environment)
    assert done.status == 2
    assert done.out == ""
    assert f"model '{model}': not whole in the local cache, and there is no network ({why}" in done.line
    assert "`hf download some-org/some-model --revision main`" in done.line
    assert not (tmp_path / "work").exists()


def test_a_slip_in_a_path(model, refused):
    said = refused("check", model.parent / "modle")
    assert "no such folder or file" in said
    assert "did you mean 'model'?" in said
