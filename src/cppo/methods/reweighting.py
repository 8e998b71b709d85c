"""Published methods of 2025 and 2026 that weight tokens without a perception loss, each a short declaration.

As in `cppo.methods.published`, a method sets what its paper and code define; the docstrings give the values that belong
to a run. For methods without public code, the facts are the paper's as third parties report them.
"""

from cppo.methods.blocks import Options
from cppo.methods.published import dapo


def sent() -> Options:
    """SENT (arXiv 2512.04359), its loss alone: a KL penalty on low-entropy tokens of extreme covariance.

    Paper: beta KL(pi || reference), k3, on tokens with an entropy below a bound; the high beta applies where the
    covariance of log-probability and advantage exceeds another bound. Neither bounds nor betas were found. Its code,
    and ours, takes the 80 % of a micro-batch's tokens of lowest entropy. Among them the 0.02 % of largest covariance
    (at least one) have 0.1 x 2.0 |log pi - log pi_old|, and as many of smallest covariance 0.1 x 0.5. The mean is over
    all tokens, and ratios are not clipped. The penalty acts where rollouts serve several steps. The paper's form:
    `perception_kl_target: reference`, `perception_selector: band_values` with `perception_band` and
    `perception_covariance_threshold`. Published runs: beta 0.001, T = 1, and a curriculum of two stages by semantic
    entropy, which `data_ratings` and `data_stages: 2` add.
    """
    return {
        "loss_type": "dapo",
        "epsilon": 1.0e6,
        "perception_sink": "covariance_kl",
        "perception_weight": 0.1,
        "perception_score": "entropy",
        "perception_selector": "bottom",
        "perception_selector_scope": "batch",
        "perception_top_fraction": 0.8,
        "perception_gate": "none",
        "perception_normalization": "microbatch",
        "perception_kl_target": "old",
        "perception_kl_weights": [2.0, 0.5],
        "perception_covariance_fraction": 0.0002,
    }


def mssr() -> Options:
    """MSSR (arXiv 2512.18215): one rollout per prompt, compared with the prompt's earlier rewards.

    Advantage: the reward minus the prompt's expected share a / (a + b), scaled to mean 0 and variance 1 over the
    generation batch. Then a <- eta a + [r > 0.5] and b <- eta b + [r <= 0.5]. Before the first step, one response to
    each prompt gives a + b = 8. Every token gets a bonus of min(0.4 H, |A| / 2). As in its code, H is -p log p of the
    sampled token; the paper has the entropy (`perception_score: entropy`). Reports of the paper give 0.4 and 2 the
    other way around than its code and ours: H times 0.4, |A| by 2. Eta lies within [0.875, 0.96]. In the paper it falls
    with the KL to the reference; in its code and ours it rises up to the target of 0.01 and drops to 0.875 beyond. Its
    configuration names a window of 20 batches, but uses 10. Ours: the KL is k3; a prompt that the first pass did not
    see begins at 4 and 4; with `num_generations` above 1 each rollout counts. Published runs: `beta: 0.01`, 2,048
    prompts in updates of 128, gradient norm 0.5, accuracy the only reward.
    """
    return {
        "num_generations": 1,
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "advantage_baseline": "prompt",
        "baseline_init_samples": 1,
        "baseline_memory": [0.875, 0.96],
        "baseline_kl_target": 0.01,
        "baseline_kl_window": 10,
        "perception_sink": "add_advantage",
        "perception_score": "sampled_entropy",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_bonus_weight": 0.4,
        "perception_bonus_limit": 0.5,
        "rewards": {"accuracy": 1.0},
    }


def tor() -> Options:
    """ToR (arXiv 2603.25077): the most uncertain tokens learn fully, the most image-dependent others by half.

    The 30 % of a generation batch's tokens with the highest entropy, over the renormalized nucleus of 0.95, have
    weight 1. The 30 % with the largest |log p - log p(no image)| have 0.5 where the first set lacks them; all others 0.
    The image and the tokens around it are removed from the prompt. No code is public; a third party reports that the
    nucleus is renormalized. Ours: rows without images keep their advantages. Published: G = 12, KL 0.01 to the
    reference.
    """
    return {
        "perception_sink": "mask_advantage",
        "perception_score": "logp_difference",
        "perception_selector": "two_sets",
        "perception_selector_scope": "batch",
        "perception_top_fraction": 0.3,
        "perception_entropy_fraction": 0.3,
        "perception_nucleus": 0.95,
        "perception_set_weights": [1.0, 0.5],
        "perception_gate": "none",
        "perception_advantage_floor": 1.0,
        "removing_views": ["image_removed"],
    }


def vepo() -> Options:
    """VEPO (arXiv 2606.03937): a fifth of each rollout's tokens learn, uncertain tokens that depend on the image.

    Score E (1 - (1 - J)^0.7 (1 - D)^0.3), each scaled to [0, 1] over the rollout: J is the Jensen-Shannon divergence
    from I-, D the change of the entropy, E the entropy. The loss is a mean over the selected tokens. As in its code,
    the vision tower is frozen, and entropy has a bonus of 0.001. The paper takes 500 diffusion steps. Its code adds
    Gaussian noise to the normalized pixels, described as of deviation 2; a loop adds it once for each of a prompt's 12
    rollouts, so the deviation is 2 sqrt(12) = 6.93, and so is ours (`view_pixel_noise`). Published: G = 12, no KL, clip
    0.2.
    """
    return {
        "loss_type": "dapo",
        "entropy_coef": 0.001,
        "freeze_vision_tower": True,
        "perception_sink": "mask_advantage",
        "perception_score": "anchored_entropy",
        "perception_selector": "top",
        "perception_top_fraction": 0.2,
        "perception_gate": "none",
        "perception_advantage_floor": 1.0,
        "perception_advantage_mean": "selected",
        "removing_views": ["pixel_noise"],
        "view_pixel_noise": 6.93,
    }


def pepo() -> Options:
    """PEPO (arXiv 2603.22847) with GRPO: tokens near the image, gated by entropy, learn more; no second pass.

    A token's s is the mean cosine of its hidden states with those of the image tokens, over image tokens and layers.
    The weight is T softmax(s (1 + 0.05 tanh(u - mean u)) / 1.8), with u = s + entropy, each scaled to [0, 1] over the
    rollout. Its share of the advantage grows linearly from 0 to 1 over the run. The paper does not mention the 1.8 of
    its code, and freezes the vision tower. Ours: the layers are all except the embeddings, the last after the final
    norm. The last token of a response, which no pass covers, has the s of the token before. Published: G = 8, KL 0.001,
    clip 0.2.
    """
    return {
        "loss_type": "grpo",
        "freeze_vision_tower": True,
        "perception_sink": "softmax_advantage",
        "perception_score": "image_cosine_layers",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_softmax_gate": 0.05,
        "perception_softmax_temperature": 1.8,
        "perception_shaping_weight": 1.0,
        "schedules": ["perception_shaping_weight=linear:0:1"],
    }


def vgpo() -> Options:
    """VGPO (arXiv 2604.09349) with DAPO: advantages grow with a token's similarity to the image; no second pass.

    Score (1 + cosine) / 2 of the last hidden state with the mean of the image tokens'. In the second half of a
    response, the best fifth is multiplied by 1 + 0.3 t / (T - 1). With w the score scaled to [0, 1] over the rollout,
    the token's factor is 1 + w - mean w within [0.1, 2]; the rollout's is the same for the sum of w in its group,
    within [0.9, 2]. The clamps are from its code. Offset (1 + cosine) and group are the paper's, scored once before the
    updates; its code takes the smallest cosine of a micro-batch, scores in each update, and groups 8 neighbours of a
    micro-batch. The last token of a response is as in `pepo`. Published: G = 8, no KL.
    """
    return {
        **dapo(),
        "perception_sink": "factor_advantage",
        "perception_score": "image_focus",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_advantage_floor": 0.9,
    }


def prpo() -> Options:
    """PRPO-like (after arXiv 2606.08708, constants ours): tokens that need the image and are robust to changes learn
    more.

    The paper scores robust visual dependency: high where a token is sensitive to the image's removal and stable under
    perturbation. It reshapes advantages by this score; no formula was found. Ours: J(I-) (1 - J(I+) / ln 2), J the
    exact Jensen-Shannon divergence, and the weights of `pgpo` on DAPO's loss.
    """
    return {
        **dapo(),
        "perception_sink": "scale_advantage",
        "perception_score": "robust_dependency",
        "perception_selector": "all",
        "perception_gate": "none",
        "perception_weight_threshold": 0.4,
        "perception_weight_slope": 2.0,
        "preserving_views": ["color_jitter", "perspective", "rotation"],
        "removing_views": ["static"],
    }


REWEIGHTING = {"mssr": mssr, "sent": sent, "tor": tor, "vepo": vepo, "pepo": pepo, "vgpo": vgpo, "prpo": prpo}
"""These methods by name."""
