"""Which rollouts the perception loss learns from, and how much each of them counts."""

import math

import torch
from torch import Tensor

GATES = ("advantage", "correct", "none")


def gate_rollouts(gate: str, advantages: Tensor, correctness: Tensor | None = None) -> Tensor:
    """Which rollouts the perception loss may learn from.

    gate "advantage" (published): advantage > 0. "correct": correctness > 0, the value of the reward that
    decides (1.0 for a right answer, 0.0 for a wrong one; a partial credit above 0 counts as right, NaN as
    wrong), which keeps out a well-formatted wrong answer in an all-wrong group. "none": all.

    advantages: [B]. correctness: [B], needed by "correct" alone. Returns bool [B]. Raises ValueError on an
    unknown gate, a wrong shape or a missing correctness.
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
    """Which rollouts are of a group whose rewards are all the same, up to rounding: no success of any of them.

    The mean that is subtracted for the advantages is rounded: 12 rewards of 0.9 in float32 are left with advantages of
    6e-4 each once TRL has divided by the standard deviation + 1e-4.

    rewards: [B, F], one column a reward that is compared on its own; B is a multiple of group_size, and groups stand
    side by side. NaN, which TRL leaves out of a group's mean, is left out here. Returns bool [B].
    """
    grouped = rewards.unflatten(0, (-1, group_size))
    most = grouped.nan_to_num(-math.inf).amax(dim=1)
    least = grouped.nan_to_num(math.inf).amin(dim=1)
    rounding = 4 * torch.finfo(rewards.dtype).eps * torch.maximum(most.abs(), least.abs())
    # A group without any known reward has most < least.
    return ((most <= least) | (most - least <= rounding)).all(dim=1).repeat_interleave(group_size)


def draw_rollouts(gate: Tensor, group_size: int, limit: int, generator: torch.Generator) -> Tensor:
    """Draw at most `limit` gated-in rollouts of each group, uniformly, and weight them for those left out.

    gate: bool [B], B a multiple of group_size; the rollouts of a group stand side by side. Returns float32 [B]: k / m
    for the m rollouts drawn among a group's k, 0 for all others. A sum over rollouts with these weights has the sum
    over all gated-in ones as its expectation. Raises ValueError if B is no multiple of group_size or limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, but is {limit}")
    if len(gate) % group_size:
        raise ValueError(f"gate has {len(gate)} rollouts, which is no multiple of group_size = {group_size}")
    weights = gate.float().cpu()
    for group in weights.view(-1, group_size):
        gated = group.nonzero().squeeze(1)
        if len(gated) > limit:
            kept = gated[torch.randperm(len(gated), generator=generator)[:limit]]
            group.zero_()
            group[kept] = len(gated) / limit
    return weights.to(gate.device)
