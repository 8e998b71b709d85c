"""Intervals against their defining equation, known values and brute force."""

import math
import random
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from cppo.evaluation.statistics import (
    CrossedMean,
    MeanInterval,
    bootstrap_interval,
    crossed_mean,
    mean_interval,
    paired_bootstrap,
    pass_at_k,
    t_interval,
)

Z = 1.959963984540054


def marks(right, n):
    """Scores of n items of which so many are right."""
    return [1.0] * right + [0.0] * (n - right)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (521, 1000), (999, 1000)])
def test_wilson_bounds_solve_the_defining_equation(successes, n):
    fraction = successes / n
    for bound in mean_interval(marks(successes, n)):
        assert abs(fraction - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


def test_wilson_published_values():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3 (score, no continuity correction)
    for successes, n, expected in [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ]:
        assert mean_interval(marks(successes, n)) == pytest.approx(expected, abs=5e-5)


def test_wilson_at_the_ends():
    low, high = mean_interval(marks(0, 10)), mean_interval(marks(10, 10))
    assert (low[0], high[1]) == (0.0, 1.0)
    assert low[1] == pytest.approx(1 - high[0], abs=1e-12)


def test_bootstrap_agrees_with_resampling_item_by_item():
    rng = random.Random(0)
    before = [float(rng.random() < 0.5) for _ in range(200)]
    after = [max(value, float(rng.random() < 0.3)) for value in before]
    found = paired_bootstrap(before, after, seed=1)
    differences = np.array(after) - np.array(before)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-12)
    picks = np.random.default_rng(7).integers(0, 200, size=(10_000, 200))
    low, high = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
    # one item of 200 is 0.005: the two resamplings may differ by that, never by more
    assert abs(found.low - low) < 0.0051
    assert abs(found.high - high) < 0.0051
    assert found.low < found.mean < found.high


def test_bootstrap_ends_are_the_2_5_and_the_97_5_percentile():
    """Of ten equally likely scores' sum, by convolution; both lie six standard errors from the next sum's."""
    chances = np.ones(1)
    for _ in range(10):
        chances = np.convolve(chances, np.full(10, 0.1))
    low, also_low, also_high, high = np.searchsorted(chances.cumsum(), (0.025, 0.03, 0.97, 0.975))
    assert low < also_low
    assert also_high < high
    assert bootstrap_interval(range(10), resamples=400_000) == pytest.approx((low / 10, high / 10), abs=1e-12)


def test_bootstrap_depends_on_the_seed_alone():
    rng = random.Random(1)
    before, after = [rng.random() for _ in range(35)], [rng.random() for _ in range(35)]
    np.random.seed(0)  # noqa: NPY002 - shows that the global state plays no part
    first = paired_bootstrap(before, after, seed=3)
    np.random.seed(1)  # noqa: NPY002
    assert paired_bootstrap(before, after, seed=3) == first
    assert paired_bootstrap(before, after, seed=4) != first


def test_bootstrap_of_equal_scores_is_zero():
    found = paired_bootstrap([1.0, 0.0], [1.0, 0.0], seed=0)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0])])
def test_bootstrap_refuses(before, after):
    with pytest.raises(ValueError, match="paired_bootstrap"):
        paired_bootstrap(before, after, seed=0)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct in range(n + 1):
        right = [place < correct for place in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(right, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 1, 0), (3, 1, 4), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses(n, correct, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, correct, k)


def test_a_mean_of_fractions_gets_a_bootstrap_and_a_proportion_wilsons():
    rng = random.Random(2)
    values = [rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(300)]
    low, high = mean_interval(values)
    assert (low, high) == bootstrap_interval(values)
    # the normal approximation, from which a bootstrap of 300 items with 10,000 resamples is not far
    half = Z * np.std(values) / math.sqrt(300)
    assert low == pytest.approx(np.mean(values) - half, abs=0.002)
    assert high == pytest.approx(np.mean(values) + half, abs=0.002)
    assert mean_interval(values) == (low, high)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_t_interval_of_known_values():
    """n = 5, mean 3, s = sqrt(2.5), and t(0.975, 4) = 2.776445 from the table."""
    found = t_interval([1, 2, 3, 4, 5])
    half = 2.776445105 * math.sqrt(2.5 / 5)
    assert (found.mean, found.n) == (3.0, 5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-9)


def test_t_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(4000, 5))
    intervals = [t_interval(row) for row in draws]
    covered = np.mean([found.low <= 0.3 <= found.high for found in intervals])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_t_interval_of_one_value_has_no_ends():
    assert t_interval([0.5]) == MeanInterval(0.5, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def crossed_draws(rng, seed_spread, item_spread, seeds=6, items=80):
    """Two tasks whose differences have a part of each seed, which they share, one of each item, and noise."""
    of_seeds = rng.normal(0, seed_spread, (seeds, 1))
    return [of_seeds + rng.normal(0, item_spread, (1, items)) + rng.normal(0, 0.4, (seeds, items)) for _ in range(2)]


@pytest.mark.parametrize(("seed_spread", "item_spread"), [(0.03, 0.2), (0.0, 0.4), (0.1, 0.0)])
def test_crossed_intervals_cover_the_mean_for_new_seeds_and_items(seed_spread, item_spread):
    rng = np.random.default_rng(1)
    draws = [crossed_draws(rng, seed_spread, item_spread) for _ in range(800)]
    found = [crossed_mean(draw) for draw in draws]
    covered = np.mean([one.low <= 0.0 <= one.high for one in found])
    assert 0.93 <= covered <= 0.99
    assert all((one.p_value < 0.05) == (one.low > 0 or one.high < 0) for one in found)
    if item_spread > 0.3:  # where items differ, the interval over seeds is too short
        by_seed = [t_interval(np.mean([task.mean(axis=1) for task in draw], axis=0)) for draw in draws]
        assert np.mean([one.low <= 0.0 <= one.high for one in by_seed]) < 0.85


def test_crossed_interval_where_only_seeds_or_only_items_differ():
    """Then it is Student's interval over those."""
    values = np.random.default_rng(2).normal(size=12)
    found = t_interval(values)
    by_seed, by_item = np.repeat(values[:, None], 30, axis=1), np.repeat(values[None], 5, axis=0)
    expected = found.low, found.high, ttest_1samp(values, 0).pvalue
    for draw in (by_seed, by_item):
        one = crossed_mean([draw])
        assert (one.low, one.high, one.p_value) == pytest.approx(expected)
    assert crossed_mean([by_seed[:1]]) is None
    assert crossed_mean([np.ones((3, 4))]) == CrossedMean(1.0, 1.0, 0.0)
    assert crossed_mean([np.zeros((3, 4))]) == CrossedMean(0.0, 0.0, 1.0)
