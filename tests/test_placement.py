"""The table before a run: what each part of a model is split over and takes, against figures made by hand."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from subjax import config, placement, study
from subjax.config import to_dict
from subjax.models.families import decoder_config
from subjax.models.network import network
from subjax.parallel.axes import AXES
from subjax.parallel.mesh import make_mesh
from subjax.schema import Numerics, Optimizer, Tuning
from subjax.stages.models import world_network

MESH = jax.sharding.AbstractMesh((1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
FLOAT = 4
ADAM = Optimizer(name="adamw")


@pytest.fixture(scope="module")
def model() -> placement.Model:
    """A gpt of width 16, 2 layers, 2 heads of 8, hidden 32, 171 words and 30 places: 7,696 parameters."""
    return placement.Model("gpt nano", world_network("gpt", "nano", to_dict(Numerics())), "float32")


def test_parts_in_training(model):
    found = placement.trained_parts(model, MESH, placement.Trained(Tuning(kind="full"), ADAM))
    assert sum(d.shape[0] > 0 for d in model.net.declarations.values()) == len(model.net.declarations)
    # 171 words cannot be split in two: the embedding is split over fsdp alone.
    assert found["embedding"] == placement.Part(("fsdp",), ("embed",), (171 + 30) * 16 // 4 * FLOAT)
    assert found["attention"] == placement.Part(("fsdp", "tensor"), (), 2 * 4 * 16 * 16 // 8 * FLOAT)
    assert found["mlp"] == placement.Part(("fsdp", "tensor"), (), 2 * 2 * 16 * 32 // 8 * FLOAT)
    # q, k, v (2 heads of 8) and up (32) over tensor; o, down, four gains and biases a layer, the last norm over fsdp.
    vectors = 2 * (3 * 16 + 32) // 2 + (2 * (2 + 4) * 16 + 2 * 16) // 4
    assert found["norms and biases"] == placement.Part(("fsdp", "tensor"), (), vectors * FLOAT)
    assert "adapters" not in found


def test_parts_in_sampling_are_whole_but_for_tensor(model):
    found = placement.sampled_parts(model, MESH)
    assert found["embedding"] == placement.Part((), ("embed",), (171 + 30) * 16 * FLOAT)
    assert found["attention"] == placement.Part(("tensor",), (), 2 * 4 * 16 * 16 // 2 * FLOAT)


def test_the_optimizer_has_two_moments_of_what_is_trained_and_adapters_are_split_like_their_matrices(model):
    trained = placement.trained_parts(model, MESH, placement.Trained(Tuning(kind="full"), ADAM))
    adam = trained.pop("optimizer")
    moments = 2 * sum(part.bytes for part in trained.values())
    assert 0 < adam.bytes - moments < 100  # counters
    tuning = Tuning(kind="lora", rank=4, targets=("q", "o"))
    found = placement.trained_parts(model, MESH, placement.Trained(tuning, ADAM))
    q = 2 * (16 * 4 // 4 + 4 * 16 // 2)
    o = 2 * (16 * 4 // 2 + 4 * 16 // 4)
    assert found["adapters"] == placement.Part(("fsdp", "tensor"), (), (q + o) * FLOAT)


def test_frozen_weights_have_their_own_dtype():
    net = network(decoder_config("llama", "nano", vocab=172, length=30, numerics=Numerics()))
    held = placement.Model("m", net, "bfloat16")
    lora = placement.trained_parts(held, MESH, placement.Trained(Tuning(kind="lora", rank=2), ADAM))
    full = placement.trained_parts(held, MESH, placement.Trained(Tuning(kind="full"), ADAM))
    assert {name: 2 * lora[name].bytes for name in placement.GROUPS} == {
        name: full[name].bytes for name in placement.GROUPS
    }


def test_a_base_stands_beside_what_is_made_of_it(model):
    held = dataclasses.replace(model, dtype="bfloat16")
    found = placement.trained_parts(held, MESH, placement.Trained(Tuning(kind="full"), ADAM, beside=True))
    assert found["base beside"].bytes * 2 == sum(found[group].bytes for group in placement.GROUPS)


def test_members_of_a_cohort_lie_on_replica(model):
    mesh = jax.sharding.AbstractMesh((2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    tuning = Tuning(kind="lora", rank=4)
    alone = placement.trained_parts(model, mesh, placement.Trained(tuning, ADAM))
    eight = placement.trained_parts(model, mesh, placement.Trained(tuning, ADAM, members=8))
    assert eight["adapters"].bytes == 4 * alone["adapters"].bytes
    assert 3.9 < eight["optimizer"].bytes / alone["optimizer"].bytes < 4.1  # each has counters of its own
    assert eight["adapters"].axes == ("replica", *alone["adapters"].axes)
    assert [eight[group] for group in placement.GROUPS] == [alone[group] for group in placement.GROUPS]


def test_students_that_train_together_are_counted_together():
    words = ["--config.compute.cohort=8"]
    plan = study.plan(config.load("configs/quickstart.py:traits=owl,families=gpt,inits=1", words))
    [model] = placement.models_of(plan)
    assert {(one.tuning.kind, one.beside, one.members) for one in model.trained} == {
        ("full", False, 1), ("bias-and-gain", True, 1), ("bias-and-gain", True, 2),
        ("bias-and-gain", True, 4),
    }  # fmt: skip
    model.trained = {one for one in model.trained if one.members == 4}
    assert "training (bias-and-gain, adam, 4 together)" in "".join(placement._block(model, make_mesh(), make_mesh()))


def test_the_table_of_a_study_names_each_model_once():
    plan = study.plan(config.load("tests/configs/tiny.py", []))
    lines = placement.table(plan, make_mesh()).splitlines()
    assert lines[:3] == ["processes  1", f"devices    1 x {jax.devices()[0].device_kind}", "mesh       fsdp:1"]
    assert lines[4] == "gpt nano: 7.7 k parameters; 2 bases, 4 teachers, 4 corpora, 14 evaluations, 8 students"
    assert "training (full, adamw)" in lines[5]
    assert [line.split("  ")[1] for line in lines[6:]] == [*placement.GROUPS, "optimizer", "bytes per device"]
    assert max(map(len, lines)) < 90


def test_the_table_of_images_says_how_members_lie():
    plan = study.plan(config.load("configs/digits.py", []))
    assert placement.table(plan, make_mesh()).splitlines()[-1].startswith("ensembles")
