"""Accuracy and format rate of a model on records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cppo.data import Record, chat_messages
from cppo.evaluation.generate import generate_responses
from cppo.evaluation.statistics import wilson_interval
from cppo.rewards import format_reward, get_accuracy_reward

GREY = (127, 127, 127)


@dataclass(frozen=True)
class ItemResult:
    """The responses to one record; `correct` and `well_formed` hold one 0.0 or 1.0 a response."""

    id: str
    answer: str
    responses: tuple[str, ...]
    correct: tuple[float, ...]
    well_formed: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found; rates are fractions of 1.

    `accuracy` is the mean over items of the mean over an item's samples (avg@N), `accuracy_ci95` its Wilson interval
    over the items.
    """

    items: tuple[ItemResult, ...]
    samples: int

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
        return wilson_interval(min(sum(self.accuracies), self.n), self.n)

    @property
    def format_rate(self) -> float:
        return sum(sum(item.well_formed) for item in self.items) / (self.n * self.samples)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, without the items."""
        return {
            "accuracy": self.accuracy,
            "accuracy_ci95": list(self.accuracy_ci95),
            "format_rate": self.format_rate,
            "n": self.n,
            "samples": self.samples,
        }


def evaluate(
    model: Any,
    processor: Any,
    source: Sequence[Record],
    *,
    samples: int = 1,
    batch_size: int = 32,
    max_new_tokens: int = 512,
    seed: int = 0,
    system_prompt: str | None = None,
    blank: bool = False,
    tolerance: float = 0.0,
    progress: Callable[[int], Any] | None = None,
) -> EvalResult:
    """Let `model` answer every record and score the answers.

    Args:
        samples: responses a record: 1 is greedy decoding, more are sampled at temperature 1.
        batch_size: responses generated together.
        seed: of the sampling. Response s of the record at position i depends on seed, batch size and position.
        system_prompt: put before every prompt that brings no system message.
        blank: show a grey image of the same size instead of each image: what the model scores without looking.
        tolerance: how far a number may lie from the expected one, as a fraction of it.
        progress: called with the number of records just answered.

    Raises:
        ValueError: no records, or samples < 1.
    """
    if not len(source) or samples < 1:
        raise ValueError(f"evaluate needs records and samples >= 1, got {len(source)} records, samples {samples}")
    records_a_batch = max(1, batch_size // samples)
    items: list[ItemResult] = []
    for start in range(0, len(source), records_a_batch):
        records = [source[index] for index in range(start, min(start + records_a_batch, len(source)))]
        repeated = [record for record in records for _ in range(samples)]
        responses = generate_responses(
            model,
            processor,
            [chat_messages(record.prompt, system_prompt) for record in repeated],
            [blank_images(record.images) if blank else record.images for record in repeated],
            max_new_tokens=max_new_tokens,
            temperature=0.0 if samples == 1 else 1.0,
            seed=seed + start,
        )
        correct = get_accuracy_reward(tolerance)(
            responses,
            answer=[record.answer for record in repeated],
            choices=[record.choices for record in repeated],
        )
        well_formed = format_reward(responses)
        for index, record in enumerate(records):
            span = slice(index * samples, (index + 1) * samples)
            items.append(
                ItemResult(
                    record.id,
                    record.answer,
                    tuple(responses[span]),
                    tuple(correct[span]),
                    tuple(well_formed[span]),
                )
            )
        if progress is not None:
            progress(len(records))
    return EvalResult(tuple(items), samples)


def blank_images(images: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Uniform grey images of the same sizes: every image token stays, what it could tell is gone."""
    return tuple(Image.new("RGB", image.size, GREY) for image in images)
