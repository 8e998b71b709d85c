"""Which rollouts of a generation batch the perception term learns from."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cppo.perception import draw_rollouts, equal_rewards, gate_rollouts
from cppo.training.view_inputs import Row, prompt_images
from cppo.training.view_scoring import response_mask

if TYPE_CHECKING:
    from cppo.training.config import CPPOConfig


ROLLOUT_DRAWS = 1 << 31
"""In the place of a rank in the key of a random stream: no rank has this number."""


def gated_rollouts(trainer: Any, output: dict[str, Any], rows: list[Row], rewards: Tensor, mine: slice) -> Tensor:
    """Which of this process's rollouts are gated in, bool [B].

    Args:
        output: what TRL's generation and scoring returned.
        rows: the rollouts' rows.
        rewards: the weighted sum of each rollout's rewards, of all processes; NaN where it has none.
        mine: the place of this process's rollouts among all.
    """
    args = trainer.args
    # TRL normalizes the sum of the rewards, or each of them; one of weight 0 only looks on.
    weighted = trainer._rewards[:, trainer.reward_weights.to(rewards.device) != 0]
    compared = rewards[:, None] if trainer.multi_objective_aggregation == "sum_then_normalize" else weighted
    equal = equal_rewards(compared, trainer.num_generations)[mine]
    advantages = output["advantages"].masked_fill(equal, 0.0)
    correctness = None
    if args.perception_gate == "correct":
        correctness = trainer._rewards[mine, trainer.reward_func_names.index(args.perception_gate_reward)]
    gate = gate_rollouts(args.perception_gate, advantages, correctness)
    has_images = torch.tensor([bool(prompt_images(row)) for row in rows], device=gate.device)
    # Views are made of the prompt's images, and would not fit a response with images of a tool.
    own_images_only = ~trainer._has_placeholder(output["completion_ids"])
    return gate & has_images & own_images_only & response_mask(output).any(dim=1)


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
    return draw_rollouts(gates, group_size, limit, _generator(args.seed, batch_number, ROLLOUT_DRAWS))


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
