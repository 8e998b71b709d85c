"""Advantages shaped by how much tokens and rollouts depend on the image (VPPO, arXiv 2510.09285; PGPO, 2604.01840)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cppo.perception.detection import Function, ViewScores, needs, needs_of


@torch.no_grad()
def rollout_dependency(score: Tensor, response_mask: Tensor) -> Tensor:
    """Mean score of each rollout's response tokens, 0 without any; [B].

    score, response_mask: [B, T].
    """
    mask_BT = response_mask.bool()
    return score.masked_fill(~mask_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)


@torch.no_grad()
def advantage_scale(dependency: Tensor, floor: float = 0.9, compared: Tensor | None = None) -> Tensor:
    """VPPO's weight of each rollout's advantage: `floor + (ceiling - floor) u`, u the dependency scaled to [0, 1]. [B].

    `u = (s - min) / (max - min)` and `ceiling = floor + (1 - floor) / mean(u)`, so that the mean weight is 1. All are 1
    where the compared dependencies are equal, or none is given; all are `floor` where every u is 0.

    dependency: s of the rollouts, [B], whose mean u makes the ceiling. compared: the dependencies, these among them,
    whose least and largest are scaled to 0 and 1; without it these alone. Raises ValueError on a floor outside [0, 1].
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
    """PGPO's weight of each token's advantage: less than 1 below the threshold, more above; [B, T].

    With u = log(1 + score), scaled to [0, 1] over a rollout's response tokens: `u / threshold` up to the threshold and
    `1 + slope (u - threshold) / (1 - threshold)` above it, divided by its mean over them: a rollout's mean weight is 1.
    All are 1 where the scores are equal; outside the mask they are 0.

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
    """The options of sinks that shape the advantages; see `CPPOConfig`."""

    @property
    def perception_sink(self) -> str: ...
    @property
    def perception_advantage_floor(self) -> float: ...
    @property
    def perception_advantage_scope(self) -> str: ...
    @property
    def perception_weight_threshold(self) -> float: ...
    @property
    def perception_weight_slope(self) -> float: ...


def advantage_shaping(function: Function) -> Function:
    """Declare that a sink shapes advantages, where it would be taken for a loss term; a decorator.

    It is called as (scores with perception tokens, advantages [n], options) and returns those of tokens, [n, T]. Where
    it `needs("rollout_weights")`, the advantages come weighted by `advantage_scale`.
    """
    setattr(function, "shapes_advantages", True)  # noqa: B010 (a function has no such attribute for mypy)
    return function


def shapes_advantages(function: Callable[..., Any]) -> bool:
    """Whether a sink is declared by `advantage_shaping`."""
    return getattr(function, "shapes_advantages", False)


@advantage_shaping
@needs("rollout_weights")
def mask_advantage(scores: ViewScores, advantages: Tensor, options: ShapingOptions) -> Tensor:
    """Perception tokens alone keep their rollout's advantage (VPPO)."""
    assert scores.token_mask is not None
    return advantages[:, None] * scores.token_mask


@advantage_shaping
def scale_advantage(scores: ViewScores, advantages: Tensor, options: ShapingOptions) -> Tensor:
    """Every token has its rollout's advantage, weighted by its own score (PGPO)."""
    assert scores.score is not None
    threshold, slope = options.perception_weight_threshold, options.perception_weight_slope
    return advantages[:, None] * token_advantage_weights(scores.score, scores.response_mask, threshold, slope)


SHAPINGS: dict[str, Callable[[ViewScores, Tensor, Any], Tensor]] = {
    "mask_advantage": mask_advantage,
    "scale_advantage": scale_advantage,
}
"""Sinks that shape advantages, by name."""


@torch.no_grad()
def shape_advantages(
    advantages: Sequence[Tensor],
    found: Sequence[tuple[list[int], ViewScores | None]],
    num_tokens: int,
    options: ShapingOptions,
    accumulation: int,
    gather: Callable[[Tensor], Tensor],
    rank: int,
) -> tuple[list[Tensor], Tensor]:
    """The advantages of tokens, [B, T], in the place of those of rollouts, [B], of a generation batch's micro-batches.

    The sink of `SHAPINGS` that the options name makes them. A rollout without views keeps its advantage at every token.

    Args:
        advantages: of each micro-batch of this process.
        found: of each, the rows that were scored under the views, and their perception tokens (`detect`) if any were.
        num_tokens: T.
        accumulation: micro-batches of an optimizer step.
        gather: concatenates a tensor over the processes, in the order of their ranks.
        rank: of this process.

    Returns:
        The advantages; and the mean score of this process's rollouts, NaN for those without views, in their order.
    """
    dependencies = []
    for own, (rows, scores) in zip(advantages, found, strict=True):
        dependency = torch.full_like(own, math.nan)
        if scores is not None:
            assert scores.score is not None
            dependency[rows] = rollout_dependency(scores.score, scores.response_mask).to(dependency)
        dependencies.append(dependency)
    mine, floor = torch.cat(dependencies), options.perception_advantage_floor
    shaping = SHAPINGS[options.perception_sink]
    if "rollout_weights" not in needs_of(shaping):
        scales = [torch.ones_like(part) for part in dependencies]
    elif options.perception_advantage_scope == "batch":
        everyones = gather(mine)
        part = _scale(everyones, floor, everyones)[rank * len(mine) : (rank + 1) * len(mine)]
        scales = list(part.split([len(part) for part in dependencies]))
    else:
        steps = [dependencies[first : first + accumulation] for first in range(0, len(dependencies), accumulation)]
        scales = [_scale(part, floor, torch.cat(step)) for step in steps for part in step]
    shaped = []
    for own, (rows, scores), scale in zip(advantages, found, scales, strict=True):
        tokens = own[:, None].repeat(1, num_tokens)
        if scores is not None:
            tokens[rows] = shaping(scores, own[rows] * scale[rows], options).to(tokens)
        shaped.append(tokens)
    return shaped, mine


def _scale(dependency: Tensor, floor: float, compared: Tensor) -> Tensor:
    """`advantage_scale` of rollouts, [B], some of which are without views (NaN) and keep their advantage."""
    known = ~dependency.isnan()
    scale = torch.ones_like(dependency)
    scale[known] = advantage_scale(dependency[known], floor, compared[~compared.isnan()])
    return scale
