"""Results of an evaluation: the responses to each record, their scores, rates with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cppo.evaluation.statistics import mean_interval, pass_at_k


@dataclass(frozen=True)
class ItemResult:
    """The responses to one record; `correct` and `well_formed` hold one 0.0 or 1.0 a response.

    `images` is the record's number of images; `choices` are its options' texts, empty if it has no options.
    """

    id: str
    answer: str
    responses: tuple[str, ...]
    correct: tuple[float, ...]
    well_formed: tuple[float, ...]
    images: int
    choices: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Rate:
    """A mean over items with its 95 % interval (`mean_interval`), fractions of 1."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Rate":
        """From one score in [0, 1] an item. Raises ValueError if there is none."""
        return cls(min(sum(values) / len(values), 1.0), *mean_interval(values))


@dataclass(frozen=True)
class EvalResult:
    """Result of `evaluate`; rates are fractions of 1.

    `accuracy` is the mean over items of the mean over an item's samples (avg@N), `accuracy_ci95` its interval over the
    items (`mean_interval`). `condition` names how the images were shown.
    """

    items: tuple[ItemResult, ...]
    samples: int
    condition: str = "clean"

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each item."""
        return [item.accuracy for item in self.items]

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies) / self.n

    @property
    def accuracy_ci95(self) -> tuple[float, float]:
        return mean_interval(self.accuracies)

    @property
    def format_rate(self) -> float:
        return sum(sum(item.well_formed) for item in self.items) / (self.n * self.samples)

    def pass_at(self, k: int) -> Rate:
        """Unbiased estimate of the share of items solved in k attempts (`pass_at_k`), k at most `samples`."""
        return Rate.of([pass_at_k(self.samples, round(sum(item.correct)), k) for item in self.items])

    def to_dict(self, ks: Sequence[int] = ()) -> dict[str, Any]:
        """The results as JSON values, without the items; with pass@k for each of `ks`."""
        figures = {
            "accuracy": self.accuracy,
            "accuracy_ci95": list(self.accuracy_ci95),
            "format_rate": self.format_rate,
            "n": self.n,
            "samples": self.samples,
        }
        if ks:
            rates = {k: self.pass_at(k) for k in ks}
            figures["pass_at_k"] = {str(k): {"mean": r.mean, "ci95": [r.low, r.high]} for k, r in rates.items()}
        return figures
