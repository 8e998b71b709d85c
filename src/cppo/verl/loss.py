"""The loss of a micro-batch inside verl: verl's own plus the perception loss of the gated-in rollouts.

verl calls it with the log-probabilities and entropies of rows. The rows of a gated-in rollout are adjacent (`rows`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import no_padding_2_padding

from cppo.perception import METRICS, ResponseScores, ViewScores, detect, perception_loss
from cppo.verl.options import VerlOptions
from cppo.verl.rows import ANCHOR, ROLE

WEIGHT = "cppo_weight"
"""Batch entry: weight of each rollout in the perception loss; 0 where it is gated out."""
DRAWS = "cppo_draws"
"""Batch entry: uniform random numbers of each response token, for random selection."""
NORMALIZER = "cppo_normalizer"
"""Batch entry: divisor of the update's perception loss over all ranks, as for `perception_loss`."""
SUM, COUNT = "/sum", "/count"
"""Suffixes of the two parts of a mean in a micro-batch's metrics."""

Loss = Callable[..., tuple[Tensor, dict[str, Any]]]


def view_logps(kind: str) -> str:
    """The batch entry of log-probabilities under a view, computed before the updates."""
    return f"cppo_{kind}_logps"


def view_entropies(kind: str) -> str:
    """The batch entry of entropies under such a view."""
    return f"cppo_{kind}_entropies"


@dataclass
class CPPOLoss:
    """A loss function of verl's workers.

    Attributes:
        verls: verl's loss, to which this one adds; called as verl calls it.
        options: of the method.
        watch: called with the scores of each micro-batch's gated-in rollouts, for inspection; it changes nothing.
    """

    verls: Loss
    options: VerlOptions
    watch: Callable[[TensorDict, ViewScores], None] | None = field(default=None, repr=False)

    def __call__(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch and its metrics, as verl adds them up over micro-batches and ranks."""
        loss, metrics = self._verls_own(model_output, data, dp_group)
        if ROLE not in data:
            return loss, metrics
        loss = self.options.rl_weight * loss
        rows = (data[ROLE] == ANCHOR).nonzero().squeeze(1)
        sums: dict[str, tuple[float, float]] = {}
        if len(rows):
            scores = detect(self._scores(model_output, data, rows), self.options)
            if self.watch is not None:
                self.watch(data, scores)
            # verl averages the ranks' gradients, so each rank's sum is multiplied by the number of ranks.
            normalizer = tu.get(data, NORMALIZER) / data["dp_size"]
            term, found = perception_loss(scores, self.options, normalizer, data[WEIGHT][rows])
            loss = loss + term
            sums = {name: (float(total), float(count)) for name, (total, count) in found.items()}
        for name in METRICS:
            for end, value in zip((SUM, COUNT), sums.get(name, (0.0, 0.0)), strict=True):
                metrics[f"perception/{name}{end}"] = Metric(value=value, aggregation=AggregationType.SUM)
        return loss, metrics

    def _verls_own(self, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any) -> tuple[Tensor, Any]:
        if self.options.entropy_estimator == "sampled":
            model_output = {**model_output, "entropy": -model_output["log_probs"]}
        return self.verls(model_output=model_output, data=data, dp_group=dp_group)

    def _scores(self, model_output: dict[str, Tensor], data: TensorDict, rows: Tensor) -> ViewScores:
        """The scores of the gated-in rollouts; `rows` are those of their images."""
        logps = no_padding_2_padding(model_output["log_probs"], data)
        entropies = no_padding_2_padding(model_output["entropy"], data)
        views = {}
        for place, kind in enumerate(self.options.kinds, start=1):
            if self.options.scores_before_updates:
                own_logps, own_entropies = data[view_logps(kind)], data[view_entropies(kind)]
                views[kind] = ResponseScores(_padded(own_logps, logps)[rows], _padded(own_entropies, logps)[rows])
                continue
            if not bool((data[ROLE][rows + place] == place).all()):
                raise RuntimeError("a micro-batch lacks the rows of a rollout's views")
            view = ResponseScores(logps[rows + place], entropies[rows + place])
            views[kind] = view if self.options.perception_view_gradients else view.detached()
        mask = _padded(data["response_mask"], logps)[rows]
        draws = _padded(data[DRAWS], logps)[rows] if DRAWS in data else None
        anchor = ResponseScores(logps[rows], entropies[rows])
        return ViewScores(anchor, views.get("removing"), views.get("preserving"), mask, draws)


def _padded(values: Tensor, like: Tensor) -> Tensor:
    """One value per response token, as wide as `like`, [B, T]; 0 after the end of a response."""
    dense = values.to_padded_tensor(0) if values.is_nested else values
    return torch.nn.functional.pad(dense, (0, like.shape[1] - dense.shape[1]))
