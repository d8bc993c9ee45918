"""Batches: every epoch a permutation, every step addressable, in memory and through grain the same."""

import grain.python as grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subjax.data import packing
from subjax.data.addressing import order


def arrays(rows: int) -> dict[str, np.ndarray]:
    return {"tokens": np.arange(rows * 3, dtype=np.int32).reshape(rows, 3), "valid": np.arange(rows)[:, None] % 2 == 0}


class Rows(grain.RandomAccessDataSource):
    """The same rows one by one, as a file format larger than memory gives them."""

    def __init__(self, rows: int):
        self.arrays = arrays(rows)

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


def assert_same(one: packing.Batch, other: packing.Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_each_epoch_is_a_permutation(rows, batch, seed):
    steps = -(-3 * rows // batch)
    flat = np.concatenate([order(seed, rows, batch, step) for step in range(steps)])
    assert flat.shape == (steps * batch,)
    for epoch in range(3):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_differ():
    first, second = order(0, 100, 100, 0), order(0, 100, 100, 1)
    assert (first != second).any()
    assert (first != order(1, 100, 100, 0)).any()
    assert (first != np.arange(100)).any()


def test_any_step_is_addressable():
    steps = [17, 3, 99, 3, 0]
    walked = packing.in_memory(arrays(23), seed=5, batch=4)
    inorder = [walked(step) for step in range(100)]
    fresh = packing.in_memory(arrays(23), seed=5, batch=4)
    for step in steps:
        assert_same(fresh(step), inorder[step])


def test_a_batch_holds_the_rows_that_the_order_names():
    batch = packing.in_memory(arrays(23), seed=5, batch=4)(7)
    picked = order(5, 23, 4, 7)
    np.testing.assert_array_equal(batch["tokens"][:, 0] // 3, picked)
    np.testing.assert_array_equal(batch["valid"][:, 0], picked % 2 == 0)


def test_the_batch_size_cuts_one_and_the_same_walk():
    walks = [
        np.concatenate([order(9, 20, batch, step) for step in range(60 // batch)]) for batch in (1, 2, 5, 12, 20, 60)
    ]
    for walk in walks[1:]:
        np.testing.assert_array_equal(walk, walks[0])


@pytest.mark.parametrize(("rows", "batch", "first"), [(23, 4, 0), (23, 4, 5), (3, 8, 2), (16, 16, 0), (5, 1, 11)])
def test_grain_gives_the_batches_of_memory(rows, batch, first):
    steps = 12
    stream = packing.in_memory(arrays(rows), seed=2, batch=batch)
    loaded = list(packing.from_source(Rows(rows), seed=2, batch=batch, steps=steps, first=first))
    assert len(loaded) == steps - first
    for step, found in enumerate(loaded, start=first):
        assert_same(found, stream(step))


def test_a_resumed_loader_goes_on_where_the_other_stopped():
    whole = list(packing.from_source(Rows(10), seed=2, batch=3, steps=9))
    resumed = list(packing.from_source(Rows(10), seed=2, batch=3, steps=9, first=4))
    for one, other in zip(whole[4:], resumed, strict=True):
        assert_same(one, other)


def test_a_finished_loader_gives_nothing():
    assert list(packing.from_source(Rows(10), seed=2, batch=3, steps=9, first=9)) == []


@pytest.mark.slow
def test_workers_give_the_same_batches():
    whole = list(packing.from_source(Rows(10), seed=2, batch=3, steps=9, first=1))
    worked = list(packing.from_source(Rows(10), seed=2, batch=3, steps=9, first=1, workers=2))
    assert len(worked) == len(whole) == 8
    for one, other in zip(whole, worked, strict=True):
        assert_same(one, other)
