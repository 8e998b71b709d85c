"""Advantages shaped by how much tokens and rollouts depend on the image (VPPO, arXiv 2510.09285; PGPO, 2604.01840)."""

import math

import torch
from torch import Tensor


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
