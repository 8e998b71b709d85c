"""Intervals for fractions, for differences of paired fractions, and for means over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean over items, 95 % (Efron 1979); each resample draws whole items.

    Args:
        values: one per item, not empty. If all are equal the interval has no width.
        seed: of the resampling; nothing else is random.

    Returns:
        (low, high).
    """
    means = bootstrap_means(values, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(values: Sequence[float] | np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of `resamples` draws with replacement of as many items as there are; shape [resamples]."""
    # A mean depends only on how many items take each value; few distinct values give few bins and fast draws.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    draws = rng.multinomial(len(values), counts / counts.sum(), size=resamples)
    return draws @ distinct / len(values)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of scores in [0, 1]: Wilson's if every item scores 0 or 1, else the bootstrap's.

    Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("mean_interval: there are no values")
    if set(values) <= {0.0, 1.0}:
        low, high = binomtest(round(sum(values)), len(values)).proportion_ci(0.95, method="wilson")
        return float(low), float(high)
    return bootstrap_interval(values)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n responses, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of solving an item in k attempts (Chen et al. 2021, arXiv 2107.03374). Raises ValueError
    unless 1 <= k <= n and 0 <= correct <= n.
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


def paired_bootstrap(before: Sequence[float], after: Sequence[float], *, seed: int) -> PairedDifference:
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
    low, high = bootstrap_interval(differences.tolist(), seed=seed)
    return PairedDifference(mean=float(differences.mean()), low=low, high=high)


@dataclass(frozen=True)
class MeanInterval:
    """A mean over `n` runs with its 95 % interval; a single run has no interval (None, None)."""

    mean: float
    low: float | None
    high: float | None
    n: int


def t_interval(values: Sequence[float]) -> MeanInterval:
    """Student's interval of the mean of independent values, one per seed: mean -+ t s / sqrt(n) with n - 1 degrees.

    For paired differences (same seed, same data, two methods) it is the paired t interval. Raises ValueError without
    values.
    """
    if not len(values):
        raise ValueError("t_interval needs at least one value")
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return MeanInterval(mean, None, None, 1)
    half = float(student_t.ppf(0.975, n - 1)) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return MeanInterval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class CrossedMean:
    """A mean over both seeds and items: its 95 % interval, and its p value against a true mean of 0."""

    low: float
    high: float
    p_value: float


def crossed_mean(tasks: Sequence[np.ndarray]) -> CrossedMean | None:
    """A mean difference with its uncertainty over both seeds and items; each seed answers each item.

    Seeds and items are crossed random effects. The mean's variance is the variance from the seeds' means, plus the
    variance from the items' means, minus their residual, which both contain. Degrees of freedom are Satterthwaite's
    (1946). The estimated sum can fall below one of its parts, so the larger part is its lower bound.

    Args:
        tasks: for each task [seeds, items], a difference for each (say 1, 0 or -1). Tasks count equally; they have the
            same seeds in the same order, and different items.

    Returns:
        None for a single seed or item.
    """
    if any(min(one.shape) < 2 for one in tasks):
        return None
    by_seed = np.mean([one.mean(axis=1) for one in tasks], axis=0)
    seeds = len(by_seed)
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    of_items = [float(one.mean(axis=0).var(ddof=1)) / one.shape[1] / len(tasks) ** 2 for one in tasks]
    of_both = 0.0
    for one in tasks:
        rest = one - one.mean(axis=1, keepdims=True) - one.mean(axis=0, keepdims=True) + one.mean()
        degrees = (one.shape[0] - 1) * (one.shape[1] - 1)
        of_both += float((rest**2).sum()) / degrees / one.size / len(tasks) ** 2
    variance = max(of_seeds + sum(of_items) - of_both, of_seeds, sum(of_items))
    mean = float(by_seed.mean())
    if variance == 0.0:
        return CrossedMean(mean, mean, float(mean == 0.0))
    spread = of_seeds**2 / (seeds - 1)
    spread += sum(part**2 / (one.shape[1] - 1) for part, one in zip(of_items, tasks, strict=True))
    freedom, error = variance**2 / spread, math.sqrt(variance)
    half = float(student_t.ppf(0.975, freedom)) * error
    return CrossedMean(mean - half, mean + half, 2 * float(student_t.sf(abs(mean) / error, freedom)))
