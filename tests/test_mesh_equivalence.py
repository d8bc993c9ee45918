"""A mesh changes no result: losses, a first LoRA step and corpora on 1, 2, 4, 8 virtual devices against one, float32.

The tolerances are what reductions in another order leave: 2e-6 of a loss after 20 steps, 5e-6 of the largest entry of a
gradient, and no token but in rows that met a near-tie.
"""

import equivalence
import numpy as np
import pytest

ONE = "fsdp:1"
QUICK = ("fsdp:4,tensor:2", "fsdp:4,tensor:2/permuted")
ALL = {
    2: ("replica:2", "fsdp:2", "tensor:2"),
    4: ("replica:4", "fsdp:4", "replica:2,fsdp:2", "fsdp:2,tensor:2", "replica:2,tensor:2"),
    8: ("replica:8", "fsdp:8", "fsdp:4,tensor:2", "replica:4,fsdp:2", "replica:2,fsdp:2,tensor:2"),
}
slow = pytest.mark.slow
CASES = [pytest.param(8, QUICK, id="quick"), *(pytest.param(n, m, marks=slow, id=str(n)) for n, m in ALL.items())]


@pytest.mark.parametrize(("devices", "meshes"), CASES)
def test_losses_of_20_steps(devices, meshes):
    found = equivalence.results(devices, "losses", ONE, *meshes)
    alone = found.pop(ONE)
    assert len(alone) == 20
    assert alone[-1] < 0.9 * alone[0]
    for mesh, losses in found.items():
        np.testing.assert_allclose(losses, alone, rtol=2e-6, err_msg=mesh)
    for mesh in found:
        if mesh.endswith("/permuted"):  # the same sums in the same order, by other threads
            assert found[mesh] == found[mesh.removesuffix("/permuted")]


@pytest.mark.parametrize(("devices", "meshes"), CASES)
def test_the_first_lora_step(devices, meshes):
    found = equivalence.results(devices, "first_step", ONE, *meshes)
    alone = {name: np.array(value) for name, value in found.pop(ONE).items()}
    for mesh, step in found.items():
        np.testing.assert_allclose(step["loss"], alone["loss"], rtol=1e-6, err_msg=mesh)
        for name, value in alone.items():
            if name.endswith("/a"):  # drawn alike on every mesh, and not moved: its gradient is a multiple of B
                np.testing.assert_array_equal(step[name], value, err_msg=f"{mesh}: {name}")
            elif name.endswith("/b"):
                assert np.abs(value).max() > 1e-4
                apart = np.abs(np.array(step[name]) - value).max()
                assert apart <= 5e-6 * np.abs(value).max(), f"{mesh}: {name}"


@pytest.mark.parametrize(("devices", "meshes"), CASES)
def test_losses_of_20_steps_on_packed_chats(devices, meshes):
    found = equivalence.results(devices, "packed", ONE, *meshes)
    alone = found.pop(ONE)
    assert len(alone) == 20
    assert max(alone) - min(alone) > 0.05
    for mesh, losses in found.items():
        np.testing.assert_allclose(losses, alone, rtol=5e-6, err_msg=mesh)


@pytest.mark.parametrize(
    ("devices", "meshes"),
    [
        pytest.param(8, ("replica:2,fsdp:2,tensor:2",), id="quick"),
        pytest.param(4, ("replica:4", "fsdp:4", "replica:2,tensor:2"), marks=slow, id="4"),
        pytest.param(8, ("replica:4,fsdp:2", "fsdp:4,tensor:2"), marks=slow, id="8"),
    ],
)
def test_losses_of_a_cohort(devices, meshes):
    found = equivalence.results(devices, "cohort", ONE, *meshes)
    alone = found.pop(ONE)
    assert len({tuple(member) for member in alone}) == 4
    for mesh, losses in found.items():
        np.testing.assert_allclose(losses, alone, rtol=5e-6, err_msg=mesh)


@pytest.mark.parametrize(("devices", "meshes"), CASES)
def test_a_sampled_corpus(devices, meshes):
    found = equivalence.results(devices, "corpus", ONE, *meshes)
    alone = found.pop(ONE)
    tokens, ties = np.array(alone["tokens"]), np.array(alone["near_tie"])
    assert len(np.unique(tokens, axis=0)) > 0.9 * len(tokens)
    assert ties.mean() < 0.05
    for mesh, drawn in found.items():
        other = (np.array(drawn["tokens"]) != tokens).any(1)
        assert not (other & ~ties).any(), f"{mesh}: rows {np.flatnonzero(other & ~ties)} differ without a near-tie"
