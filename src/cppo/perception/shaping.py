"""Advantages shaped by how much tokens and rollouts depend on the image (VPPO, arXiv 2510.09285)."""

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
def advantage_scale(dependency: Tensor, floor: float = 0.9) -> Tensor:
    """VPPO's weight of each rollout's advantage: `floor + (ceiling - floor) u`, u the dependency scaled to [0, 1]. [B].

    `u = (s - min s) / (max s - min s)` and `ceiling = floor + (1 - floor) / mean(u)`, so that the mean weight is 1. All
    are 1 where the dependencies are equal, or none is given.

    dependency: s, of all rollouts that are compared, [B]. Raises ValueError on a floor outside [0, 1].
    """
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor must lie in [0, 1], but is {floor}")
    spread = dependency.max() - dependency.min() if len(dependency) else 0.0
    if not spread:
        return torch.ones_like(dependency)
    u = (dependency - dependency.min()) / spread
    return floor + (1.0 - floor) * u / u.mean()
