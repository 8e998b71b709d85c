"""Which groups have nothing to tell their rollouts apart by."""

import torch
from torch import Tensor


def equal_rewards(rewards: Tensor, group_size: int) -> Tensor:
    """Whether a rollout's whole group got the same rewards, up to rounding.

    TRL subtracts a group's mean, which is rounded, and divides by its standard deviation + 1e-4: 12 rewards of 0.9 are
    left with advantages of 6e-4 each, which are no signal.

    Args:
        rewards: [B, F], one column a reward that is compared on its own; groups stand side by side. NaN counts as 0.
        group_size: G; B is a multiple of it.

    Returns:
        bool [B].
    """
    grouped = rewards.nan_to_num(0.0).unflatten(0, (-1, group_size))
    spread = grouped.amax(dim=1) - grouped.amin(dim=1)
    rounding = 4 * torch.finfo(rewards.dtype).eps * grouped.abs().amax(dim=1)
    return (spread <= rounding).all(dim=1).repeat_interleave(group_size)
