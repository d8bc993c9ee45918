"""Described hardware: names, shapes, links and meshes. What needs libtpu or the CUDA plug-in is skipped without it."""

import pytest

from subjax.errors import UsageError
from subjax.parallel import topology as topologies
from subjax.parallel.chips import CHIPS
from subjax.parallel.mesh import AXES, make_mesh
from subjax.parallel.topology import described_mesh, islands_of, larger, parse_topology


def needs(text: str):
    install = topologies.missing(parse_topology(text))
    return pytest.mark.skipif(install is not None, reason=f"what describes {text} is not installed: {install}")


@pytest.mark.parametrize(
    ("text", "shape", "slices", "size", "islands"),
    [
        ("v5e:4x4", (4, 4), 1, 16, 1),
        ("v5p:4x4x4", (4, 4, 4), 1, 64, 1),
        ("v6e:16x16x2slices", (16, 16), 2, 512, 2),
        ("v5e:4x4x1slice", (4, 4), 1, 16, 1),
        ("tpu7x:2x2x1", (2, 2, 1), 1, 8, 1),  # two devices a chip
        ("h100:4x8", (4, 8), 1, 32, 4),
        ("h100:1x4x8", (4, 8), 1, 32, 4),  # as XLA writes it
        ("cpu:8", (8,), 1, 8, 1),
    ],
)
def test_a_name_gives_the_shape(text, shape, slices, size, islands):
    found = parse_topology(text)
    assert (found.shape, found.slices, found.size, found.islands) == (shape, slices, size, islands)
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5pp:4x4x4", r"unknown kind 'v5pp'; did you mean 'v5p'\?"),
        ("V6E:4x4", r"did you mean 'v6e'\?"),
        ("h10:1x8", r"did you mean 'h100'\?"),
        ("v5e", r"want a kind and a shape, as in v5e:4x4"),
        ("v5e:4by4", r"want a kind and a shape"),
        ("v5p:4x4", r"v5p has a shape of three numbers"),
        ("v5e:4x4x4", r"v5e has a shape of two numbers"),
        ("v5e:0x4", r"v5e has a shape of two numbers"),
        ("v5e:3x4", r"the nearest is v5e:4x4"),
        ("h100:4x8x2slices", r"hosts and GPUs of a host"),
        ("cpu:2x2", r"cpu has a shape of one number"),
    ],
)
def test_a_wrong_name_says_what_is_right(text, said):
    with pytest.raises(UsageError, match=said):
        parse_topology(text)


def test_links_that_every_device_has():
    """A corner of a torus that does not close has one link a dimension; v5e and v6e close at 16 and
    v5p where all of it is of fours: of 2 x 4 x 4 no side does.
    """
    links = {"v5e:4x4": 2, "v5e:16x16": 4, "v5e:8x16": 3, "v5p:4x4x4": 6, "v5p:2x2x1": 2, "v6e:4x4": 2}
    links |= {"v5p:2x4x4": 3, "v5p:4x4x8": 6, "tpu7x:2x2x4": 3}
    for text, count in links.items():
        found = parse_topology(text)
        assert found.fast == count * found.chip.link, text


@pytest.mark.parametrize(
    ("text", "next_larger"),
    [
        ("v5e:4x8", "v5e:8x8"),
        ("v5e:4x4", "v5e:4x8"),
        ("v5p:4x4x4", "v5p:4x4x8"),
        ("h100:2x8", "h100:4x8"),
        ("v5e:4x4x2slices", "v5e:4x8x2slices"),
        ("v5e:1x1", "v5e:2x2"),
        ("tpu7x:1x1x1", "tpu7x:2x2x1"),
        ("v5e:1x1x4slices", "v5e:2x2x4slices"),
        ("v6e:16x16", "v6e:16x16x2slices"),  # a slice ends at 256 chips
        ("v5e:16x16x2slices", "v5e:16x16x4slices"),
        ("cpu:4", "cpu:8"),
    ],
)
def test_the_next_larger_topology_is_one_that_there_is(text, next_larger):
    assert str(larger(parse_topology(text))) == next_larger


def test_peaks_by_precision():
    """A TPU makes a float32 product of six bfloat16 ones at `highest`, of three at `high`."""
    chip = CHIPS["v5p"]
    assert chip.peak("bfloat16", "highest") == chip.peak("float32", "default") == 459e12
    assert chip.peak("float32", "highest") * 6 == chip.peak("float32", "high") * 3 == 459e12


def test_a_mesh_must_take_all_devices():
    with pytest.raises(UsageError, match=r"mesh=fsdp:2 has 2 devices and cpu:1 has 1; .*--mesh=fsdp:1"):
        described_mesh(parse_topology("cpu:1"), (1, 2, 1))


def test_a_described_mesh_is_as_a_real_one():
    mesh, real = described_mesh(parse_topology("cpu:1"), (1, 1, 1)), make_mesh()
    assert mesh.axis_names == real.axis_names == AXES
    assert mesh.axis_types == real.axis_types
    assert mesh.shape == real.shape


@needs("v5e:4x4")
@pytest.mark.parametrize(
    ("text", "sizes", "kind"),
    [
        ("v5e:4x4", (2, 4, 2), "TPU v5 lite"),
        ("v5p:8x8x8", (1, 64, 8), "TPU v5"),
        ("v6e:4x4", (1, 1, 16), "TPU v6 lite"),
    ],
)
def test_tpus_are_described(text, sizes, kind):
    mesh = described_mesh(parse_topology(text), sizes)
    assert mesh.axis_types == make_mesh().axis_types
    assert tuple(mesh.shape.values()) == sizes
    assert {d.device_kind for d in mesh.devices.flat} == {kind}
    assert len({d.id for d in mesh.devices.flat}) == mesh.size


@needs("v5e:4x4")
def test_slices_go_over_the_outer_axis():
    topology = parse_topology("v5e:4x4x2slices")
    islands = islands_of(topology, described_mesh(topology, (2, 16, 1)))
    assert islands == [0] * 16 + [1] * 16
    halves = islands_of(topology, described_mesh(topology, (1, 16, 2)))  # no replica: fsdp goes over the slices
    assert halves == [0] * 16 + [1] * 16
    with pytest.raises(UsageError, match="--mesh=tensor:32: neither replica:1 nor fsdp:1 can go over the 2 slices"):
        described_mesh(topology, (1, 1, 32))


@needs("h100:4x8")
def test_gpus_are_described():
    topology = parse_topology("h100:4x8")
    mesh = described_mesh(topology, (4, 8, 1))
    assert islands_of(topology, mesh) == [host for host in range(4) for _ in range(8)]
    assert mesh.devices.flat[0].platform == "gpu"
