"""Intervals for fractions and for differences of paired fractions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `after - before` over the same items, with its 95 % interval (fractions of 1)."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, seed: int, resamples: int = 10_000
) -> PairedDifference:
    """Percentile bootstrap of the mean difference over items (Efron 1979); each resample draws whole items.

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
    rng = np.random.default_rng(seed)
    # Only how many items take which value matters, and right-or-wrong differences take three: few bins, fast draws.
    values, counts = np.unique(differences, return_counts=True)
    draws = rng.multinomial(len(differences), counts / counts.sum(), size=resamples)
    low, high = np.quantile(draws @ values / len(differences), [0.025, 0.975])
    return PairedDifference(mean=float(differences.mean()), low=float(low), high=float(high))
