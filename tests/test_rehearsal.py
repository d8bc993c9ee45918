"""A plan rehearsed: its jobs, what it says of memory beside what is run, what does not fit, and its words."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rehearsed
from etils import epath

from subjax import config, study
from subjax.errors import UsageError
from subjax.models.hf_config import decoder_config_of
from subjax.models.network import network
from subjax.models.published import names, published_config
from subjax.parallel.topology import described_mesh, missing, parse_topology
from subjax.rehearsal import plans, table
from subjax.rehearsal.figures import Figures, figures, model_flops, refused
from subjax.rehearsal.fit import Remedy, estimate, what_would_fit, with_rows
from subjax.rehearsal.jobs import Job, jobs
from subjax.rehearsal.programs import Sampling, Training
from subjax.roofline import Work, roofline
from subjax.run import node_record
from subjax.sample import sampler
from subjax.schema import Numerics, Tuning
from subjax.stages import execution
from subjax.store import Store
from subjax.study_bases import architecture_of
from subjax.train import trainer

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
    assert [(job.nodes, job.calls) for job in found.values()] == [(1, 33), (2, 42), (2, 2), (2, 16)]
    assert [t.name for t in found["teacher"].spec.terms] == ["preferences", "numbers"]
    assert [(t.rows, t.length, t.tail) for t in found["student"].spec.terms] == [(16, 29, 16), (24, 14, 1)]
    assert found["base"].spec.tuning.kind == "full"
    assert found["corpus"].spec.rows == 2000


def test_a_study_of_published_weights_needs_none(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus, student = planned(PAPER)
    assert corpus.kind == "corpus"
    assert isinstance(corpus.spec, Sampling)
    assert (corpus.spec.rows, corpus.spec.sampling.prompt, corpus.spec.sampling.completion) == (512, 96, 64)
    assert corpus.spec.weights_dtype == corpus.spec.sampling.cache_dtype == "bfloat16"
    assert isinstance(student.spec, Training)
    assert student.spec.tuning == Tuning(kind="lora")
    assert student.spec.terms[0].arrays[0] == ("tokens", (66, 160), "int32")
    assert student.calls == 3 * -(-30_000 // 66)  # three students, three epochs of 10,000 rows in batches of 66
    assert network(student.spec.config).parameters == 7_615_616_512
    assert student.assumed == corpus.assumed == "prompts of 96 tokens"


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


def test_memory_is_that_of_the_step_that_is_run_on_a_mesh():
    """Four virtual devices, fsdp:2 and tensor:2; the plan's own batch, laid out as the fit's."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    ran = subprocess.run(
        [sys.executable, "tests/rehearsed.py"], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["predicted"] == pytest.approx(found["ran"], rel=0.1)
    assert found["described"] == found["batch"]
    assert found["steps"] == 20


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
    assert refused(message, 7) == (int(104.79 * GIB) + 7, int(15.75 * GIB))
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 159.94G of 15.75G hbm. Exceeded by 144G."
    assert refused(older, 7) == (int(159.94 * GIB), int(15.75 * GIB))
    assert refused("RESOURCE_EXHAUSTED: something else", 7) == (0, 0)


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
    """Of 160 GiB with all weights (14.2 GiB, bfloat16) whole on each of 16 devices, 145.8 are activations."""
    job = planned(PAPER, "student.batch=64")[1]
    whole, spread = (16, 1, 1), (1, 16, 1)
    before = failed(job, 160, 15.75)
    weights = network(job.spec.config).parameters * 2
    assert estimate(job.spec, whole, job.spec, whole, before) == pytest.approx(160 * GIB, rel=1e-6)
    assert estimate(job.spec, spread, job.spec, whole, before) == pytest.approx(160 * GIB - weights * 15 / 16, rel=1e-6)
    half = with_rows(job.spec, 32)
    assert half.terms[0].arrays[0] == ("tokens", (32, 160), "int32")
    fewer = weights + (160 * GIB - weights) / 2
    assert estimate(half, whole, job.spec, whole, before) == pytest.approx(fewer, rel=1e-6)


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
    """LoRA on Qwen2.5-7B: 4N + adapters of the 64 x 159 tokens that go in; of the output matrix, of the tail alone."""
    spec = planned(PAPER, "student.batch=64")[1].spec
    flops = sum(model_flops(spec, "step")[0].values())
    matrices = spec.config.matrices - spec.config.vocab * spec.config.width
    tokens, late = 64 * 159, 64 * 64
    assert flops == pytest.approx(4 * (tokens * matrices + late * spec.config.vocab * spec.config.width), rel=0.04)


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
        (["--topology=cpu:1", "--mesh=fsdp:2"], "mesh fsdp:2 has 2 devices and cpu:1 has 1"),
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
