import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjax.errors import UsageError
from subjax.sweep import axis, chain, product, subsample, zip_

AXES = st.lists(st.lists(st.integers(), min_size=1, max_size=4), max_size=4)


def test_axis_gives_one_point_a_value_in_order():
    assert axis("trait", ["owl", "wolf"]) == [{"trait": "owl"}, {"trait": "wolf"}]
    assert axis("init", range(3)) == [{"init": 0}, {"init": 1}, {"init": 2}]


def test_product_varies_the_last_sweep_fastest():
    points = product(axis("a", [1, 2]), axis("b", [3, 4]))
    assert points == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]


def test_product_of_nothing_is_the_one_empty_point():
    assert product() == [{}]


def test_product_with_the_empty_point_changes_nothing():
    assert product([{}], axis("a", [1, 2])) == axis("a", [1, 2])


def test_zip_joins_point_by_point():
    assert zip_(axis("a", [1, 2]), axis("b", [3, 4])) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert zip_() == []


def test_chain_puts_sweeps_end_to_end_and_allows_different_keys():
    assert chain(axis("a", [1]), axis("b", [2]), axis("a", [3])) == [{"a": 1}, {"b": 2}, {"a": 3}]


def test_sweeps_share_no_point():
    first = axis("a", [1, 2])
    for made in (chain(first), product(first), zip_(first), subsample(first, 2, 0)):
        made[0]["a"] = 99
    assert first == axis("a", [1, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: axis("trait", "owl"), "axis 'trait': values must be a list, got 'owl'; write ['owl']"),
        (lambda: axis("init", 3), "axis 'init': values must be a list, got 3; write [3]"),
        (lambda: axis("init", []), "axis 'init': has no value; give at least one"),
        (lambda: axis("", [1]), "axis: a key is a dotted name such as 'student.seed', got ''"),
        (
            lambda: zip_(axis("a", [1, 2]), axis("b", [1, 2, 3])),
            "zip_: the sweeps have 2, 3 points; make them equally long",
        ),
        (
            lambda: product(axis("a", [1]), axis("b", [1]), axis("a", [2])),
            "product: 'a' is set twice, by sweeps 1 and 3",
        ),
        (lambda: zip_(axis("a", [1]), axis("a", [1])), "zip_: 'a' is set twice, by sweeps 1 and 2"),
        (lambda: chain(axis("a", [1]), {"a": 2}), "chain: argument 2 is not a sweep (a list of dicts): dict"),
        (
            lambda: subsample(axis("a", [1, 2]), 3, seed=0),
            "subsample: n must be a whole number from 1 to the sweep's 2 points, got 3",
        ),
        (
            lambda: subsample(axis("a", [1, 2]), 0, seed=0),
            "subsample: n must be a whole number from 1 to the sweep's 2 points, got 0",
        ),
        (
            lambda: subsample(axis("a", [1, 2]), True, seed=0),
            "subsample: n must be a whole number from 1 to the sweep's 2 points, got True",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(make, message):
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


@given(AXES)
def test_product_has_every_combination_once(values):
    sweep = product(*[axis(f"k{number}", list(dict.fromkeys(some))) for number, some in enumerate(values)])
    size = 1
    for some in values:
        size *= len(set(some))
    assert len(sweep) == size
    assert len({tuple(sorted(point.items())) for point in sweep}) == size
    assert all(set(point) == {f"k{number}" for number in range(len(values))} for point in sweep)


@given(st.integers(1, 40), st.integers(), st.data())
def test_subsample_draws_without_replacement_and_keeps_the_order(size, seed, data):
    n = data.draw(st.integers(1, size))
    drawn = [point["a"] for point in subsample(axis("a", range(size)), n, seed)]
    assert len(drawn) == n
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(size))


def test_subsample_is_addressed_by_its_seed_alone():
    sweep = axis("a", range(50))
    first = subsample(sweep, 5, seed=1)
    random.seed(123)
    assert subsample(sweep, 5, seed=1) == first
    assert subsample(sweep, 5, seed=2) != first
    assert [point["a"] for point in first] == [29, 30, 38, 39, 49], "a subsample must be the same on every machine"


def test_points_appended_later_only_displace():
    short, long = axis("a", range(50)), axis("a", range(60))
    before = {point["a"] for point in subsample(short, 10, seed=0)}
    after = {point["a"] for point in subsample(long, 10, seed=0)}
    assert {index for index in after if index < 50} <= before


def test_subsample_draws_evenly():
    counts = [0] * 10
    for seed in range(2000):
        for point in subsample(axis("a", range(10)), 3, seed):
            counts[point["a"]] += 1
    assert all(480 < count < 720 for count in counts), counts  # 600 expected, SD 20
