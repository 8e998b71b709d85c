"""Which rollouts of a generation batch the perception loss learns from, beside the gate itself."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cppo.perception import draw_rollouts

if TYPE_CHECKING:
    from cppo.training.config import CPPOConfig


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


def rollout_weights(args: "CPPOConfig", gates: Tensor, group_size: int, batch_number: int) -> Tensor:
    """Weight of every rollout in the perception loss, 0 for those that are not scored under the views; [B].

    Args:
        args: the option `perception_rollouts_per_group` and the seed.
        gates: which are gated in, bool [B], of all processes.
        group_size: G.
        batch_number: generation batches before this one; each has a random stream of its own, which all processes
            and a resumed run share.
    """
    limit = args.perception_rollouts_per_group
    if limit is None:
        return gates.float()
    return draw_rollouts(gates, group_size, limit, _generator(args.seed, batch_number))


def token_draws(args: "CPPOConfig", shape: torch.Size, batch_number: int, rank: int) -> Tensor:
    """Uniform random numbers for this process's response tokens, [B, T], where tokens are selected at random.

    Args:
        batch_number: as in `rollout_weights`.
        rank: of the process, each of which draws its own.
    """
    return torch.rand(shape, generator=_generator(args.seed, batch_number, rank))


def _generator(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(seed)
