"""Intervals and tests over independent bases (numpy and scipy alone).

Every function takes one value a base: runs on one base share its weights, so they are averaged before they come here.
Fewer than two values give no interval: NaN stands in its place, and whoever writes sentences says so.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

Key = TypeVar("Key")
Values = Sequence[float] | Float[np.ndarray, " bases"]

# Probabilities come from a float32 softmax, which cannot tell 1 - 6e-8 from 1. The same distance is kept at 0, so that
# log-odds stay symmetric: they lie within +-16.2 whatever a collapsed model says.
CLAMP = 1e-7


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over `n` bases with its confidence interval [low, high]; NaN where there is none."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean paired difference, its interval, and the two-sided p-value of a paired t-test against 0."""

    interval: Interval
    p_value: float


@dataclasses.dataclass(frozen=True)
class Permutation:
    """The diagonal test's statistic and one-sided p-value; `relabellings` were looked at, all there are if `exact`."""

    statistic: float
    p_value: float
    n: int
    relabellings: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `p_value` is the larger of the two, `equivalent` says that it is below alpha."""

    margin: float
    p_value: float
    equivalent: bool
    n: int


def clean(values: Values) -> Float[np.ndarray, " bases"]:
    """The finite ones of `values`, as float64; raises ValueError if they are not a flat list."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"one value a base is wanted, not an array of shape {array.shape}")
    return array[np.isfinite(array)]


def spread(values: Float[np.ndarray, " bases"]) -> float:
    """Sample SD (n - 1); exactly 0 where all values are equal, and NaN for fewer than two.

    Equal values need not have a mean equal to them in floating point, which would leave a tiny SD that makes tests
    claim infinite evidence of a rounding error.
    """
    if len(values) < 2:
        return math.nan
    if np.ptp(values) <= 1e-12 * float(np.max(np.abs(values))):
        return 0.0
    return float(np.std(values, ddof=1))


def t_interval(values: Values, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of `values` (one a base, any unit), two-sided.

    Assumes bases drawn independently from something near a normal distribution. One value gives its mean and no
    interval (NaN); equal values give an interval of no width. Source: Student, 'The probable error of a mean', 1908.
    """
    array = clean(values)
    n = len(array)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, confidence)
    mean = float(np.mean(array))
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1, confidence)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread(array) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, confidence)


def bootstrap_interval(values: Values, confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean over bases: bases are drawn with replacement, n at a time.

    All n**n resamples are listed where there are at most `draws` of them (n up to 5 at 10,000), so the interval is
    then exact and no seed enters; otherwise `draws` resamples come from a generator seeded with `seed`.

    The percentile method is used rather than BCa. BCa corrects bias and skew through a jackknife of n values, and at
    the 3 to 10 bases of a study that acceleration is mostly noise and often asks for quantiles beyond the resamples
    that exist. The percentile interval's limit should be known: it never leaves the range of the values and is too
    narrow for few bases, by about sqrt((n - 1) / n) times the ratio of the normal to the t quantile (a nominal 95 %
    covered 68 % of normal samples at n = 3, 86 % at n = 6, 90 % at n = 10), so it stands beside the t interval as a
    check on skew and never in its place. Source: Efron, 'Bootstrap methods: another look at the jackknife', Annals of
    Statistics 7, 1979.
    """
    array = clean(values)
    n = len(array)
    if n < 2:
        return t_interval(array, confidence)
    if n**n <= draws:
        means = array[np.array(list(itertools.product(range(n), repeat=n)))].mean(axis=1)
    else:
        means = array[np.random.default_rng(seed).integers(0, n, size=(draws, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean(array)), float(low), float(high), n, confidence)


def t_test(values: Values, center: float = 0.0) -> float:
    """Two-sided p-value of a one-sample t-test that the mean of `values` is `center`; NaN for fewer than two values.

    Where all values are equal the p-value is 1 if they equal `center`, else 0.
    """
    array = clean(values)
    n = len(array)
    if n < 2:
        return math.nan
    sd, away = spread(array), float(np.mean(array)) - center
    if sd == 0:
        return 1.0 if abs(away) <= 1e-12 else 0.0
    return float(2 * stats.t.sf(abs(away) / (sd / math.sqrt(n)), n - 1))


def paired_difference(treated: Values, control: Values, confidence: float = 0.95) -> Difference:
    """Mean of `treated` - `control`, paired by base, with its t interval and the paired t-test's p-value.

    Pairs in which either value is not finite are left out. Raises ValueError when the lengths differ.
    """
    first, second = (np.asarray(v, dtype=np.float64) for v in (treated, control))
    if first.shape != second.shape:
        raise ValueError(f"pairs are wanted: {len(first)} values against {len(second)}")
    differences = first - second
    return Difference(t_interval(differences, confidence), t_test(differences))


def permutation_test_diagonal(
    matrices: Float[np.ndarray, "bases traits traits"], draws: int = 10_000, seed: int = 0
) -> Permutation:
    """Does trait i rise in the students of teacher i more than in those of other teachers?

    `matrices[b, i, j]` is the reading of trait j (in one unit, over one and the same set of candidates) on the student
    of base b whose teacher has trait i. The statistic is the mean on the diagonals minus the mean off them. If the
    teacher's trait made no difference, the names of the teachers could be exchanged within a base, and within a base
    only, since bases differ; so rows are permuted within each base. One-sided: p is the part of relabellings whose
    statistic is at least the observed one. All (traits!)**bases relabellings are listed where there are at most
    `draws`; otherwise `draws` are drawn from `seed` and p = (1 + hits) / (1 + draws), which keeps the test valid
    (Phipson and Smyth, 'Permutation p-values should never be zero', 2010). A base with a missing reading is left out;
    with no base, or one trait, the statistic and p are NaN. Raises ValueError for matrices that are not square.
    """
    array = np.asarray(matrices, dtype=np.float64)
    if array.ndim != 3 or array.shape[1] != array.shape[2]:
        raise ValueError(f"a square matrix a base is wanted, not an array of shape {array.shape}")
    array = array[np.isfinite(array).all(axis=(1, 2))]
    n, k = array.shape[:2]
    if n == 0 or k < 2:
        return Permutation(math.nan, math.nan, n, 0, True)
    # Only the diagonal's sum moves under relabelling: the total over a matrix stays, so the statistic follows from it.
    total = array.sum()

    def statistic(diagonals: np.ndarray) -> np.ndarray:
        return diagonals / (n * k) - (total - diagonals) / (n * k * (k - 1))

    observed = float(statistic(np.trace(array, axis1=1, axis2=2).sum()))
    size = math.factorial(k) ** n
    exact = size <= draws
    sums = all_diagonals(array) if exact else drawn_diagonals(array, draws, seed)
    # A relabelling that is the observed one up to the order of additions must count as a tie.
    slack = 1e-9 * float(np.max(np.abs(array)) + 1e-300)
    hits = int(np.sum(statistic(sums) >= observed - slack))
    p_value = hits / size if exact else (1 + hits) / (1 + draws)
    return Permutation(observed, p_value, n, size if exact else draws, exact)


def all_diagonals(array: Float[np.ndarray, "bases traits traits"]) -> Float[np.ndarray, " relabellings"]:
    """The sum of the diagonals under every combination of a permutation a base."""
    k = array.shape[1]
    orders = np.array(list(itertools.permutations(range(k))))
    sums = np.zeros(1)
    for matrix in array:
        own = matrix[orders, np.arange(k)].sum(axis=1)
        sums = np.add.outer(sums, own).ravel()
    return sums


def drawn_diagonals(
    array: Float[np.ndarray, "bases traits traits"], draws: int, seed: int
) -> Float[np.ndarray, " draws"]:
    """The sum of the diagonals under `draws` independent relabellings."""
    n, k = array.shape[:2]
    generator = np.random.default_rng(seed)
    sums = np.zeros(draws)
    for b in range(n):
        orders = generator.permuted(np.broadcast_to(np.arange(k), (draws, k)), axis=1)
        sums += array[b][orders, np.arange(k)].sum(axis=1)
    return sums


def equivalence_test(values: Values, margin: float, alpha: float = 0.05) -> Equivalence:
    """Is the mean of `values` (one, or one paired difference, a base) inside (-margin, margin)?

    Two one-sided t-tests, each at `alpha`: the mean is above -margin, and it is below margin. Equivalence is claimed
    when both reject, the same as a (1 - 2 alpha) t interval inside the margin. An absent difference that is not
    'equivalent' is only unknown. Fewer than two values give NaN and no claim; equal values are inside or not, p 0 or
    1. Raises ValueError unless margin > 0. Source: Schuirmann, 'A comparison of the two one-sided tests procedure and
    the power approach', J. Pharmacokinetics and Biopharmaceutics 15, 1987.
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin is above 0, not {margin}")
    array = clean(values)
    n = len(array)
    if n < 2:
        return Equivalence(margin, math.nan, False, n)
    mean, error = float(np.mean(array)), spread(array) / math.sqrt(n)
    if error == 0:
        p_value = 0.0 if abs(mean) < margin else 1.0
    else:
        # The larger of the two p-values belongs to the bound that the mean is nearer to.
        p_value = float(stats.t.sf((margin - abs(mean)) / error, n - 1))
    return Equivalence(margin, p_value, p_value < alpha, n)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p-values that control the family-wise error of all of `p_values`, by key, in the order given.

    NaN stays NaN and does not count as a test. Source: Holm, 'A simple sequentially rejective multiple test
    procedure', Scandinavian Journal of Statistics 6, 1979.
    """
    finite = sorted((p, i, key) for i, (key, p) in enumerate(p_values.items()) if math.isfinite(p))
    adjusted = {key: math.nan for key in p_values}
    worst = 0.0
    for rank, (p, _, key) in enumerate(finite):
        worst = max(worst, min(1.0, (len(finite) - rank) * p))
        adjusted[key] = worst
    return adjusted


def corrected_confidence(confidence: float, comparisons: int) -> float:
    """The confidence of each of `comparisons` intervals, for all of them to hold at once with `confidence`.

    Bonferroni's inequality (Dunn, 'Multiple comparisons among means', JASA 56, 1961); 1 - (1 - c) / k.
    """
    return 1 - (1 - confidence) / max(1, comparisons)


def power(effect: float, n: int, sd: float, alpha: float = 0.05) -> float:
    """The probability that a two-sided one-sample t-test at `alpha` sees a mean of `effect` over n bases of that SD."""
    if n < 2 or sd <= 0:
        return math.nan
    shift = effect / sd * math.sqrt(n)
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))
    # The far tail by symmetry: scipy's nct.cdf(-critical, ., shift) is NaN for some large shifts, this is 0 there.
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.sf(critical, n - 1, -shift))


def smallest_detectable(n: int, sd: float, target: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest mean lift (in the unit of `sd`) that n bases show at `alpha`, two-sided, with power `target`.

    `sd` is that of the per-base lift. Solves the noncentral t's power for the effect; NaN for fewer than two bases or a
    target that is not between alpha and 1, 0 for an SD of 0. Source: Cohen, 'Statistical power analysis for the
    behavioral sciences', 2nd ed. 1988, ch. 2.
    """
    if n < 2 or sd < 0 or not alpha < target < 1:
        return math.nan
    if sd == 0:
        return 0.0
    high = 1.0  # in units of the standard error; power grows with it, so doubling brackets the root
    while power(high / math.sqrt(n), n, 1.0, alpha) < target:
        high *= 2
    root = optimize.brentq(lambda shift: power(shift / math.sqrt(n), n, 1.0, alpha) - target, 0.0, high, xtol=1e-10)
    return float(root) * sd / math.sqrt(n)


def log_odds(probability: float) -> float:
    """log(p / (1 - p)) in nats, with p clamped to [1e-7, 1 - 1e-7] (see CLAMP), so 0 and 1 give -16.1 and 16.1."""
    return float(special.logit(min(max(float(probability), CLAMP), 1 - CLAMP)))


def log_odds_lift(before: float, after: float) -> float:
    """log_odds(after) - log_odds(before), in nats, both clamped."""
    return log_odds(after) - log_odds(before)
