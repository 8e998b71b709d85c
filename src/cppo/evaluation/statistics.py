"""Intervals for fractions, for differences of paired fractions, and for means over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a binomial fraction (Wilson 1927): its ends p solve |s/n - p| = z sqrt(p(1-p)/n).

    Args:
        successes: number of successes in [0, n]. It may be fractional: the sum of per-item means of several samples.
            The interval is then wider than needed, since an item's mean varies less than one sample of it.
        n: number of independent items.
        z: half-width in standard deviations; the default gives 95 %.

    Returns:
        (low, high), fractions of 1.

    Raises:
        ValueError: n < 1, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval needs n >= 1 and 0 <= successes <= n, got {successes} of {n}")
    fraction = successes / n
    shrink = 1 / (1 + z * z / n)
    centre = shrink * (fraction + z * z / (2 * n))
    half = shrink * z * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    # The bounds at 0 and n successes are exactly 0 and 1; rounding would leave them a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean over items, 95 % (Efron 1979); each resample draws whole items.

    Args:
        values: one per item, not empty. Where all are equal the interval has no width.
        seed: of the resampling; nothing else is random.

    Returns:
        (low, high).
    """
    means = bootstrap_means(values, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(values: Sequence[float] | np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of `resamples` draws with replacement of as many items as there are; shape [resamples]."""
    # Only how many items take which value matters, and right-or-wrong values are few: few bins, fast draws.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    draws = rng.multinomial(len(values), counts / counts.sum(), size=resamples)
    return draws @ distinct / len(values)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of scores in [0, 1]: Wilson's where every item scores 0 or 1, else the bootstrap's.

    Raises:
        ValueError: there are no values.
    """
    if set(values) <= {0.0, 1.0}:
        return wilson_interval(sum(values), len(values))
    return bootstrap_interval(values)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n responses, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of solving an item in k attempts (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: not 1 <= k <= n and 0 <= correct <= n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= correct <= n, got k {k}, {correct} of {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `after - before` over the same items, with its 95 % interval (fractions of 1)."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, seed: int, resamples: int = 10_000
) -> PairedDifference:
    """The mean difference over items with its `bootstrap_interval`.

    Args:
        before, after: scores of the same items in the same order, e.g. 1.0 for right and 0.0 for wrong.
        seed: of the resampling; nothing else is random.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"paired_bootstrap needs two equally long, non-empty lists, got {len(before)} and {len(after)}"
        )
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    low, high = bootstrap_interval(differences.tolist(), seed=seed, resamples=resamples)
    return PairedDifference(mean=float(differences.mean()), low=low, high=high)


@dataclass(frozen=True)
class MeanInterval:
    """A mean over `n` runs with its 95 % interval; the ends are None where a single run leaves nothing to judge by."""

    mean: float
    low: float | None
    high: float | None
    n: int


def t_interval(values: Sequence[float]) -> MeanInterval:
    """Student's interval of the mean of independent values, one per seed: mean -+ t s / sqrt(n) with n - 1 degrees.

    Of paired differences (same seed, same data, two methods) it is the paired t interval.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("t_interval needs at least one value")
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return MeanInterval(mean, None, None, 1)
    half = float(student_t.ppf(0.975, n - 1)) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return MeanInterval(mean, mean - half, mean + half, n)
