"""The method in pure tensors: divergences, dependency scores, selection, gate and contrastive loss.

Imports torch alone. B rollouts, T response tokens, V vocabulary; every divergence, entropy and loss is in
nats.
"""

from cppo.perception.contrast import (
    contrastive_perception_loss,
    contrastive_perception_tokens,
    rollout_mean_loss,
    token_mean_loss,
)
from cppo.perception.dependency import entropy_from_logits, entropy_shift, logp_shift
from cppo.perception.divergence import EXACT_DIVERGENCES, js_divergence, k1_divergence, k3_divergence, kl_divergence
from cppo.perception.selection import (
    GATES,
    ROUNDINGS,
    SELECTORS,
    draw_rollouts,
    equal_rewards,
    gate_rollouts,
    select_perception_tokens,
    select_random_tokens,
    select_tokens,
    select_top_tokens,
)
from cppo.perception.shaping import advantage_scale, rollout_dependency, token_advantage_weights

__all__ = [
    "EXACT_DIVERGENCES",
    "GATES",
    "ROUNDINGS",
    "SELECTORS",
    "advantage_scale",
    "contrastive_perception_loss",
    "contrastive_perception_tokens",
    "draw_rollouts",
    "entropy_from_logits",
    "entropy_shift",
    "equal_rewards",
    "gate_rollouts",
    "js_divergence",
    "k1_divergence",
    "k3_divergence",
    "kl_divergence",
    "logp_shift",
    "rollout_dependency",
    "rollout_mean_loss",
    "select_perception_tokens",
    "select_random_tokens",
    "select_tokens",
    "select_top_tokens",
    "token_advantage_weights",
    "token_mean_loss",
]
