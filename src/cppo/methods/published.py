"""The published methods, each a short declaration. Figures come from the papers and their code; the docstrings say
which, and say where a figure was not found.

A method leaves the options of a run to TRL's defaults: learning rate, KL to a reference (`beta`) and others; the group
size too, except where the method has no groups. So methods can be compared on the same run. The docstrings give their
published values.
"""

from cppo.methods.blocks import Options


def grpo() -> Options:
    """GRPO (arXiv 2402.03300): TRL's trainer and loss alone.

    No views and no perception term. `loss_type` names the loss. TRL's default "dapo" is a mean over the tokens of the
    step; the GRPO paper's own, "grpo", is a mean over a rollout's tokens, then over rollouts.
    """
    return {"perception_sink": "none"}


def dapo() -> Options:
    """DAPO (arXiv 2503.14476): token-level loss and a higher upper clip, 0.2 / 0.28.

    It sets TRL's loss type "dapo" (also TRL's default) and the clip. The clip acts only where rollouts serve several
    steps (`steps_per_generation`, `num_iterations`); otherwise this is GRPO. Neither the paper nor TRL's default
    (`beta`) has a KL to a reference. Two parts of the paper are options of the run. Dynamic sampling draws prompts
    again until rewards differ and costs up to K generations a step (`dynamic_sampling_rounds: K`). The penalty on
    overlong answers is `rewards: [..., length]`.
    """
    return {**grpo(), "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}


def grpo_views() -> Options:
    """GRPO on augmented images: half of the prompts show I+ instead of their image.

    Plain data augmentation with CPPO's preserving views, the control for every claim about the contrastive term.
    Rollouts and update of such a prompt see the same I+. The share of one half is ours.
    """
    return {**grpo(), "rollout_views": ["color_jitter", "perspective", "rotation"], "rollout_view_mode": "augment"}


def cppo() -> Options:
    """CPPO (arXiv 2601.00501): contrast of I+ and I- on the tokens whose entropy rises most without the image.

    The loss 0.01 softplus((d+ - d-) / 0.1), d the k3 divergence, is added to GRPO. It covers the top half of the tokens
    with a positive relative entropy shift, in rollouts with a positive advantage. Published runs: KL 0.01 to the
    reference, G = 5, and a mean over a micro-batch's tokens. Ours is a mean over a rollout's tokens, then over
    rollouts. The paper describes the token's distribution; its code, and ours, takes k3 of the sampled token (`cppo-kl`
    takes the distribution). Its code also lets one position after the end of the response compete for selection; ours
    does not. The gate passes rollouts that earn more than their group, so also a well-formatted wrong answer among
    wrong ones (`cppo-correct-gate` does not).
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


def cppo_async() -> Options:
    """CPPO's asynchronous code (arXiv 2601.00501): contrast by log-probabilities, in which the anchor cancels.

    The divergence is k1 = log pi(token | I) - log pi(token | view), so d+ - d- is what the token loses from I+ to I-.
    The anchor gets no gradient from it, unless it is clamped (at 10). It selects half of the tokens with a positive
    shift, rounded up, adds Gaussian blur to I+, and draws views once for the whole run. All else is as in `cppo`. Its
    runs, which a method does not set: G = 4, rollouts at most 4 updates old, no KL to the reference, clip 0.4,
    advantages normalized once more over the batch.
    """
    return {
        **cppo(),
        "perception_divergence": "k1",
        "perception_top_rounding": "ceil",
        "preserving_views": ["color_jitter", "perspective", "rotation", "gaussian_blur"],
        "view_draws": "once",
    }


def papo() -> Options:
    """PAPO (arXiv 2507.06448) with GRPO, as its 7B script: the policy must differ from itself on a masked image.

    Loss - 0.02 k3(pi, pi_mask) + 0.05 (H + H_mask), means over all tokens of the step. Patches of 14 pixels turn black
    with probability 0.6. As in its code (and unlike its formula), the policy that made the rollouts scores the masked
    image once, without gradient. So H_mask is a constant. An entropy is -log pi of the sampled token; the clip is 0.2 /
    0.3, and 3 for negative advantages. TRL averages H over a micro-batch, and `rl_weight` scales it. The paper's form
    is `perception_view_policy: current` with `perception_view_gradients: true` and `entropy_estimator: exact`.
    Published runs: KL 0.01 to the reference, G = 5.
    """
    return {
        **papo_3b(),
        "perception_removing_entropy_weight": 0.05,
        "entropy_coef": -0.05,
        "entropy_estimator": "sampled",
    }


def papo_3b() -> Options:
    """PAPO (arXiv 2507.06448) with GRPO, as its 3B script: `papo` without the entropy terms."""
    return {
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "delta": 3.0,
        "perception_sink": "divergence",
        "perception_weight": 0.02,
        "perception_preserving_weight": 0.0,
        "perception_removing_weight": 1.0,
        "perception_divergence": "k3",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_normalization": "token",
        "perception_view_policy": "rollout",
        "perception_view_gradients": False,
        "removing_views": ["black_patches"],
        "view_patch_side": 14,
        "view_patch_probability": 0.6,
    }


def papo_dapo() -> Options:
    """PAPO (arXiv 2507.06448) with DAPO: weights 0.01 and 0.03, clip 0.2 / 0.28.

    All else is as in `papo`. Published runs draw prompts again until rewards differ (`dynamic_sampling_rounds`) and
    have no KL.
    """
    return {
        **papo(),
        "epsilon_high": 0.28,
        "perception_weight": 0.01,
        "perception_removing_entropy_weight": 0.03,
        "entropy_coef": -0.03,
    }


def vppo() -> Options:
    """VPPO (arXiv 2510.09285): only the tokens that depend most on the image learn, in rollouts weighted by dependency.

    Score: k3(pi_old, pi_view). The view has patches of 14 pixels blacked with probability 0.5, and is drawn for each
    rollout. The top 40 % of each rollout's tokens, rounded up, keep their advantage; all others get 0, and the loss
    still divides by all tokens. A rollout's mean score scales its advantage by alpha, from 0.9 to a ceiling that makes
    the mean 1. The clip is DAPO's, and 3 for negative advantages. As in its code, a process compares the scores of the
    rollouts of one optimizer step, and alpha has mean 1 in a micro-batch. The entropy with penalty 0.06 is -log pi of
    the sampled token. The paper's form is `perception_advantage_scope: batch` with `entropy_estimator: exact`. Ours:
    rows without images keep their advantages. Published runs: G = 8, prompts drawn again until rewards differ
    (`dynamic_sampling_rounds`, which a method does not set).
    """
    return {
        **dapo(),
        "delta": 3.0,
        "perception_sink": "mask_advantage",
        "perception_score": "k3",
        "perception_selector": "top",
        "perception_top_fraction": 0.4,
        "perception_top_rounding": "ceil",
        "perception_gate": "none",
        "perception_advantage_floor": 0.9,
        "perception_advantage_scope": "minibatch",
        "entropy_coef": -0.06,
        "entropy_estimator": "sampled",
        "removing_views": ["black_patches"],
        "view_draws": "rollout",
        "view_patch_side": 14,
        "view_patch_probability": 0.5,
    }


def pgpo() -> Options:
    """PGPO (arXiv 2604.01840): each token's dependency on the image weights its advantage.

    Score S = k3(pi_old, pi_view), under a view in which no token attends to an image token. I is log(1 + S) scaled to
    [0, 1] over a rollout's tokens. The weight is I / 0.4 below 0.4, else 1 + 2 (I - 0.4) / 0.6, divided by its mean
    over the rollout. The loss is DAPO's. Its code is not public; a third party reports a development version with the
    0.4 quantile of I instead of 0.4, weights of at least 0.1, and no division. Ours: every token keeps its position,
    the tokens around an image stay visible, and rows without images keep their advantages.
    """
    return {
        **dapo(),
        "perception_sink": "scale_advantage",
        "perception_score": "k3",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_weight_threshold": 0.4,
        "perception_weight_slope": 2.0,
        "removing_views": ["attention_masked"],
    }


def cfpo() -> Options:
    """CFPO (arXiv 2606.23206) with GRPO: the policy must differ from itself with the attended image tokens averaged
    out.

    Loss - 0.02 k3(pi, pi_view), a mean over all tokens of the step. The view lies inside the model: in each layer,
    image tokens to which text attends beyond mean + 2 standard deviations get the mean value. As in its code, the
    policy that made the rollouts scores the view once, without gradient. Ours, because not found: the attention is
    averaged over heads and the prompt's text tokens; mean and deviation, and each head's mean value, are over one
    prompt's image tokens. With DAPO: `loss_type`, `epsilon_high` and `perception_weight: 0.01`.
    """
    return {
        "perception_sink": "divergence",
        "perception_weight": 0.02,
        "perception_preserving_weight": 0.0,
        "perception_removing_weight": 1.0,
        "perception_divergence": "k3",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_normalization": "token",
        "perception_view_policy": "rollout",
        "perception_view_gradients": False,
        "removing_views": ["values_replaced"],
    }


def dvrp() -> Options:
    """DVRP (arXiv 2601.06801): differ on a masked image, agree on a noised one.

    Loss - 0.01 KL(mask) + 0.01 KL(noise) + 0.05 (H_mask + H_noise) over all tokens of all rollouts with images; KL and
    entropy are over the vocabulary. The noise is NoisyRollout's; at step t of T, 500 (1 - sigmoid(10 (t / T - 1/2))) of
    its 1,000 steps are left. Its code is not public: the mask is PAPO's, and gradients flow through the views, as in
    the formula. The midpoint at half of the run is ours: it was not found.
    """
    return {
        "perception_sink": "divergence",
        "perception_weight": 0.01,
        "perception_preserving_weight": 1.0,
        "perception_removing_weight": 1.0,
        "perception_preserving_entropy_weight": 0.05,
        "perception_removing_entropy_weight": 0.05,
        "perception_divergence": "kl",
        "perception_selector": "all",
        "perception_gate": "none",
        "preserving_views": ["diffusion_noise"],
        "view_diffusion_steps": 500,
        "view_diffusion_decay": [10.0, 0.5],
        "removing_views": ["black_patches"],
        "view_patch_side": 14,
        "view_patch_probability": 0.6,
    }


def noisyrollout() -> Options:
    """NoisyRollout (arXiv 2504.13055): half of a group's rollouts are made from a noised image.

    The update sees the clean image for all rollouts. The noise starts at 500 of 1,000 diffusion steps and decays with
    the generation batch t of T, from 1, as 500 (1 - sigmoid(30 (t / T - 2 / 3))): 250 at t = 40 of 60. As in its code,
    the vision tower is frozen, and entropy has a bonus of 0.001, which the paper does not mention. Published: 6 + 6
    rollouts, no KL. The noised half of a group shares one image.
    """
    return {
        **grpo(),
        "entropy_coef": 0.001,
        "freeze_vision_tower": True,
        "rollout_views": ["diffusion_noise"],
        "rollout_view_mode": "mix",
        "rollout_view_fraction": 0.5,
        "view_diffusion_steps": 500,
        "view_diffusion_decay": [30.0, 2 / 3],
    }


def saei() -> Options:
    """SaEI (after arXiv 2512.10414, constants ours): half of the rollouts see an image changed to make the policy
    unsure.

    The clean rollouts come first. Then gradient steps on the image raise the entropy of their tokens of middle entropy,
    a mean over tokens and rollouts. The other rollouts are made from this image; the group's statistics are GRPO's. Its
    code is not public. Step, bound, direction, band, the share of rollouts and the image of the update were not found.
    Ours: one sign step of 0.1 in the processor's normalized pixels, the tokens between the quantiles 0.2 and 0.8 of a
    rollout's entropies, half of the rollouts, and the clean image for every update, as in NoisyRollout.
    """
    return {
        **grpo(),
        "rollout_views": ["entropy_ascent"],
        "rollout_view_mode": "mix",
        "rollout_view_fraction": 0.5,
        "view_ascent_steps": 1,
        "view_ascent_step": 0.1,
        "view_ascent_bound": 0.1,
        "view_ascent_direction": "sign",
        "view_ascent_band": [0.2, 0.8],
    }


PUBLISHED = {
    "grpo": grpo,
    "dapo": dapo,
    "grpo+views": grpo_views,
    "cppo": cppo,
    "cppo-async": cppo_async,
    "papo": papo,
    "papo-3b": papo_3b,
    "papo-dapo": papo_dapo,
    "vppo": vppo,
    "pgpo": pgpo,
    "cfpo": cfpo,
    "dvrp": dvrp,
    "noisyrollout": noisyrollout,
    "saei": saei,
}
"""The published methods by name."""
