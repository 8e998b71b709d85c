"""Every method's loss in float64, from its formula: one rollout and view at a time, lists and loops."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from float64_reference import GROUP, chosen_tokens, divergences, entropy, log_softmax, reference_logits
from rollout_stubs import drawn_completions, parity_reward, token_reward

from cppo.views import ViewSampler, ViewStrengths, load_rgb

JITTER = (("color_jitter", "perspective", "rotation"), ("noise_rectangles", "crop"), ViewStrengths())
MASK = (JITTER[0], ("black_patches",), ViewStrengths(patch_side=14, patch_probability=0.6))
HALF_MASK = (JITTER[0], ("black_patches",), ViewStrengths(patch_side=14, patch_probability=0.5))
NOISE_AND_MASK = (("diffusion_noise",), ("black_patches",), ViewStrengths(diffusion_steps=200))
STATIC = (JITTER[0], ("static",), ViewStrengths())
VIEWS_OF = {"papo": MASK, "papo-dapo": MASK, "vppo": HALF_MASK, "pgpo": MASK, "dvrp": NOISE_AND_MASK}
VIEWS_OF |= dict.fromkeys(("cppo-static", "cppo-static-js", "cppo-likelihood", "cppo-likelihood-all-tokens"), STATIC)


@dataclass
class Seen:
    """A rollout: its advantage, whether its answer counts as right, and by token what the three views say of it."""

    tokens: int
    advantage: float
    correct: bool
    has_images: bool
    plus: dict
    minus: dict
    entropy: list
    entropy_minus: list
    fall: list


def seen_rollouts(model, processor, rows, seed, views):
    """All rollouts of the rows, under the views of (families of I+, families of I-, strengths)."""
    sampler = ViewSampler(seed, *views)
    seen = []
    for row in rows:
        images = [load_rgb(image) for image in row["images"]]
        pads = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
        text = f"<|im_start|>user\n{pads}{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = processor(text=[text], images=[images] if images else None)["input_ids"][0]
        completions = drawn_completions([prompt] * GROUP)
        right = parity_reward(completions)
        rewards = [a + b for a, b in zip(token_reward(completions), right, strict=True)]
        mean = sum(rewards) / GROUP
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (GROUP - 1))
        pairs = [sampler.views(image, row["sample_id"], 0, i) for i, image in enumerate(images)]
        for completion, reward, correct in zip(completions, rewards, right, strict=True):
            advantage = (reward - mean) / (deviation + 1e-4)
            with torch.no_grad():
                anchor, preserving, removing = (
                    log_softmax(reference_logits(model, processor, row, shown, completion).numpy())
                    for shown in (images, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
                )
            seen.append(
                Seen(
                    len(completion),
                    advantage,
                    bool(correct),
                    bool(images),
                    divergences(anchor, preserving, completion),
                    divergences(anchor, removing, completion),
                    [entropy(p) for p in anchor.tolist()],
                    [entropy(p) for p in removing.tolist()],
                    [p[t] - q[t] for p, q, t in zip(anchor.tolist(), removing.tolist(), completion, strict=True)],
                )
            )
    return seen


top_of_positive = partial(chosen_tokens, fraction=0.5)


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def best(scores, count):
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def relative_shift(r):
    return [max(b - a, 0) / (b + 1e-6) for a, b in zip(r.entropy, r.entropy_minus, strict=True)]


def contrast(difference):
    """softplus(difference / 0.1)."""
    x = difference / 0.1
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def cppo(rollouts, gate, places, loss, weight=0.01):
    """Mean over a rollout's chosen tokens, then over gated-in rollouts; an empty choice adds 0."""
    gated = [r for r in rollouts if r.has_images and gate(r)]
    totals = [mean(loss(r, place) for place in places(r)) if places(r) else 0.0 for r in gated]
    return weight * math.fsum(totals) / len(gated)


def k3_contrast(r, place):
    return contrast(r.plus["k3"][place] - r.minus["k3"][place])


def positive(r):
    return r.advantage > 0


def published(r):
    return top_of_positive(relative_shift(r))


def scored_by(score):
    return lambda rollouts: cppo(rollouts, positive, lambda r: top_of_positive(score(r)), k3_contrast)


def compared_by(name):
    def loss(r, place):
        return contrast(r.plus[name][place] - r.minus[name][place])

    return lambda rollouts: cppo(rollouts, positive, published, loss)


def all_tokens(r):
    return range(r.tokens)


def papo(rollouts):
    images = [r for r in rollouts if r.has_images]
    masked = mean(
        mean(-0.02 * d + 0.05 * h for d, h in zip(r.minus["k3"], r.entropy_minus, strict=True)) for r in images
    )
    return masked + 0.05 * mean(h for r in rollouts for h in r.entropy)


def papo_dapo(rollouts):
    tokens = [pair for r in rollouts if r.has_images for pair in zip(r.minus["k3"], r.entropy_minus, strict=True)]
    return mean(-0.01 * d + 0.03 * h for d, h in tokens) + 0.03 * mean(h for r in rollouts for h in r.entropy)


def dvrp(rollouts):
    images = [r for r in rollouts if r.has_images]
    return 0.01 * mean(
        mean(plus - minus for plus, minus in zip(r.plus["kl"], r.minus["kl"], strict=True)) for r in images
    )


def likelihood(places):
    """-0.3 A log pi(token | I+), mean over a rollout's chosen tokens, then over the rollouts with A > 0."""
    return lambda rollouts: cppo(rollouts, positive, places, lambda r, place: r.advantage * r.plus["nll"][place], 0.3)


TERMS = {
    "grpo": lambda rollouts: 0.0,
    "dapo": lambda rollouts: 0.0,
    "cppo": scored_by(relative_shift),
    "papo": papo,
    "papo-dapo": papo_dapo,
    "dvrp": dvrp,
    "cppo-no-gate": lambda rollouts: cppo(rollouts, lambda r: True, published, k3_contrast),
    "cppo-correct-gate": lambda rollouts: cppo(rollouts, lambda r: r.correct, published, k3_contrast),
    "cppo-all-tokens": lambda rollouts: cppo(rollouts, positive, all_tokens, k3_contrast),
    "cppo-cpl-only": scored_by(relative_shift),
    "cppo-positive-only": lambda rollouts: cppo(
        rollouts, positive, published, lambda r, place: contrast(r.plus["k3"][place])
    ),
    "cppo-negative-only": lambda rollouts: cppo(
        rollouts, positive, published, lambda r, place: contrast(-r.minus["k3"][place])
    ),
    "cppo-detached-views": scored_by(relative_shift),
    "cppo-detached-anchor": scored_by(relative_shift),
    "cppo-kl": compared_by("kl"),
    "cppo-js": compared_by("js"),
    "cppo-score-absolute": scored_by(lambda r: [b - a for a, b in zip(r.entropy, r.entropy_minus, strict=True)]),
    "cppo-score-entropy": scored_by(lambda r: r.entropy),
    "cppo-score-k3": scored_by(lambda r: r.minus["k3"]),
    "cppo-score-kl": scored_by(lambda r: r.minus["kl"]),
    "cppo-score-js": scored_by(lambda r: r.minus["js"]),
    "cppo-score-logp": scored_by(lambda r: r.fall),
    "cppo-static": scored_by(relative_shift),
    "cppo-static-js": scored_by(lambda r: r.minus["js"]),
    "cppo-likelihood": likelihood(lambda r: top_of_positive(r.minus["js"])),
    "cppo-likelihood-all-tokens": likelihood(all_tokens),
}
"""What each method adds to the RL loss."""


def rl_loss(rollouts):
    """The token-level policy loss at ratio 1."""
    return -math.fsum(r.advantage * r.tokens for r in rollouts) / sum(r.tokens for r in rollouts)


def vppo_loss(rollouts):
    """VPPO's whole loss: top 40 % of tokens, weighted advantages, all tokens in the denominator, entropy penalty."""
    dependency = {i: mean(r.minus["k3"]) for i, r in enumerate(rollouts) if r.has_images}
    low, high = min(dependency.values()), max(dependency.values())
    scaled = {i: (value - low) / (high - low) for i, value in dependency.items()}
    ceiling = 0.9 + 0.1 / mean(scaled.values())
    total = 0.0
    for i, r in enumerate(rollouts):
        if not r.has_images:
            total += r.advantage * r.tokens
            continue
        kept = best(r.minus["k3"], max(1, math.floor(0.4 * r.tokens)))
        total += r.advantage * (0.9 + (ceiling - 0.9) * scaled[i]) * len(kept)
    tokens = sum(r.tokens for r in rollouts)
    return -total / tokens + 0.06 * math.fsum(h for r in rollouts for h in r.entropy) / tokens


def pgpo_weights(rollouts):
    """The weight of every token of every rollout, as lists."""
    found = []
    for r in rollouts:
        if not r.has_images:
            found.append([1.0] * r.tokens)
            continue
        low, high = min(r.minus["k3"]), max(r.minus["k3"])
        scaled = [(value - low) / (high - low) for value in r.minus["k3"]]
        weights = [u / 0.4 if u < 0.4 else 1 + 2 * (u - 0.4) / 0.6 for u in scaled]
        found.append([weight / mean(weights) for weight in weights])
    return found
