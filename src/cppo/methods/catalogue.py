"""The methods, each a short declaration. Figures are the papers'; where one is not given, the docstring says so.

What no method sets keeps TRL's default: learning rate, group size, KL to a reference (`beta`) and the like belong to a
run, so that methods can be compared on the same one. The published values of those stand in the docstrings.
"""

from collections.abc import Container, Mapping
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.methods.blocks import EXECUTION_OPTIONS, Method, Options, declared

DEFAULT_METHOD = "cppo"
"""What `CPPOConfig.method` is where nothing is said."""


def grpo() -> Options:
    """GRPO (arXiv 2402.03300): TRL's trainer and loss alone.

    No views and no perception term. The loss is the one that `loss_type` names: TRL's default "dapo" is a mean over the
    tokens of the step, the GRPO paper's own, "grpo", over a rollout's tokens and then over rollouts.
    """
    return {"perception_sink": "none"}


def dapo() -> Options:
    """DAPO (arXiv 2503.14476): token-level loss and a higher upper clip, 0.2 / 0.28.

    TRL's loss type "dapo", which is also TRL's default, and the clip, which acts where rollouts serve several steps
    (`steps_per_generation`, `num_iterations`): where each batch of them serves one, this is GRPO. Neither the paper
    nor TRL's default (`beta`) has a KL to a reference. The paper's dynamic sampling (prompts drawn again until rewards
    differ) and its penalty on overlong answers are not part of it; `rewards: [..., length]` offers the latter.
    """
    return {**grpo(), "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}


def grpo_views() -> Options:
    """GRPO on augmented images: half of the prompts show I+ instead of their image.

    Plain data augmentation with CPPO's preserving views, the control for every claim about the contrastive term:
    rollouts and update of such a prompt see the same I+. The share of one half is ours.
    """
    return {**grpo(), "rollout_views": ["color_jitter", "perspective", "rotation"], "rollout_view_mode": "augment"}


def cppo() -> Options:
    """CPPO (arXiv 2601.00501): contrast of I+ and I- on the tokens whose entropy rises most without the image.

    Added to GRPO with weight 0.01: softplus((d+ - d-) / 0.1), d the k3 divergence, over the top half of the tokens with
    a positive relative entropy shift, in rollouts with a positive advantage. Published runs: KL 0.01 to the reference,
    G = 5, and the mean over a micro-batch's tokens; ours is over a rollout's tokens, then over rollouts. The paper
    speaks of the token's distribution, its code takes k3 of the sampled token, and so do we (`cppo-kl` has the other).
    The gate passes what earns more than its group, so a well-formatted wrong answer among wrong ones
    (`cppo-correct-gate` does not).
    """
    return {
        "perception_sink": "contrast",
        "perception_weight": 0.01,
        "perception_temperature": 0.1,
        "perception_divergence": "k3",
        "perception_score": "entropy_shift",
        "perception_selector": "top_positive",
        "perception_top_fraction": 0.5,
        "perception_gate": "advantage",
        "preserving_views": ["color_jitter", "perspective", "rotation"],
        "removing_views": ["noise_rectangles", "crop"],
    }


def papo() -> Options:
    """PAPO (arXiv 2507.06448) with GRPO: the policy is to differ from itself on a masked image.

    Loss - 0.02 k3(pi, pi_mask) + 0.05 (H + H_mask) over all tokens of all rollouts with images; patches of 14 pixels
    are blacked with probability 0.6. Their means are taken over a rollout's tokens, then over rollouts, as in the GRPO
    paper (whose RL loss is `loss_type: grpo`), but for H, which TRL averages over the tokens of a micro-batch and which
    `rl_weight` scales. k3 is clamped as CPPO's is.
    """
    return {
        "perception_sink": "divergence",
        "perception_weight": 0.02,
        "perception_preserving_weight": 0.0,
        "perception_removing_weight": 1.0,
        "perception_removing_entropy_weight": 0.05,
        "entropy_coef": -0.05,
        "perception_divergence": "k3",
        "perception_selector": "all",
        "perception_gate": "none",
        "removing_views": ["black_patches"],
        "view_patch_side": 14,
        "view_patch_probability": 0.6,
    }


def papo_dapo() -> Options:
    """PAPO (arXiv 2507.06448) with DAPO: weights 0.01 and 0.03, means over all tokens of the step.

    The rest is as in `papo` and `dapo`.
    """
    return {
        **dapo(),
        **papo(),
        "perception_weight": 0.01,
        "perception_removing_entropy_weight": 0.03,
        "entropy_coef": -0.03,
        "perception_normalization": "token",
    }


def vppo() -> Options:
    """VPPO (arXiv 2510.09285): only the tokens that depend most on the image learn, in rollouts weighted by it.

    Score k3(pi_old, pi_view), the view with patches blacked with probability 0.5. The top 40 % of each rollout's tokens
    keep their advantage, all others get none, while the loss still divides by all; a rollout's advantage is scaled by
    alpha between 0.9 and what makes its mean 1, by its mean score. DAPO's clip, entropy penalty 0.06 (published: G =
    8). Ours: patches of 14 pixels; scores are compared over the whole generation batch; rows without images keep their
    advantages.
    """
    return {
        **dapo(),
        "perception_sink": "advantage",
        "perception_score": "k3",
        "perception_selector": "top",
        "perception_top_fraction": 0.4,
        "perception_gate": "none",
        "perception_advantage_floor": 0.9,
        "entropy_coef": -0.06,
        "removing_views": ["black_patches"],
        "view_patch_side": 14,
        "view_patch_probability": 0.5,
    }


def pgpo() -> Options:
    """PGPO (arXiv 2604.01840): every token's advantage is weighted by how much it depends on the image.

    Score k3(pi_old, pi_view) on a masked image, scaled to I in [0, 1]; weight I / 0.4 below 0.4, else 1 + 2 (I - 0.4) /
    0.6, renormalised. Ours: the scale is that of a rollout's own tokens, from their least score to their largest; the
    weights of a rollout have the mean 1; the mask is PAPO's; rows without images keep their advantages.
    """
    return {
        "perception_sink": "weights",
        "perception_score": "k3",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_weight_threshold": 0.4,
        "perception_weight_slope": 2.0,
        "removing_views": ["black_patches"],
        "view_patch_side": 14,
        "view_patch_probability": 0.6,
    }


def dvrp() -> Options:
    """DVRP (arXiv 2601.06801): differ on a masked image, agree on a noised one.

    Loss - 0.01 KL(mask) + 0.01 KL(noise) over all tokens of all rollouts with images. Ours: the mask is PAPO's, the
    noise 200 of 1,000 steps of the diffusion of NoisyRollout (a standard deviation of about 28 grey levels), KL is the
    exact one.
    """
    return {
        "perception_sink": "divergence",
        "perception_weight": 0.01,
        "perception_preserving_weight": 1.0,
        "perception_removing_weight": 1.0,
        "perception_divergence": "kl",
        "perception_selector": "all",
        "perception_gate": "none",
        "preserving_views": ["diffusion_noise"],
        "view_diffusion_steps": 200,
        "removing_views": ["black_patches"],
        "view_patch_side": 14,
        "view_patch_probability": 0.6,
    }


def noisyrollout() -> Options:
    """NoisyRollout (arXiv 2504.13055): half of a group's rollouts are made from a noised image.

    The update sees the clean image for all of them. Noise of 500 of 1,000 diffusion steps, which decays with the step t
    of T as 500 (1 - sigmoid(30 (t / T - 2 / 3))). Published: 6 + 6 rollouts, no KL. One noised image serves a group's
    half.
    """
    return {
        **grpo(),
        "rollout_views": ["diffusion_noise"],
        "rollout_view_mode": "mix",
        "rollout_view_fraction": 0.5,
        "rollout_view_decay": True,
        "view_diffusion_steps": 500,
    }


def static_view_js() -> Options:
    """CPPO with a picture of noise as I-, detecting by the exact Jensen-Shannon divergence from it.

    Ours, after CPPO (arXiv 2601.00501): of the scores and views tried, the one that finds the true perception tokens of
    all task families (docs/results/detectors.md).
    """
    return {**cppo(), "removing_views": ["static"], "perception_score": "js"}


def likelihood() -> Options:
    """What was rewarded must stay likely under I+: -A log pi(token given I+) with weight 0.3 on the perception tokens.

    Ours, in the place of the contrast of CPPO (arXiv 2601.00501): of the rollouts with a positive advantage A the mean
    over the tokens that `cppo-static-js` selects, then over rollouts. The target is a sampled token that earned its
    reward, where CPPO's are the policy's own probabilities.
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
    """What was rewarded must stay likely under I+, on all tokens: as `cppo-likelihood` without detection and I-.

    Ours, the control for detection; after CPPO (arXiv 2601.00501).
    """
    return {**likelihood(), "perception_selector": "all"}


PUBLISHED = {
    "grpo": grpo,
    "dapo": dapo,
    "grpo+views": grpo_views,
    "cppo": cppo,
    "papo": papo,
    "papo-dapo": papo_dapo,
    "vppo": vppo,
    "pgpo": pgpo,
    "dvrp": dvrp,
    "noisyrollout": noisyrollout,
}
ABLATIONS: Mapping[str, tuple[Options, str]] = {
    "cppo-no-gate": ({"perception_gate": "none"}, "CPPO on every rollout with images, whatever its advantage."),
    "cppo-correct-gate": (
        {"perception_gate": "correct", "perception_gate_reward": "accuracy_reward"},
        "CPPO on the rollouts with a right answer, whatever their advantage.",
    ),
    "cppo-all-tokens": ({"perception_selector": "all"}, "CPPO on every response token: no detection."),
    "cppo-random-tokens": (
        {"perception_selector": "random"},
        "CPPO on random response tokens, in each rollout as many as the published rule selects.",
    ),
    "cppo-cpl-only": (
        {"rl_weight": 0.0},
        "CPPO without the RL loss: the contrastive term alone trains.\n\n"
        "Rewards still decide which rollouts are gated in. A KL to the reference is part of the RL loss and goes with "
        "it.",
    ),
    "cppo-positive-only": (
        {"perception_removing_weight": 0.0},
        "CPPO with I+ alone in the contrast: softplus(d+ / tau). I- still serves detection.",
    ),
    "cppo-negative-only": (
        {"perception_preserving_weight": 0.0},
        "CPPO with I- alone in the contrast: softplus(-d- / tau).",
    ),
    "cppo-detached-views": (
        {"perception_view_gradients": False},
        "CPPO whose gradient flows through the anchor alone, not through the policy under the views.",
    ),
    "cppo-detached-anchor": (
        {"perception_anchor_gradients": False},
        "CPPO whose gradient flows through the views' passes alone: the image's answers are their fixed target.",
    ),
    "cppo-kl": (
        {"perception_divergence": "kl"},
        "CPPO with the exact KL over the vocabulary in place of k3 on the sampled token.",
    ),
    "cppo-js": (
        {"perception_divergence": "js"},
        "CPPO with the exact Jensen-Shannon divergence over the vocabulary in place of k3.",
    ),
    "cppo-score-absolute": (
        {"perception_score": "entropy_shift_absolute"},
        "CPPO that detects by the entropy shift in nats, not relative to the entropy.",
    ),
    "cppo-score-entropy": (
        {"perception_score": "entropy"},
        "CPPO that detects by the entropy under the image alone, the control for every shift.",
    ),
    "cppo-score-k3": (
        {"perception_score": "k3"},
        "CPPO that detects by the k3 divergence of image and I- on the sampled token.",
    ),
    "cppo-score-kl": ({"perception_score": "kl"}, "CPPO that detects by the exact KL divergence of image and I-."),
    "cppo-score-js": (
        {"perception_score": "js"},
        "CPPO that detects by the exact Jensen-Shannon divergence of image and I-.",
    ),
    "cppo-score-logp": (
        {"perception_score": "logp_shift"},
        "CPPO that detects by how much log-probability the sampled token loses under I-.",
    ),
    "cppo-static": (
        {"removing_views": ["static"]},
        "CPPO with a picture of noise as I-: nothing of the image is left, where the published views spare parts by "
        "chance.",
    ),
}
"""What each changes in CPPO, and its text."""
OF_CPPO = "\n\nCPPO is arXiv 2601.00501; all else is as in `cppo`."
OURS = {
    "cppo-static-js": static_view_js,
    "cppo-likelihood": likelihood,
    "cppo-likelihood-all-tokens": likelihood_all_tokens,
}
METHODS: Mapping[str, Method] = {
    **{name: declared(name, declaration) for name, declaration in PUBLISHED.items()},
    **{name: Method(name, {**cppo(), **changes}, text + OF_CPPO) for name, (changes, text) in ABLATIONS.items()},
    **{name: declared(name, declaration) for name, declaration in OURS.items()},
}
"""Every method by name: published ones, CPPO's ablations, then ours."""


def get_method(name: str) -> Method:
    """The method of that name. Raises UserError that lists the names."""
    if name not in METHODS:
        raise UserError(f"method = {name!r}: {choose_one(name, METHODS)}")
    return METHODS[name]


def with_method(options: Mapping[str, Any], name: str) -> Options:
    """`options` with what the method sets where they say nothing. Raises UserError for an unknown method."""
    return {**get_method(name).options, **options}


def without_method(options: Mapping[str, Any], own: Container[str]) -> Options:
    """`options` without those that belong to a method (of CPPO's `own`), those that their own method sets, and its
    name.
    """
    name = options.get("method", DEFAULT_METHOD)
    set_by_it = METHODS[name].options if isinstance(name, str) and name in METHODS else {}
    return {
        option: value
        for option, value in options.items()
        if option in EXECUTION_OPTIONS or (option not in own and option not in set_by_it)
    }
