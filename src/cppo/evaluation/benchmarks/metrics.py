"""The benchmarks' metrics: from sums over units (a problem, a seed question, an image) to figures.

A figure is computed for each sample of all questions, as the harnesses do for one run, and averaged over the samples.
Its 95 % interval is the percentile bootstrap over units, since rows of a unit are not independent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cppo.evaluation.benchmarks.answers import final_answer, yes_or_no
from cppo.evaluation.results import Rate
from cppo.evaluation.statistics import mean_interval

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1_000

Sums = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Judged:
    """One response to one question; `facts` are the question's own, by name."""

    facts: Mapping[str, str]
    answer: str
    response: str
    correct: bool


@dataclass(frozen=True)
class Metric:
    """Figures from sums.

    Attributes:
        counts: maps one sample of one unit to named counts, which are summed over the units.
        figures: maps these sums, arrays of any shape, to fractions of 1 of the same shape. The first is the headline.
    """

    counts: Callable[[Sequence[Judged]], Mapping[str, float]]
    figures: Mapping[str, Callable[[Sums], np.ndarray]]


@dataclass(frozen=True)
class Figures:
    """The figures of one benchmark by name, and the headline of each resample [RESAMPLES]."""

    rates: Mapping[str, Rate]
    headline_draws: np.ndarray

    @property
    def headline(self) -> Rate:
        return next(iter(self.rates.values()))


def compute(metric: Metric, units: Sequence[Sequence[Sequence[Judged]]], *, seed: int) -> Figures:
    """The figures of `units`: for each unit and sample its rows.

    If every unit is one row with one sample, the headline's interval is Wilson's (`mean_interval`): the bootstrap's has
    no width if all are equal. `seed` is of the resampling, another one for each benchmark (`mean_of`). Raises
    ValueError without units.
    """
    if not units:
        raise ValueError("compute: there are no units")
    counted = [[metric.counts(rows) for rows in samples] for samples in units]
    names = list(counted[0][0])
    counts = np.array([[[sums[name] for name in names] for sums in samples] for samples in counted], dtype=np.float64)
    totals = _figures(metric, names, counts.sum(axis=0))
    draws = _resampled(metric, names, counts, np.random.default_rng(seed))
    rates = {name: Rate(float(totals[name]), *_percentiles(draws[name])) for name in metric.figures}
    headline = next(iter(metric.figures))
    scores = _figures(metric, names, counts)[headline]  # of each single unit
    if all(len(samples) == len(samples[0]) == 1 for samples in units) and set(scores.tolist()) <= {0.0, 1.0}:
        rates[headline] = Rate(rates[headline].mean, *mean_interval(scores.tolist()))
    return Figures(rates, draws[headline])


def mean_of(benchmarks: Sequence[Figures]) -> Rate:
    """The plain mean of headlines, with an interval from their independent resamples."""
    draws = np.mean([one.headline_draws for one in benchmarks], axis=0)
    return Rate(sum(one.headline.mean for one in benchmarks) / len(benchmarks), *_percentiles(draws))


def _figures(metric: Metric, names: Sequence[str], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Figures [...], averaged over samples, of counts [..., samples, names]."""
    sums = {name: counts[..., place] for place, name in enumerate(names)}
    return {name: figure(sums).mean(axis=-1) for name, figure in metric.figures.items()}


def _resampled(
    metric: Metric, names: Sequence[str], counts: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Figures of RESAMPLES draws of as many units with replacement, each [RESAMPLES]."""
    units = len(counts)
    parts = []
    for _ in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        weights = rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES_AT_ONCE).astype(np.float64)
        parts.append(_figures(metric, names, np.tensordot(weights, counts, axes=1)))
    return {name: np.concatenate([part[name] for part in parts]) for name in metric.figures}


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`; 0 if `whole` is 0."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def share(part: str, whole: str) -> Callable[[Sums], np.ndarray]:
    """A figure: one sum as a fraction of another."""
    return lambda sums: ratio(sums[part], sums[whole])


def _right(rows: Sequence[Judged]) -> dict[str, float]:
    return {"right": sum(row.correct for row in rows), "rows": len(rows)}


ACCURACY = Metric(_right, {"accuracy": share("right", "rows")})

WORST_CASE = Metric(
    lambda rows: {**_right(rows), "seeds": 1, "seeds right": all(row.correct for row in rows)},
    {"average": share("right", "rows"), "worst case": share("seeds right", "seeds")},
)
"""DynaMath's: in the worst case a seed question counts only if all of its variants are right."""


def _four_dimensions(rows: Sequence[Judged]) -> dict[str, float]:
    steps = [row.correct for row in rows if not row.facts["key"].endswith("multi")]
    whole = [row.correct for row in rows if row.facts["key"].endswith("multi")]
    kept = bool(steps and whole)  # a problem with a missing row is in none of the four
    right = kept and whole[0]
    wrong = kept and not whole[0]
    return {
        "problems": kept,
        "IK": wrong and not all(steps),
        "IG": wrong and all(steps),
        "CM strict": right and all(steps),
        "CM loose": right and any(steps),
        "RM strict": right and not all(steps),
        "RM loose": right and not any(steps),
        "steps": len(steps),
        "steps right": sum(steps),
        **{f"{n} steps": len(whole) if len(steps) == n else 0 for n in (2, 3)},
        **{f"{n} steps right": sum(whole) if len(steps) == n else 0 for n in (2, 3)},
    }


def _mastery(kind: str) -> Callable[[Sums], np.ndarray]:
    return lambda n: ratio(n["problems"] - 0.5 * n["IG"] - n[f"RM {kind}"] - n["IK"], n["problems"])


FOUR_DIMENSIONS = Metric(
    _four_dimensions,
    {
        "score (strict)": _mastery("strict"),
        "score (loose)": _mastery("loose"),
        "insufficient knowledge": share("IK", "problems"),
        "inadequate generalization": share("IG", "problems"),
        "complete mastery (strict)": share("CM strict", "problems"),
        "complete mastery (loose)": share("CM loose", "problems"),
        "rote memorization (strict)": lambda n: ratio(n["RM strict"], n["RM strict"] + n["CM strict"]),
        "rote memorization (loose)": lambda n: ratio(n["RM loose"], n["RM loose"] + n["CM loose"]),
        "one step": share("steps right", "steps"),
        "two steps": share("2 steps right", "2 steps"),
        "three steps": share("3 steps right", "3 steps"),
    },
)
"""We-Math's: a problem of two or three steps is also asked step by step; all answers together classify it."""


def _yes_counts(rows: Sequence[Judged]) -> dict[str, float]:
    pairs = [(row.answer == "yes", yes_or_no(final_answer(row.response)) == "yes") for row in rows]
    return {**_right(rows), "hit": pairs.count((True, True)), "wrong": sum(truth != said for truth, said in pairs)}


YES_F1 = Metric(
    _yes_counts, {"F1": lambda n: ratio(2 * n["hit"], 2 * n["hit"] + n["wrong"]), "accuracy": share("right", "rows")}
)
"""POPE's: F1 of the answer yes (an answer that is neither counts as no), and accuracy."""


def _consistency(rows: Sequence[Judged]) -> dict[str, float]:
    figures = [all(r.correct for r in rows if r.facts["figure"] == one) for one in {r.facts["figure"] for r in rows}]
    asked = [all(r.correct for r in rows if r.facts["question"] == one) for one in {r.facts["question"] for r in rows}]
    return {
        **_right(rows),
        "figures": len(figures),
        "figures right": sum(figures),
        "questions": len(asked),
        "questions right": sum(asked),
    }


CONSISTENCY = Metric(
    _consistency,
    {
        "aAcc": share("right", "rows"),
        "fAcc": share("figures right", "figures"),
        "qAcc": share("questions right", "questions"),
    },
)
"""HallusionBench's: right answers; figures with right answers only; questions with right answers only."""
