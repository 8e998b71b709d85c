"""Advantages shaped by dependency on the image (VPPO, arXiv 2510.09285; PGPO, arXiv 2604.01840)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cppo.perception.detection import Function, named, needs, needs_of
from cppo.perception.responses import ViewScores


@torch.no_grad()
def scaled(values: Tensor, response_mask: Tensor) -> Tensor:
    """Values scaled to [0, 1] over each rollout's response tokens, [B, T]; 0 outside, and 0 everywhere where all are
    equal.

    values, response_mask: [B, T].
    """
    mask_BT = response_mask.bool()
    low_B1 = values.masked_fill(~mask_BT, math.inf).amin(dim=1, keepdim=True)
    spread_B1 = values.masked_fill(~mask_BT, -math.inf).amax(dim=1, keepdim=True) - low_B1
    return torch.where(mask_BT & (spread_B1 > 0), (values - low_B1) / spread_B1, 0.0)


@torch.no_grad()
def rollout_dependency(score: Tensor, response_mask: Tensor) -> Tensor:
    """Mean score of each rollout's response tokens, [B]; 0 for an empty response.

    score, response_mask: [B, T].
    """
    mask_BT = response_mask.bool()
    return score.masked_fill(~mask_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)


@torch.no_grad()
def rollout_focus(score: Tensor, response_mask: Tensor) -> Tensor:
    """Sum of each rollout's scores, scaled to [0, 1] over its response tokens, [B] (VGPO)."""
    return scaled(score, response_mask).sum(dim=1)


@torch.no_grad()
def advantage_scale(dependency: Tensor, floor: float = 0.9, compared: Tensor | None = None) -> Tensor:
    """VPPO's weight of each rollout's advantage, [B]: `floor + (ceiling - floor) u`, u the dependency scaled to [0, 1].

    `u = (s - min) / (max - min)` and `ceiling = floor + (1 - floor) / mean(u)`, so that the mean weight is 1. All
    weights are 1 where the compared dependencies are equal or missing; all are `floor` where every u is 0.

    dependency: s of the rollouts, [B]; the mean of its u sets the ceiling. compared: the dependencies that give min and
    max, these among them; default: these alone. Raises ValueError on a floor outside [0, 1].
    """
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor must lie in [0, 1], but is {floor}")
    compared = dependency if compared is None else compared
    if not len(dependency) or compared.max() == compared.min():
        return torch.ones_like(dependency)
    u = (dependency - compared.min()) / (compared.max() - compared.min())
    return floor + (1.0 - floor) * u / u.mean().clamp(min=1e-12)


@torch.no_grad()
def token_advantage_weights(score: Tensor, response_mask: Tensor, threshold: float = 0.4, slope: float = 2.0) -> Tensor:
    """PGPO's weight of each token's advantage, [B, T]: less than 1 below the threshold, more above.

    u is log(1 + score), scaled to [0, 1] over a rollout's response tokens. The weight is `u / threshold` up to the
    threshold and `1 + slope (u - threshold) / (1 - threshold)` above it. It is divided by the rollout's mean, so that
    the mean is 1. All are 1 where the scores are equal; 0 outside the mask.

    score: at least 0, [B, T]. response_mask: [B, T]. Raises ValueError on a threshold outside (0, 1) or a negative
    slope.
    """
    if not 0.0 < threshold < 1.0 or slope < 0.0:
        raise ValueError(f"threshold must lie in (0, 1) and slope be at least 0, but are {threshold} and {slope}")
    mask_BT = response_mask.bool()
    score = score.log1p()
    low_B1 = score.masked_fill(~mask_BT, math.inf).amin(dim=1, keepdim=True)
    spread_B1 = score.masked_fill(~mask_BT, -math.inf).amax(dim=1, keepdim=True) - low_B1
    u = (score - low_B1) / spread_B1
    weight = torch.where(u < threshold, u / threshold, 1.0 + slope * (u - threshold) / (1.0 - threshold))
    weight = torch.where(spread_B1 > 0, weight, 1.0).masked_fill(~mask_BT, 0.0)
    return weight * mask_BT.sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1e-12)


class ShapingOptions(Protocol):
    """The options of sinks that shape advantages; see `CPPOConfig`."""

    @property
    def perception_sink(self) -> str: ...
    @property
    def perception_advantage_floor(self) -> float: ...
    @property
    def perception_advantage_scope(self) -> str: ...
    @property
    def perception_advantage_mean(self) -> str: ...
    @property
    def perception_shaping_weight(self) -> float: ...
    @property
    def perception_weight_threshold(self) -> float: ...
    @property
    def perception_weight_slope(self) -> float: ...


def advantage_shaping(function: Function) -> Function:
    """Decorator: declare a sink that shapes advantages. Other sinks are loss terms.

    The sink is called as (scores with perception tokens, advantages [n], options) -> token advantages, [n, T]. With
    `needs("rollout_weights")` the advantages come weighted by `advantage_scale`, with `needs("group_weights")` by
    `group_factors`.
    """
    setattr(function, "shapes_advantages", True)  # noqa: B010 (mypy knows no such attribute of a function)
    return function


def shapes_advantages(function: Callable[..., Any]) -> bool:
    """Whether a sink is declared by `advantage_shaping`."""
    return getattr(function, "shapes_advantages", False)


SHAPINGS: dict[str, Callable[[ViewScores, Tensor, Any], Tensor]] = {}
"""Sinks that shape advantages, by name. `cppo.perception.token_factors` adds more."""


@named(SHAPINGS, "mask_advantage")
@advantage_shaping
@needs("rollout_weights")
def mask_advantage(scores: ViewScores, advantages: Tensor, options: ShapingOptions) -> Tensor:
    """Only perception tokens keep their rollout's advantage (VPPO), times the selector's weights, if any."""
    assert scores.token_mask is not None
    return advantages[:, None] * (scores.token_mask if scores.token_weights is None else scores.token_weights)


@named(SHAPINGS, "scale_advantage")
@advantage_shaping
def scale_advantage(scores: ViewScores, advantages: Tensor, options: ShapingOptions) -> Tensor:
    """Every token's advantage is its rollout's, weighted by its own score (PGPO)."""
    assert scores.score is not None
    threshold, slope = options.perception_weight_threshold, options.perception_weight_slope
    return advantages[:, None] * token_advantage_weights(scores.score, scores.response_mask, threshold, slope)


@torch.no_grad()
def group_factors(signal: Tensor, groups: Tensor, floor: float = 0.9, ceiling: float = 2.0) -> Tensor:
    """VGPO's weight of each rollout's advantage within its group, [B]: `clamp(1 + u - mean u, floor, ceiling)`.

    u is the signal scaled to [0, 1] over the group, 0 where all values are equal. signal: per rollout, [B]; a NaN is
    left out and has weight 1. groups: group of each rollout, [B]. Source: arXiv 2604.09349, eq. 10 and 11. The clamps
    are from its code, where 8 neighbours in a micro-batch form a group.
    """
    factors = torch.ones_like(signal)
    for group in groups.unique():
        members = (groups == group) & ~signal.isnan()
        own = signal[members]
        if len(own) and own.max() > own.min():
            u = (own - own.min()) / (own.max() - own.min())
            factors[members] = (1.0 + u - u.mean()).clamp(floor, ceiling)
    return factors


@dataclass(frozen=True)
class Everyone:
    """The other processes, as far as shaping needs them.

    Attributes:
        gather: concatenates a tensor over the processes, in rank order.
        rank: of this process.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int

    def shared(self, mine: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """This process's part of a function of all processes' values."""
        return function(self.gather(mine))[self.rank * len(mine) : (self.rank + 1) * len(mine)]


@torch.no_grad()
def shape_advantages(
    advantages: Sequence[Tensor],
    found: Sequence[tuple[list[int], ViewScores | None]],
    groups: Sequence[Tensor],
    masks: Sequence[Tensor],
    options: ShapingOptions,
    accumulation: int,
    everyone: Everyone,
) -> tuple[list[Tensor], Tensor]:
    """Replace rollout advantages, [B], by token advantages, [B, T], for the micro-batches of a generation batch.

    The sink of `SHAPINGS` shapes them, in part where `perception_shaping_weight` is less than 1. A rollout that was not
    scored keeps its advantage at every token.

    Args:
        advantages: per micro-batch of this process.
        found: per micro-batch, the scored rows and their perception tokens (`detect`), if any.
        groups: per micro-batch, the groups of its rollouts, [B]; a group has the same number on all processes.
        masks: per micro-batch, its response mask, [B, T].
        accumulation: micro-batches of an optimizer step.
        everyone: the processes.

    Returns:
        The token advantages; and the mean score of each rollout of this process, in order, NaN without views.
    """
    shaping = SHAPINGS[options.perception_sink]
    dependencies = _of_rollouts(advantages, found, rollout_dependency)
    scales = _scales(needs_of(shaping), advantages, found, groups, options, accumulation, everyone)
    weight = options.perception_shaping_weight
    shaped = []
    for own, (rows, scores), mask, scale in zip(advantages, found, masks, scales, strict=True):
        tokens = own[:, None].repeat(1, mask.shape[1])
        if scores is not None:
            values = shaping(scores, own[rows] * scale[rows], options).to(tokens)
            tokens[rows] = values if weight == 1.0 else (1.0 - weight) * tokens[rows] + weight * values
        shaped.append(tokens)
    if options.perception_advantage_mean == "selected":
        share = _share_of_selected(found, masks, everyone.gather)
        shaped = [tokens / share for tokens in shaped]
    return shaped, torch.cat(dependencies)


def _of_rollouts(
    advantages: Sequence[Tensor],
    found: Sequence[tuple[list[int], ViewScores | None]],
    signal: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """A function of score and response mask per micro-batch, [B]; NaN for rollouts without a score."""
    signals = []
    for own, (rows, scores) in zip(advantages, found, strict=True):
        values = torch.full_like(own, math.nan)
        if scores is not None:
            assert scores.score is not None
            values[rows] = signal(scores.score, scores.response_mask).to(values)
        signals.append(values)
    return signals


def _scales(
    needed: frozenset[str],
    advantages: Sequence[Tensor],
    found: Sequence[tuple[list[int], ViewScores | None]],
    groups: Sequence[Tensor],
    options: ShapingOptions,
    accumulation: int,
    everyone: Everyone,
) -> list[Tensor]:
    """Factors of the rollouts' advantages before the sink, [B] per micro-batch."""
    floor, sizes = options.perception_advantage_floor, [len(own) for own in advantages]
    if "group_weights" in needed:
        mine = torch.cat(_of_rollouts(advantages, found, rollout_focus))
        both = torch.stack([mine.double(), torch.cat(list(groups)).to(mine.device).double()], dim=1)
        part = everyone.shared(both, lambda all_of: group_factors(all_of[:, 0], all_of[:, 1], floor))
        return list(part.to(mine).split(sizes))
    dependencies = _of_rollouts(advantages, found, rollout_dependency)
    if "rollout_weights" not in needed:
        return [torch.ones_like(part) for part in dependencies]
    if options.perception_advantage_scope == "batch":
        part = everyone.shared(torch.cat(dependencies), lambda all_of: _scale(all_of, floor, all_of))
        return list(part.split(sizes))
    steps = [dependencies[first : first + accumulation] for first in range(0, len(dependencies), accumulation)]
    return [_scale(part, floor, torch.cat(step)) for step in steps for part in step]


def _scale(dependency: Tensor, floor: float, compared: Tensor) -> Tensor:
    """`advantage_scale` of rollouts, [B]; those without views (NaN) keep their advantage."""
    known = ~dependency.isnan()
    scale = torch.ones_like(dependency)
    scale[known] = advantage_scale(dependency[known], floor, compared[~compared.isnan()])
    return scale


def _share_of_selected(
    found: Sequence[tuple[list[int], ViewScores | None]], masks: Sequence[Tensor], gather: Callable[[Tensor], Tensor]
) -> Tensor:
    """Share of selected tokens in the generation batch's responses; a rollout without a score counts as selected."""
    counts = []
    for (rows, scores), mask in zip(found, masks, strict=True):
        selected = mask.bool().clone()
        if scores is not None and scores.token_mask is not None:
            selected[rows] = scores.token_mask
        counts.append(torch.stack([selected.sum(), mask.bool().sum()]))
    selected, total = gather(torch.stack(counts).sum(dim=0, keepdim=True)).sum(dim=0).float()
    return torch.where(selected > 0, selected / total, 1.0)
