"""Meshes and sharding rules, and arrays that are really split where the rules say so (8 virtual devices)."""

import dataclasses
import itertools
import logging
import os

import jax
import numpy as np
import on_devices
import pytest
from jax.sharding import PartitionSpec

from subjax.errors import SubjaxError, UsageError
from subjax.models import adapters
from subjax.models.families import FAMILIES
from subjax.parallel import rules
from subjax.parallel.mesh import AXES, global_mesh, local_mesh, make_mesh, parse_mesh, replicated
from subjax.parallel.rules import SAMPLE, TRAIN, Rules, shardings
from subjax.schema import Tuning


def _one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (1, 1, 1)),
        ("fsdp:4,tensor:2", (1, 4, 2)),
        ("tensor:2,fsdp:4", (1, 4, 2)),
        ("replica:16", (16, 1, 1)),
        ("replica:2,fsdp:2,tensor:2", (2, 2, 2)),
    ],
)
def test_parse_mesh(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fsdb:4", ("unknown axis 'fsdb'", "'fsdp'")),
        ("data:4", ("unknown axis 'data'",)),
        (":4", ("an axis without a name", "fsdp:4,tensor:2")),
        ("fsdp:2,", ("an axis without a name",)),
        ("fsdp:4,fsdp:2", ("'fsdp' stands twice",)),
        ("fsdp", ("'fsdp' needs a positive whole number", "'fsdp:4'")),
        ("fsdp:0", ("positive whole number",)),
        ("fsdp:-1", ("positive whole number",)),
        ("fsdp:2.5", ("positive whole number",)),
        ("fsdp:two", ("positive whole number",)),
    ],
)
def test_parse_mesh_tells_what_is_wrong_in_one_line(text, words):
    with pytest.raises(UsageError) as caught:
        parse_mesh(text)
    message = _one_line(caught)
    assert repr(text) in message
    assert all(word in message for word in words), message


def test_a_mesh_has_all_three_axes_and_they_are_auto():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert replicated(mesh).is_fully_replicated


def test_a_mesh_larger_than_the_machine_is_told_in_one_line():
    with pytest.raises(UsageError) as caught:
        make_mesh((1, 4, 2), jax.devices()[:1])
    assert "replica:1,fsdp:4,tensor:2 wants 8 devices and there are 1" in _one_line(caught)


def test_rules_tell_a_collision_in_one_line():
    both = Rules("test", (("embed", ("fsdp",)), ("batch", ("replica", "fsdp"))))
    with pytest.raises(SubjaxError) as caught:
        both.spec(("batch", "embed"), "blocks/x")
    message = _one_line(caught)
    for word in ("blocks/x", "test rules", "'batch'", "'embed'", "'fsdp'"):
        assert word in message
    with pytest.raises(SubjaxError, match="both 'heads' and 'mlp' on mesh axis 'tensor'"):
        TRAIN.spec(("heads", "mlp"))
    with pytest.raises(SubjaxError, match="mesh axis 'fsdp'"):
        TRAIN.spec(("batch", "length", "embed"))


def test_rules_tell_an_unknown_axis_in_one_line():
    with pytest.raises(SubjaxError) as caught:
        TRAIN.spec(("layers", "experts"), "blocks/mlp/router")
    message = _one_line(caught)
    for word in ("blocks/mlp/router", "training rules", "'experts'", "add one"):
        assert word in message


def test_rules_give_a_partition_for_each_axis():
    assert TRAIN.spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert SAMPLE.spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, None, ("tensor",), None)
    assert TRAIN.spec(("batch", "length")) == PartitionSpec(("replica", "fsdp"), None)


@pytest.mark.parametrize("tuning", ["full", "bias-and-gain", "lora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_array_of_every_family_has_a_rule_for_every_axis(family, tuning):
    """An axis without a rule, a collision, or as many axes as dimensions: each would raise."""
    declared = adapters.tuned_axes(on_devices.tiny(family), Tuning(kind=tuning, rank=2))
    for table in (TRAIN, SAMPLE):
        assert shardings(table, make_mesh(), declared).keys() == declared.keys()


def test_a_dimension_that_does_not_divide_is_kept_whole_and_logged(caplog):
    rules._tell.cache_clear()  # it is told once a process, and another test may have been told
    # The rules read a mesh's shape alone, so a described mesh of 8 serves on one device.
    mesh = jax.sharding.AbstractMesh((1, 4, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with caplog.at_level(logging.WARNING, logger="subjax"):
        even = TRAIN.sharding(mesh, (172, 32), ("vocab", "embed"), "embed")
    assert not caplog.records
    assert even.spec == PartitionSpec(("tensor",), ("fsdp",))
    with caplog.at_level(logging.WARNING, logger="subjax"):
        odd = TRAIN.sharding(mesh, (171, 32), ("vocab", "embed"), "embed")
    assert odd.spec == PartitionSpec(None, ("fsdp",))
    assert odd.shard_shape((171, 32)) == (171, 8)
    [record] = caplog.records
    for word in ("embed: dimension of 171", "2 ways", "tensor", "kept whole"):
        assert word in record.getMessage()


# Width 32 over fsdp 4; vocabulary 172, two heads and the feed-forward width over tensor 2. Written by hand.
COMMON = {
    "embed": [86, 8],
    "norm/gain": [8],
    "blocks/norm1/gain": [2, 8],
    "blocks/norm2/gain": [2, 8],
    "blocks/attention/q/kernel": [2, 8, 1, 16],
    "blocks/attention/k/kernel": [2, 8, 1, 16],
    "blocks/attention/v/kernel": [2, 8, 1, 16],
    "blocks/attention/o/kernel": [2, 1, 16, 8],
}
LINEAR_BIASES = {
    "blocks/attention/q/bias": [2, 1, 16],
    "blocks/attention/k/bias": [2, 1, 16],
    "blocks/attention/v/bias": [2, 1, 16],
    "blocks/attention/o/bias": [2, 8],
    "blocks/mlp/down/bias": [2, 8],
}
GATED = {
    "blocks/mlp/gate/kernel": [2, 8, 48],
    "blocks/mlp/up/kernel": [2, 8, 48],
    "blocks/mlp/down/kernel": [2, 48, 8],
}
SHARDS = {
    "gpt": COMMON
    | LINEAR_BIASES
    | {
        "position": [30, 8],
        "norm/bias": [8],
        "blocks/norm1/bias": [2, 8],
        "blocks/norm2/bias": [2, 8],
        "blocks/mlp/up/kernel": [2, 8, 64],
        "blocks/mlp/down/kernel": [2, 64, 8],
        "blocks/mlp/up/bias": [2, 64],
    },
    "llama": COMMON | GATED | {"head": [86, 8]},
    "llama-bias": COMMON | LINEAR_BIASES | GATED | {"blocks/mlp/gate/bias": [2, 48], "blocks/mlp/up/bias": [2, 48]},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameters_are_split_over_8_devices(family):
    found = on_devices.result(8, "shards")
    assert found[f"{family} training"] == {name: [shape] for name, shape in SHARDS[family].items()}
    # The sampler keeps the embedding axis whole: there 8 is 32, and nothing else of these shapes is 8.
    sampling = {name: [[32 if size == 8 else size for size in shape]] for name, shape in SHARDS[family].items()}
    assert found[f"{family} sampling"] == sampling


def test_initial_parameters_do_not_depend_on_the_mesh():
    on_eight = on_devices.result(8, "init")
    assert on_eight["shards"] == {name: [shape] for name, shape in SHARDS["gpt"].items()}
    arrays = on_devices.initial(on_devices.tiny("gpt"), make_mesh())
    assert on_eight["digest"] == on_devices.digest(arrays)
    # They are the initial parameters that the declarations speak of, and not, say, zeros in both places.
    assert np.asarray(arrays["norm/gain"] == 1).all()
    assert np.asarray(arrays["blocks/mlp/up/bias"] == 0).all()
    for name, std in (("blocks/attention/q/kernel", 32**-0.5), ("blocks/mlp/down/kernel", 128**-0.5 / 2)):
        assert float(arrays[name].std()) == pytest.approx(std, rel=0.1), name
        assert abs(float(arrays[name].mean())) < 0.1 * std
    # Layers, and arrays of one shape, are drawn apart.
    first, second = arrays["blocks/attention/q/kernel"]
    assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.15
    other = arrays["blocks/attention/k/kernel"][0]
    assert abs(np.corrcoef(np.ravel(first), np.ravel(other))[0, 1]) < 0.15


@pytest.mark.parametrize("devices", [2, 8])
def test_logits_on_a_mesh_are_those_on_one_device(devices):
    found = on_devices.result(devices, "forward")
    assert 0 <= found["apart"] < 2e-6


def test_a_checkpoint_of_one_mesh_is_read_onto_another():
    found = on_devices.result(8, "checkpoint")
    assert found["same"] == [True, True]
    assert found["shards"] == [[64, 6]]


def test_a_step_splits_its_activations_by_rows_and_not_by_the_parameters_axis():
    assert set(on_devices.result(8, "activations")) == {"8"}  # 64 rows over 8 devices, never all of them on one


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as counting takes."""

    slice_index: int
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("shape", "chips", "words"),
    [
        ((1, 4, 2), 4, "--mesh=fsdp:4,tensor:2 is of 8 devices and there are 4: give axes whose product is 4"),
        ((1, 2, 1), 4, "--mesh=fsdp:2 is of 2 devices and there are 4"),
        ((1, 1, 8), 8, "neither replica:1 nor fsdp:1 can go over the 2 slices .* as in --mesh=replica:2,fsdp:4"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_in_one_line(shape, chips, words):
    with pytest.raises(UsageError, match=words) as refused:
        global_mesh(shape, [Chip(i // 4) for i in range(chips)])
    assert "\n" not in str(refused.value)


@dataclasses.dataclass(frozen=True)
class PlacedChip:
    """As much of a chip as laying a mesh over a slice takes."""

    id: int
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("kind", "sides", "shape"),
    [
        ("TPU v6 lite", (4, 4, 1), (1, 8, 2)),
        ("TPU v6 lite", (4, 4, 1), (8, 1, 2)),
        ("TPU v5", (4, 4, 4), (1, 32, 2)),
        ("TPU v5", (4, 4, 4), (1, 64, 1)),
        ("TPU v5 lite", (4, 4, 1), (2, 8, 1)),
    ],
)
def test_an_axis_may_be_a_part_of_a_side_of_a_slice(kind, sides, shape):
    places = itertools.product(*map(range, reversed(sides)))
    chips = [PlacedChip(i, kind, (x, y, z)) for i, (z, y, x) in enumerate(places)]
    mesh = global_mesh(shape, chips)
    assert mesh.devices.shape == shape
    assert {chip.id for chip in mesh.devices.flat} == set(range(len(chips)))


def test_the_slices_of_a_described_pod_lie_on_replica():
    """With libtpu alone, which needs no chip: two slices of 16."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices
    for shape, sizes in ((None, (2, 16, 1)), ((2, 4, 4), (2, 4, 4)), ((4, 8, 1), (4, 8, 1))):
        mesh = global_mesh(shape, devices)
        assert tuple(mesh.shape.values()) == sizes
        slices = [{device.slice_index for device in part.flatten()} for part in mesh.devices]
        assert slices == [{i * 2 // sizes[0]} for i in range(sizes[0])]


def test_one_process_asks_models_on_the_whole_mesh():
    mesh = make_mesh()
    assert local_mesh(mesh) is mesh
