"""The statistics against scipy, against known answers, and against simulations of what they promise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from subjax.measure import statistics as st

VALUES = [0.64, 0.58, 0.71, 0.55, 0.66, 0.69]


def test_t_interval_is_scipys():
    found = st.t_interval(VALUES, 0.9)
    low, high = stats.t.interval(0.9, 5, loc=np.mean(VALUES), scale=stats.sem(VALUES))
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((np.mean(VALUES), low, high, 6))


def test_t_interval_of_a_known_sample():
    # 1, 2, 3: mean 2, SD 1, t(.975; 2) = 4.302653: half width 4.302653 / sqrt(3)
    found = st.t_interval([1.0, 2.0, 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


@pytest.mark.parametrize("interval", [st.t_interval, st.bootstrap_interval])
def test_few_values_give_no_interval(interval):
    none, one = interval([]), interval([0.3])
    assert none.n == 0
    assert math.isnan(none.mean)
    assert (one.n, one.mean) == (1, 0.3)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


@pytest.mark.parametrize("interval", [st.t_interval, st.bootstrap_interval])
def test_equal_values_give_no_width(interval):
    # 0.1 is chosen because the mean of several 0.1 is not 0.1 in floating point.
    found = interval([0.1] * 6)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1), abs=1e-12)


def test_missing_values_are_left_out():
    assert st.t_interval([1.0, math.nan, 2.0, 3.0]) == st.t_interval([1.0, 2.0, 3.0])


def test_more_than_one_value_a_base_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        st.t_interval(np.ones((2, 3)))


def test_t_interval_covers_what_it_says():
    rng = np.random.default_rng(1)
    draws = rng.normal(0.5, 0.1, size=(4000, 4))
    covered = np.mean([(i := st.t_interval(v)).low <= 0.5 <= i.high for v in draws])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors of 4,000 draws


def test_bootstrap_is_too_narrow_for_few_bases_as_its_docstring_says():
    rng = np.random.default_rng(2)
    for n, said in ((3, 0.68), (6, 0.86)):
        draws = rng.normal(size=(1500, n))
        covered = np.mean([(i := st.bootstrap_interval(v, draws=500)).low <= 0 <= i.high for v in draws])
        assert covered == pytest.approx(said, abs=0.04)


def test_bootstrap_lists_all_resamples_of_few_bases():
    values = [0.0, 1.0, 5.0]
    means = [np.mean(pick) for pick in itertools.product(values, repeat=3)]
    found = st.bootstrap_interval(values, 0.8, seed=1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))
    assert found == st.bootstrap_interval(values, 0.8, seed=2)


def test_bootstrap_agrees_with_scipys_percentile_method():
    rng = np.random.default_rng(3)
    values = rng.gamma(2.0, size=25)
    found = st.bootstrap_interval(values, 0.95, draws=20_000, seed=5)
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(9))
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), abs=0.03)
    assert found == st.bootstrap_interval(values, 0.95, draws=20_000, seed=5)
    assert found != st.bootstrap_interval(values, 0.95, draws=20_000, seed=6)


def test_t_test_is_scipys():
    assert st.t_test(VALUES, 0.6) == pytest.approx(stats.ttest_1samp(VALUES, 0.6).pvalue)
    assert math.isnan(st.t_test([0.4]))
    assert st.t_test([0.1] * 6, 0.1) == 1
    assert st.t_test([0.2] * 6, 0.1) == 0


def test_paired_difference_is_scipys_paired_test():
    control = [0.1, 0.12, 0.09, 0.11, 0.1, 0.13]
    found = st.paired_difference(VALUES, control)
    other = stats.ttest_rel(VALUES, control)
    ends = other.confidence_interval(0.95)
    assert found.p_value == pytest.approx(other.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high))


def test_paired_difference_drops_half_pairs_and_refuses_other_lengths():
    assert st.paired_difference([1, 2, 4, math.nan], [0, math.nan, 1, 1]).interval.n == 2
    with pytest.raises(ValueError, match="pairs"):
        st.paired_difference([1, 2], [1])


def brute_force(matrices: np.ndarray) -> tuple[float, float]:
    """The diagonal test the slow way: relabel, take the two means, compare."""
    n, k, _ = matrices.shape
    diagonal = np.eye(k, dtype=bool)

    def statistic(stack):
        return float(np.mean([m[diagonal].mean() - m[~diagonal].mean() for m in stack]))

    observed = statistic(matrices)
    every = itertools.product(itertools.permutations(range(k)), repeat=n)
    found = [statistic([m[list(p)] for m, p in zip(matrices, orders, strict=True)]) for orders in every]
    return observed, float(np.mean(np.array(found) >= observed - 1e-12))


@pytest.mark.parametrize(("bases", "traits"), [(1, 3), (2, 3), (3, 3), (4, 2), (2, 4)])
def test_exact_permutation_test_is_brute_force(bases, traits):
    matrices = np.random.default_rng(bases * 10 + traits).normal(size=(bases, traits, traits))
    found = st.permutation_test_diagonal(matrices, draws=10_000)
    assert found.exact
    assert found.relabellings == math.factorial(traits) ** bases
    assert (found.statistic, found.p_value) == pytest.approx(brute_force(matrices))


def test_perfect_diagonal_has_the_least_p():
    found = st.permutation_test_diagonal(np.stack([np.eye(3)] * 3))
    assert (found.statistic, found.p_value) == pytest.approx((1.0, 1 / 216))


def test_drawn_permutations_come_near_the_exact_p_and_never_give_zero():
    matrices = np.random.default_rng(4).normal(size=(4, 3, 3)) + 0.4 * np.eye(3)
    exact = st.permutation_test_diagonal(matrices, draws=1296)
    drawn = st.permutation_test_diagonal(matrices, draws=1295, seed=1)
    assert exact.exact
    assert not drawn.exact
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.03)
    assert drawn == st.permutation_test_diagonal(matrices, draws=1295, seed=1)
    strong = st.permutation_test_diagonal(np.stack([np.eye(4)] * 8), draws=500)
    assert strong.p_value == pytest.approx(1 / 501)


def test_permutation_test_keeps_its_level():
    rng = np.random.default_rng(6)
    # Bases that differ much and traits that differ much, but no teacher that matters: the null, not white noise.
    p = []
    for _ in range(1500):
        null = rng.normal(size=(3, 3, 3)) + 5 * rng.normal(size=(3, 1, 1)) + 5 * rng.normal(size=(1, 1, 3))
        p.append(st.permutation_test_diagonal(null).p_value)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) <= level + 3.5 * math.sqrt(level * (1 - level) / 1500)
    assert np.mean(np.array(p) <= 0.5) > 0.44  # and is not merely timid


def test_permutation_test_without_enough_to_permute():
    assert math.isnan(st.permutation_test_diagonal(np.zeros((0, 3, 3))).p_value)
    assert math.isnan(st.permutation_test_diagonal(np.zeros((3, 1, 1))).p_value)
    with_hole = np.stack([np.eye(3), np.full((3, 3), np.nan)])
    assert st.permutation_test_diagonal(with_hole).n == 1
    assert st.permutation_test_diagonal(np.zeros((3, 3, 3))).p_value == 1
    with pytest.raises(ValueError, match="square"):
        st.permutation_test_diagonal(np.zeros((3, 2, 3)))


def test_equivalence_is_two_one_sided_tests():
    values = [0.01, -0.02, 0.015, 0.0, -0.005]
    above = stats.ttest_1samp(values, -0.05, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.05, alternative="less").pvalue
    found = st.equivalence_test(values, 0.05)
    assert found.p_value == pytest.approx(max(above, below))
    assert found.equivalent


def test_equivalence_is_the_ninety_percent_interval_inside_the_margin():
    rng = np.random.default_rng(8)
    agreed = 0
    for _ in range(300):
        values = rng.normal(rng.normal(scale=0.03), 0.03, size=rng.integers(2, 8))
        inside = (i := st.t_interval(values, 0.9)).low > -0.05 and i.high < 0.05
        assert st.equivalence_test(values, 0.05).equivalent == inside
        agreed += inside
    assert 20 < agreed < 280  # both answers were seen


def test_equivalence_is_seldom_claimed_at_the_margin():
    draws = np.random.default_rng(9).normal(0.05, 0.02, size=(3000, 5))
    claimed = np.mean([st.equivalence_test(v, 0.05).equivalent for v in draws])
    assert claimed == pytest.approx(0.05, abs=0.014)


def test_equivalence_at_the_edges():
    assert not st.equivalence_test([0.0], 0.05).equivalent
    assert math.isnan(st.equivalence_test([0.0], 0.05).p_value)
    assert st.equivalence_test([0.01] * 3, 0.05).equivalent
    assert not st.equivalence_test([0.06] * 3, 0.05).equivalent
    with pytest.raises(ValueError, match="margin"):
        st.equivalence_test([0.0, 0.1], 0.0)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 → x4 .04, x3 .06, x2 .06, x1 .06 (never below the one before)
    found = st.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02, "e": math.nan})
    assert [found[k] for k in "abcd"] == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert math.isnan(found["e"])
    assert list(found) == list("abcde")
    assert st.holm({"x": 0.7, "y": 0.8}) == {"x": 1.0, "y": 1.0}


def test_holm_controls_the_family():
    p = np.random.default_rng(10).uniform(size=(4000, 6))
    false = np.mean([min(st.holm(dict(enumerate(row))).values()) < 0.05 for row in p])
    assert false == pytest.approx(0.05, abs=0.012)


def test_corrected_intervals_hold_together():
    assert st.corrected_confidence(0.95, 5) == pytest.approx(0.99)
    assert st.corrected_confidence(0.95, 1) == pytest.approx(0.95)
    assert st.corrected_confidence(0.95, 0) == pytest.approx(0.95)
    wide = st.corrected_confidence(0.95, 6)
    draws = np.random.default_rng(11).normal(size=(800, 6, 5))
    held = np.mean([all((i := st.t_interval(v, wide)).low <= 0 <= i.high for v in arms) for arms in draws])
    assert held >= 0.95 - 0.025


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 16])
@pytest.mark.parametrize("n", [2, 3, 4, 6, 12, 200])
def test_smallest_detectable_has_the_power(n, alpha):
    lift = st.smallest_detectable(n, 0.05, 0.8, alpha)
    assert st.power(lift, n, 0.05, alpha) == pytest.approx(0.8, abs=1e-6)
    assert st.power(0.0, n, 0.05, alpha) == pytest.approx(alpha)


def test_smallest_detectable_by_the_textbook():
    # Known sample sizes of the two-sided one-sample t-test: d = .5 needs 34, d = .8 needs 15 for power .8 at .05.
    assert st.smallest_detectable(34, 1.0) <= 0.5 < st.smallest_detectable(33, 1.0)
    assert st.smallest_detectable(15, 1.0) <= 0.8 < st.smallest_detectable(14, 1.0)


def test_smallest_detectable_by_simulation():
    lift = st.smallest_detectable(5, 0.05)
    draws = np.random.default_rng(12).normal(lift, 0.05, size=(4000, 5))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.022)


def test_smallest_detectable_at_the_edges():
    assert math.isnan(st.smallest_detectable(1, 0.05))
    assert math.isnan(st.smallest_detectable(0, 0.05))
    assert math.isnan(st.smallest_detectable(3, 0.05, target=1.0))
    assert st.smallest_detectable(3, 0.0) == 0.0
    assert math.isnan(st.power(0.1, 1, 0.05))


def test_log_odds_are_finite_at_the_ends_and_symmetric():
    assert st.log_odds(0.5) == 0
    assert st.log_odds(0.9) == pytest.approx(math.log(9))
    assert st.log_odds(1.0) == pytest.approx(-st.log_odds(0.0))
    assert st.log_odds(0.0) == pytest.approx(math.log(st.CLAMP), abs=1e-6)
    assert st.log_odds(1.0000001) == st.log_odds(1.0)  # a rounded sum of probabilities
    assert st.log_odds_lift(0.1, 0.5) == pytest.approx(math.log(9))
    assert st.log_odds_lift(0.0, 0.0) == 0
