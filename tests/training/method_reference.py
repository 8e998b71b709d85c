"""Every method's loss in float64, from its formula: one rollout and view at a time, lists and loops."""

import math
from functools import partial

from float64_reference import JITTER, TEMPERATURE, chosen_tokens, contrast, reference_term
from rollout_stubs import build_trainer, inject, parity_reward, token_reward

from cppo.views import ViewStrengths

CFPO_WEIGHT = 2.0
"""A hundred times the published one: the replaced values change little in an untrained model."""
RUN_DONE = 1 / 4
"""The share of the run after these tests' batch."""
MASK = (JITTER[0], ("black_patches",), ViewStrengths(patch_side=14, patch_probability=0.6))
HALF_MASK = (JITTER[0], ("black_patches",), ViewStrengths(patch_side=14, patch_probability=0.5))
NOISE_STEPS = math.floor(500 * (1 - 1 / (1 + math.exp(-10 * (RUN_DONE - 0.5)))))
"""DVRP's 500 steps, faded."""
NOISE_AND_MASK = (("diffusion_noise",), ("black_patches",), ViewStrengths(diffusion_steps=NOISE_STEPS))
BLUR = ((*JITTER[0], "gaussian_blur"), *JITTER[1:])
STATIC = (JITTER[0], ("static",), ViewStrengths())
VIEWS_OF = {"vppo": HALF_MASK, "dvrp": NOISE_AND_MASK, "cppo-async": BLUR}
VIEWS_OF |= dict.fromkeys(("papo", "papo-3b", "papo-dapo"), MASK)
VIEWS_OF |= {"pgpo": (JITTER[0], "attention_masked"), "cfpo": (JITTER[0], "values_replaced")}
VIEWS_OF |= dict.fromkeys(("cppo-static", "cppo-static-js", "cppo-likelihood", "cppo-likelihood-all-tokens"), STATIC)


def float64_trainer(model, folder, rows, **given):
    """The trainer to compare: in float64, with two rewards, a run of 1 / RUN_DONE steps, drawn rollouts."""
    rewards = [token_reward, parity_reward]
    trainer = build_trainer(model, folder, rows, reward_funcs=rewards, temperature=TEMPERATURE, **given)
    trainer.model.double()
    trainer.state.max_steps = round(1 / RUN_DONE)
    return inject(trainer, same_each_time=True)


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def cppo(rollouts, weight=0.01, **options):
    """Mean over a rollout's chosen tokens, then over gated-in rollouts; an empty choice adds 0."""
    return weight * reference_term(rollouts, tau=0.1, fraction=0.5, **options)


def all_tokens(r):
    return range(r.tokens)


def papo(rollouts, gamma=0.02, eta=0.05):
    """-gamma k3 + eta (H_mask + H), H = -log pi of the sampled token; each a mean over all tokens."""
    masked = [pair for r in rollouts if r.has_images for pair in zip(r.removing["k3"], r.removing["nll"], strict=True)]
    return mean(-gamma * d + eta * h for d, h in masked) + eta * mean(h for r in rollouts for h in r.surprisals)


def dvrp(rollouts):
    def loss(r):
        tokens = zip(r.preserving["kl"], r.removing["kl"], r.entropies[1], r.entropies[2], strict=True)
        return mean(0.01 * plus - 0.01 * minus + 0.05 * (noised + masked) for plus, minus, noised, masked in tokens)

    return mean(loss(r) for r in rollouts if r.has_images)


def likelihood(**choice):
    """-0.3 A log pi(token | I+), mean over a rollout's chosen tokens, then over the rollouts with A > 0."""
    return partial(cppo, weight=0.3, loss=lambda r, place: r.advantage * r.preserving["nll"][place], **choice)


TERMS = {
    "grpo": lambda rollouts: 0.0,
    "dapo": lambda rollouts: 0.0,
    "cppo": cppo,
    "cppo-async": partial(
        cppo, divergence="k1", places=lambda r: chosen_tokens(r.scores["entropy_shift"], 0.5, math.ceil)
    ),
    "papo": papo,
    "papo-3b": partial(papo, eta=0.0),
    "cfpo": partial(papo, gamma=CFPO_WEIGHT, eta=0.0),
    "papo-dapo": partial(papo, gamma=0.01, eta=0.03),
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
"""The term that each method adds to the RL loss."""


def rl_loss(rollouts):
    """The token-level policy loss at ratio 1."""
    return -math.fsum(r.advantage * r.tokens for r in rollouts) / sum(r.tokens for r in rollouts)


def vppo_loss(rollouts, parts=1, together=False):
    """VPPO's full loss in this many micro-batches: the top 40 % of tokens, weighted advantages, all tokens in the
    denominator, and an entropy penalty, which TRL averages over the tokens of a micro-batch.

    Weights have mean 1 in each micro-batch, or in all `together`.
    """
    dependency = {id(r): mean(r.removing["k3"]) for r in rollouts if r.has_images}
    low, high = min(dependency.values()), max(dependency.values())
    scaled = {i: (value - low) / (high - low) for i, value in dependency.items()}
    size = len(rollouts) // parts
    micro_batches = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
    total = penalty = 0.0
    for micro_batch in micro_batches:
        weighted = [scaled[id(r)] for r in (rollouts if together else micro_batch) if r.has_images]
        for r in micro_batch:
            kept = r.tokens
            if r.has_images:
                share = (scaled[id(r)] / mean(weighted)) if any(weighted) else 0.0
                kept = math.ceil(0.4 * r.tokens) * (0.9 + 0.1 * share)
            total += r.advantage * kept
        penalty += 0.06 * mean(h for r in micro_batch for h in r.surprisals) / parts
    return -total / sum(r.tokens for r in rollouts) + penalty


def pgpo_weights(rollouts):
    """The weight of every token of every rollout, as lists."""
    found = []
    for r in rollouts:
        if not r.has_images:
            found.append([1.0] * r.tokens)
            continue
        logs = [math.log(1 + value) for value in r.removing["k3"]]
        scaled = [(value - min(logs)) / (max(logs) - min(logs)) for value in logs]
        weights = [u / 0.4 if u < 0.4 else 1 + 2 * (u - 0.4) / 0.6 for u in scaled]
        found.append([weight / mean(weights) for weight in weights])
    return found
