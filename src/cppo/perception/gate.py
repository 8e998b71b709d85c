"""The gate: which rollouts the perception loss uses, and their weights."""

import math

import torch
from torch import Tensor

GATES = ("advantage", "correct", "none")


def gate_rollouts(gate: str, advantages: Tensor, correctness: Tensor | None = None) -> Tensor:
    """The rollouts that the perception loss uses.

    gate "advantage" (published): advantage > 0. "correct": correctness > 0, the value of the reward that decides.
    Partial credit counts as right, NaN as wrong. This keeps out a well-formatted wrong answer in a group of wrong
    answers. "none": all rollouts.

    advantages: [B]. correctness: [B], only for "correct". Returns bool [B]. Raises ValueError on an unknown gate, a
    wrong shape or a missing correctness.
    """
    if advantages.ndim != 1:
        raise ValueError(f"advantages must have the shape [B], but has {tuple(advantages.shape)}")
    if gate == "advantage":
        return advantages > 0
    if gate == "none":
        return torch.ones_like(advantages, dtype=torch.bool)
    if gate != "correct":
        raise ValueError(f"gate must be one of {', '.join(GATES)}, but is {gate!r}")
    if correctness is None:
        raise ValueError("gate 'correct' needs correctness, the [B] values of the reward that decides")
    if correctness.shape != advantages.shape:
        raise ValueError(
            f"correctness must have the shape of advantages, {tuple(advantages.shape)}, "
            f"but has {tuple(correctness.shape)}"
        )
    return correctness > 0


def equal_rewards(rewards: Tensor, group_size: int) -> Tensor:
    """The rollouts of groups with equal rewards up to rounding: no rollout of such groups is a success.

    The group mean in the advantage is rounded. Twelve rewards of 0.9 in float32 keep advantages of 6e-4 each after TRL
    divides by the standard deviation + 1e-4.

    rewards: [B, F], one column per separately compared reward; B is a multiple of group_size, and the rollouts of a
    group are adjacent. NaN is ignored, as in TRL's group mean. Returns bool [B].
    """
    grouped = rewards.unflatten(0, (-1, group_size))
    most = grouped.nan_to_num(-math.inf).amax(dim=1)
    least = grouped.nan_to_num(math.inf).amin(dim=1)
    rounding = 4 * torch.finfo(rewards.dtype).eps * torch.maximum(most.abs(), least.abs())
    # A group without any known reward has most < least.
    return ((most <= least) | (most - least <= rounding)).all(dim=1).repeat_interleave(group_size)


def draw_rollouts(gate: Tensor, group_size: int, limit: int, generator: torch.Generator) -> Tensor:
    """Draw at most `limit` gated-in rollouts of each group, uniformly, and reweight them for those left out.

    gate: bool [B], B a multiple of group_size; the rollouts of a group are adjacent. Returns float32 [B]: k / m for the
    m rollouts drawn from a group's k, 0 for all others. A sum with these weights has the sum over all gated-in rollouts
    as its expectation. Raises ValueError if B is not a multiple of group_size or limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, but is {limit}")
    if len(gate) % group_size:
        raise ValueError(f"gate has {len(gate)} rollouts, which is not a multiple of group_size = {group_size}")
    weights = gate.float().cpu()
    for group in weights.view(-1, group_size):
        gated = group.nonzero().squeeze(1)
        if len(gated) > limit:
            kept = gated[torch.randperm(len(gated), generator=generator)[:limit]]
            group.zero_()
            group[kept] = len(gated) / limit
    return weights.to(gate.device)
