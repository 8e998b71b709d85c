"""CPPO's ablations, each with its change, and methods of our own."""

from collections.abc import Mapping

from cppo.methods.blocks import Options
from cppo.methods.published import cppo


def static_view_js() -> Options:
    """CPPO with a picture of noise as I-, detecting by the exact Jensen-Shannon divergence from it.

    Ours, after CPPO (arXiv 2601.00501). Among the scores and views tried, this pair finds the true perception tokens of
    all task families (docs/results/detectors.md).
    """
    return {**cppo(), "removing_views": ["static"], "perception_score": "js"}


def likelihood() -> Options:
    """Rewarded tokens must stay likely under I+: -A log pi(token given I+) with weight 0.3 on the perception tokens.

    Ours, in place of the contrast of CPPO (arXiv 2601.00501). The loss is a mean over the tokens that `cppo-static-js`
    selects, then over the rollouts with a positive advantage A. Its target is a sampled token that earned a reward;
    CPPO's target is the policy's own probabilities.
    """
    return {
        **static_view_js(),
        "perception_sink": "divergence",
        "perception_weight": 0.3,
        "perception_weighting": "advantage",
        "perception_divergence": "nll",
        "perception_removing_weight": 0.0,
    }


def likelihood_all_tokens() -> Options:
    """Rewarded tokens must stay likely under I+, on all tokens: `cppo-likelihood` without detection and I-.

    Ours, the control for detection; after CPPO (arXiv 2601.00501).
    """
    return {**likelihood(), "perception_selector": "all"}


ABLATIONS: Mapping[str, tuple[Options, str]] = {
    "cppo-no-gate": ({"perception_gate": "none"}, "CPPO on every rollout with images, for any advantage."),
    "cppo-correct-gate": (
        {"perception_gate": "correct", "perception_gate_reward": "accuracy_reward"},
        "CPPO on the rollouts with a right answer, for any advantage.",
    ),
    "cppo-all-tokens": ({"perception_selector": "all"}, "CPPO on every response token: no detection."),
    "cppo-random-tokens": (
        {"perception_selector": "random"},
        "CPPO on random response tokens, as many per rollout as the published rule selects.",
    ),
    "cppo-cpl-only": (
        {"rl_weight": 0.0},
        "CPPO without the RL loss: only the contrastive term trains.\n\nRewards still decide which rollouts are "
        "gated in. The KL to the reference is part of the RL loss and is also left out.",
    ),
    "cppo-positive-only": (
        {"perception_removing_weight": 0.0},
        "CPPO with only I+ in the contrast: softplus(d+ / tau). I- still serves detection.",
    ),
    "cppo-negative-only": (
        {"perception_preserving_weight": 0.0},
        "CPPO with only I- in the contrast: softplus(-d- / tau).",
    ),
    "cppo-detached-views": (
        {"perception_view_gradients": False},
        "CPPO with gradients through the anchor only, not through the policy under the views.",
    ),
    "cppo-detached-anchor": (
        {"perception_anchor_gradients": False},
        "CPPO with gradients through the views' passes only: the policy under the image is a fixed target.",
    ),
    "cppo-kl": (
        {"perception_divergence": "kl"},
        "CPPO with the exact KL over the vocabulary instead of k3 on the sampled token.",
    ),
    "cppo-js": (
        {"perception_divergence": "js"},
        "CPPO with the exact Jensen-Shannon divergence over the vocabulary instead of k3.",
    ),
    "cppo-score-absolute": (
        {"perception_score": "entropy_shift_absolute"},
        "CPPO detecting by the entropy shift in nats, not relative to the entropy.",
    ),
    "cppo-score-entropy": (
        {"perception_score": "entropy"},
        "CPPO detecting by the entropy under the image alone, the control for every shift.",
    ),
    "cppo-score-k3": (
        {"perception_score": "k3"},
        "CPPO detecting by the k3 divergence of image and I- on the sampled token.",
    ),
    "cppo-score-kl": ({"perception_score": "kl"}, "CPPO detecting by the exact KL divergence of image and I-."),
    "cppo-score-js": (
        {"perception_score": "js"},
        "CPPO detecting by the exact Jensen-Shannon divergence of image and I-.",
    ),
    "cppo-score-logp": (
        {"perception_score": "logp_shift"},
        "CPPO detecting by the log-probability that the sampled token loses under I-.",
    ),
    "cppo-static": (
        {"removing_views": ["static"]},
        "CPPO with a picture of noise as I-: nothing of the image remains, where the published views spare parts by "
        "chance.",
    ),
}
"""The options and the text of each ablation of CPPO."""
OF_CPPO = "\n\nCPPO is arXiv 2601.00501; everything else is as in `cppo`."
OURS = {
    "cppo-static-js": static_view_js,
    "cppo-likelihood": likelihood,
    "cppo-likelihood-all-tokens": likelihood_all_tokens,
}
