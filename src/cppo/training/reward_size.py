"""Rewards that float32 cannot turn into advantages are refused before they reach the weights."""

from collections.abc import Sequence

from torch import Tensor

from cppo.errors import UserError

MAX_REWARD = 1e18
"""A weighted sum beyond it: its square, summed over a batch for the deviation, would leave float32 (3.4e38)."""


def check_reward_size(rewards: Tensor, weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise UserError for a reward, or a rollout's weighted sum of rewards, whose advantage would not be a number.

    Args:
        rewards: of every rollout and reward function, float32 [B, R]; NaN where a function returned None.
        weights: of the R functions.
        names: of the R functions.
    """
    for name, endless in zip(names, rewards.isinf().any(dim=0).tolist(), strict=True):
        if endless:
            raise UserError(f"the reward {name} is infinite, which makes no advantage: let it return finite numbers")
    products = rewards.double() * rewards.new_tensor(weights).double()
    largest = max(products.abs().nan_to_num().amax().item(), products.nansum(dim=1).abs().amax().item())
    if largest > MAX_REWARD:
        raise UserError(
            f"the rewards ({', '.join(names)}) reach {largest:.2g} with their weights; advantages in float32 take "
            f"at most {MAX_REWARD:g}: scale them down"
        )
