"""Every method's loss in float64, from its formula: one rollout and view at a time, lists and loops."""

import math
from functools import partial

from float64_reference import JITTER, best, contrast, reference_term

from cppo.views import ViewStrengths

MASK = (JITTER[0], ("black_patches",), ViewStrengths(patch_side=14, patch_probability=0.6))
HALF_MASK = (JITTER[0], ("black_patches",), ViewStrengths(patch_side=14, patch_probability=0.5))
NOISE_AND_MASK = (("diffusion_noise",), ("black_patches",), ViewStrengths(diffusion_steps=200))
STATIC = (JITTER[0], ("static",), ViewStrengths())
VIEWS_OF = {"papo": MASK, "papo-dapo": MASK, "vppo": HALF_MASK, "pgpo": MASK, "dvrp": NOISE_AND_MASK}
VIEWS_OF |= dict.fromkeys(("cppo-static", "cppo-static-js", "cppo-likelihood", "cppo-likelihood-all-tokens"), STATIC)


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def cppo(rollouts, weight=0.01, **options):
    """Mean over a rollout's chosen tokens, then over gated-in rollouts; an empty choice adds 0."""
    return weight * reference_term(rollouts, tau=0.1, fraction=0.5, **options)


def all_tokens(r):
    return range(r.tokens)


def papo(rollouts):
    images = [r for r in rollouts if r.has_images]
    masked = mean(
        mean(-0.02 * d + 0.05 * h for d, h in zip(r.removing["k3"], r.entropies[2], strict=True)) for r in images
    )
    return masked + 0.05 * mean(h for r in rollouts for h in r.entropies[0])


def papo_dapo(rollouts):
    tokens = [pair for r in rollouts if r.has_images for pair in zip(r.removing["k3"], r.entropies[2], strict=True)]
    return mean(-0.01 * d + 0.03 * h for d, h in tokens) + 0.03 * mean(h for r in rollouts for h in r.entropies[0])


def dvrp(rollouts):
    images = [r for r in rollouts if r.has_images]
    return 0.01 * mean(
        mean(plus - minus for plus, minus in zip(r.preserving["kl"], r.removing["kl"], strict=True)) for r in images
    )


def likelihood(**choice):
    """-0.3 A log pi(token | I+), mean over a rollout's chosen tokens, then over the rollouts with A > 0."""
    return partial(cppo, weight=0.3, loss=lambda r, place: r.advantage * r.preserving["nll"][place], **choice)


TERMS = {
    "grpo": lambda rollouts: 0.0,
    "dapo": lambda rollouts: 0.0,
    "cppo": cppo,
    "papo": papo,
    "papo-dapo": papo_dapo,
    "dvrp": dvrp,
    "cppo-no-gate": partial(cppo, gate="none"),
    "cppo-correct-gate": partial(cppo, gate="correct"),
    "cppo-all-tokens": partial(cppo, places=all_tokens),
    "cppo-cpl-only": cppo,
    "cppo-positive-only": partial(cppo, loss=lambda r, place: contrast(r.preserving["k3"][place], 0.1)),
    "cppo-negative-only": partial(cppo, loss=lambda r, place: contrast(-r.removing["k3"][place], 0.1)),
    "cppo-detached-views": cppo,
    "cppo-detached-anchor": cppo,
    "cppo-kl": partial(cppo, divergence="kl"),
    "cppo-js": partial(cppo, divergence="js"),
    "cppo-score-absolute": partial(cppo, score="entropy_shift_absolute"),
    "cppo-score-entropy": partial(cppo, score="entropy"),
    "cppo-score-k3": partial(cppo, score="k3"),
    "cppo-score-kl": partial(cppo, score="kl"),
    "cppo-score-js": partial(cppo, score="js"),
    "cppo-score-logp": partial(cppo, score="logp_shift"),
    "cppo-static": cppo,
    "cppo-static-js": partial(cppo, score="js"),
    "cppo-likelihood": likelihood(score="js"),
    "cppo-likelihood-all-tokens": likelihood(places=all_tokens),
}
"""What each method adds to the RL loss."""


def rl_loss(rollouts):
    """The token-level policy loss at ratio 1."""
    return -math.fsum(r.advantage * r.tokens for r in rollouts) / sum(r.tokens for r in rollouts)


def vppo_loss(rollouts):
    """VPPO's whole loss: top 40 % of tokens, weighted advantages, all tokens in the denominator, entropy penalty."""
    dependency = {i: mean(r.removing["k3"]) for i, r in enumerate(rollouts) if r.has_images}
    low, high = min(dependency.values()), max(dependency.values())
    scaled = {i: (value - low) / (high - low) for i, value in dependency.items()}
    ceiling = 0.9 + 0.1 / mean(scaled.values())
    total = 0.0
    for i, r in enumerate(rollouts):
        if not r.has_images:
            total += r.advantage * r.tokens
            continue
        kept = best(r.removing["k3"], max(1, math.floor(0.4 * r.tokens)))
        total += r.advantage * (0.9 + (ceiling - 0.9) * scaled[i]) * len(kept)
    tokens = sum(r.tokens for r in rollouts)
    return -total / tokens + 0.06 * math.fsum(h for r in rollouts for h in r.entropies[0]) / tokens


def pgpo_weights(rollouts):
    """The weight of every token of every rollout, as lists."""
    found = []
    for r in rollouts:
        if not r.has_images:
            found.append([1.0] * r.tokens)
            continue
        low, high = min(r.removing["k3"]), max(r.removing["k3"])
        scaled = [(value - low) / (high - low) for value in r.removing["k3"]]
        weights = [u / 0.4 if u < 0.4 else 1 + 2 * (u - 0.4) / 0.6 for u in scaled]
        found.append([weight / mean(weights) for weight in weights])
    return found
