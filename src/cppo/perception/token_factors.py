"""Token-wise advantage shapings, in the registry `SHAPINGS` (MSSR, VGPO, PEPO)."""

import math
from typing import Protocol

import torch
from torch import Tensor

from cppo.perception.detection import named, needs
from cppo.perception.responses import ViewScores
from cppo.perception.shaping import SHAPINGS, ShapingOptions, advantage_shaping, scaled


class FactorOptions(ShapingOptions, Protocol):
    """The options of these sinks; see `CPPOConfig`."""

    @property
    def perception_bonus_weight(self) -> float: ...
    @property
    def perception_bonus_limit(self) -> float: ...
    @property
    def perception_softmax_gate(self) -> float: ...
    @property
    def perception_softmax_temperature(self) -> float: ...


@torch.no_grad()
def token_bonus(score: Tensor, advantages: Tensor, weight: float = 0.4, limit: float = 0.5) -> Tensor:
    """MSSR's bonus of each token, `min(weight score, limit |A|)`, [n, T]; it never changes an advantage's sign.

    score: at least 0, [n, T]. advantages: [n]. Source: arXiv 2512.18215 and its code, which uses 0.4 and 1/2.
    """
    return torch.minimum(weight * score, limit * advantages.abs()[:, None])


@torch.no_grad()
def token_factors(score: Tensor, response_mask: Tensor, floor: float = 0.1, ceiling: float = 2.0) -> Tensor:
    """VGPO's factor of each token, `clamp(1 + w - mean w, floor, ceiling)`, [n, T], 1 outside the mask.

    w is the score, scaled to [0, 1] over the rollout. score, response_mask: [n, T]. Source: arXiv 2604.09349, eq. 7 and
    8; the clamps are from its code.
    """
    w, mask = scaled(score, response_mask), response_mask.bool()
    mean = w.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask, (1.0 + w - mean).clamp(floor, ceiling), 1.0)


@torch.no_grad()
def softmax_weights(
    score: Tensor, entropies: Tensor, response_mask: Tensor, gate: float = 0.05, temperature: float = 1.8
) -> Tensor:
    """PEPO's weight of each token, `T softmax(s (1 + gate tanh(u - mean u)) / temperature)`, [n, T], 0 outside.

    The softmax runs over the T response tokens, so that the mean weight is 1. u is the sum of s and the entropy, each
    scaled to [0, 1] over the rollout. score: s, [n, T]. Source: arXiv 2603.22847; the temperature is from its code.
    """
    mask = response_mask.bool()
    length = mask.sum(dim=1, keepdim=True)
    u = scaled(score, mask) + scaled(entropies, mask)
    gates = 1.0 + gate * torch.tanh(u - u.sum(dim=1, keepdim=True) / length.clamp(min=1))
    logits = (score * gates / temperature).masked_fill(~mask, -math.inf)
    return (length * torch.softmax(logits, dim=1)).masked_fill(~mask, 0.0)


@named(SHAPINGS, "add_advantage")
@advantage_shaping
def add_advantage(scores: ViewScores, advantages: Tensor, options: FactorOptions) -> Tensor:
    """Every token's advantage is its rollout's, plus a bonus by its own score (MSSR)."""
    assert scores.score is not None
    bonus = token_bonus(scores.score, advantages, options.perception_bonus_weight, options.perception_bonus_limit)
    return advantages[:, None] + bonus.masked_fill(~scores.response_mask.bool(), 0.0)


@named(SHAPINGS, "factor_advantage")
@advantage_shaping
@needs("group_weights")
def factor_advantage(scores: ViewScores, advantages: Tensor, options: FactorOptions) -> Tensor:
    """A token's advantage is its rollout's times the token's factor and the rollout's factor in its group (VGPO)."""
    assert scores.score is not None
    return advantages[:, None] * token_factors(scores.score, scores.response_mask)


@named(SHAPINGS, "softmax_advantage")
@advantage_shaping
def softmax_advantage(scores: ViewScores, advantages: Tensor, options: FactorOptions) -> Tensor:
    """Every token's advantage is its rollout's times a softmax over the rollout's scores, gated by entropy (PEPO)."""
    assert scores.score is not None
    gate, temperature = options.perception_softmax_gate, options.perception_softmax_temperature
    weights = softmax_weights(scores.score, scores.anchor.entropies, scores.response_mask, gate, temperature)
    return advantages[:, None] * weights
