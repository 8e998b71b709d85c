"""A cell's measurements of its present model: accuracy under every condition, and the detectors' quality."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cppo.data import RecordSource
from cppo.evaluation import EvalResult, evaluate, get_condition
from cppo.evaluation.dependency import score_dependency
from cppo.evaluation.detectors import detector_quality, token_truth
from cppo.evaluation.generate import evaluation_mode
from cppo.perception import DEPENDENCY_SCORES, select_perception_tokens
from cppo.views import ViewSampler

BATCH = 128
DETECTOR_BATCH = 25


@dataclass(frozen=True)
class Measurement:
    """How a study evaluates the models of a task; the same for all methods.

    Attributes:
        records: the held-out items, answered greedily.
        conditions: how their images are shown.
        detector_items: number of first records on which the dependency scores are judged.
        sampler: draws their I-, and holds the training views.
        top_fraction: share of the tokens with a positive score that the published rule selects.
    """

    records: RecordSource
    conditions: Sequence[str]
    detector_items: int
    sampler: ViewSampler
    top_fraction: float
    max_new_tokens: int
    system_prompt: str | None
    tolerance: float

    def take(self, model: Any, processor: Any) -> dict[str, Any]:
        """JSON values: `correct` (a text of 0 and 1, one an item) and `format_rate` by condition; `detectors`.

        Torch's random state is restored: training continues as without the measurement.
        """
        with torch.random.fork_rng():
            found = {condition: self._answer(model, processor, condition) for condition in self.conditions}
            detectors = self._detectors(model, processor)
        return {
            "correct": {
                name: "".join(str(int(one.correct[0])) for one in result.items) for name, result in found.items()
            },
            "format_rate": {name: round(result.format_rate, 4) for name, result in found.items()},
            "detectors": detectors,
        }

    def _answer(self, model: Any, processor: Any, condition: str) -> EvalResult:
        return evaluate(
            model,
            processor,
            self.records,
            batch_size=BATCH,
            max_new_tokens=self.max_new_tokens,
            system_prompt=self.system_prompt,
            tolerance=self.tolerance,
            condition=get_condition(condition, self.sampler),
        )

    def _detectors(self, model: Any, processor: Any) -> dict[str, dict[str, Any]]:
        """Quality of every dependency score on greedy responses, by score; {} without known perception tokens."""
        count = min(self.detector_items, len(self.records))
        records = [self.records[index] for index in range(count)]
        records = [record for record in records if record.images and record.perception_spans is not None]
        scores: dict[str, list[float]] = {name: [] for name in DEPENDENCY_SCORES}
        selected: dict[str, list[bool]] = {name: [] for name in DEPENDENCY_SCORES}
        truth: list[bool] = []
        with evaluation_mode(model):
            for start in range(0, len(records), DETECTOR_BATCH):
                part = records[start : start + DETECTOR_BATCH]
                scored = score_dependency(
                    model,
                    processor,
                    part,
                    {"removing": self.sampler},
                    max_new_tokens=self.max_new_tokens,
                    system_prompt=self.system_prompt,
                )
                mask = scored.mask
                for record, ids in zip(part, scored.rows, strict=True):
                    truth += [bool(true) for true in token_truth(processor, ids, record)]
                for name, values in scored.scores["removing"].items():
                    scores[name] += values[mask].tolist()
                    selected[name] += select_perception_tokens(values, mask, self.top_fraction)[mask].tolist()
        found = {name: detector_quality(scores[name], selected[name], truth) for name in DEPENDENCY_SCORES}
        return {name: _rounded(asdict(quality)) for name, quality in found.items() if quality is not None}


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
