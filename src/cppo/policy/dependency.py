"""The policy under an image held against itself under a view: divergences and dependency scores, by name."""

import torch
from torch import Tensor

from cppo.perception import EXACT_DIVERGENCES, entropy_shift, k1_divergence, k3_divergence, logp_shift
from cppo.policy.scorer import ResponseScores

SAMPLED_DIVERGENCES = {"k1": k1_divergence, "k3": k3_divergence}
"""Estimates from the log-probabilities of the sampled tokens, by name."""
DIVERGENCES = ("k3", *EXACT_DIVERGENCES)
"""Those that are never negative, up to rounding: what inspection shows."""
DEPENDENCY_SCORES = ("entropy_shift", "entropy_shift_absolute", "kl", "js", "logp_shift", "k3", "entropy")


def view_divergence(name: str, anchor: ResponseScores, view: ResponseScores) -> Tensor:
    """The divergence from the policy under the image to that under a view, [B, T], nats.

    One of `SAMPLED_DIVERGENCES` or `EXACT_DIVERGENCES`, or `nll`, which takes what was sampled in the policy's place:
    KL(sampled token || view) = -log pi(token | view), without gradient through the anchor.

    Raises:
        ValueError: an exact one needs logits, and the scores have none.
    """
    if name == "nll":
        return -view.logps
    if name in SAMPLED_DIVERGENCES:
        return SAMPLED_DIVERGENCES[name](anchor.logps, view.logps)
    if anchor.logits is None or view.logits is None:
        raise ValueError(f"the exact divergence {name!r} needs logits: score with the plain scorer")
    return EXACT_DIVERGENCES[name](anchor.logits, view.logits)


@torch.no_grad()
def dependency_score(name: str, anchor: ResponseScores, removing: ResponseScores) -> Tensor:
    """How much each response token depends on the image by the score of `DEPENDENCY_SCORES`, [B, T], without gradient.

    `entropy`, that under the image alone, is the control for all others.
    """
    match name:
        case "entropy_shift" | "entropy_shift_absolute":
            return entropy_shift(anchor.entropies, removing.entropies, relative=name == "entropy_shift")
        case "entropy":
            return anchor.entropies.detach()
        case "logp_shift":
            return logp_shift(anchor.logps, removing.logps)
        case _:
            return view_divergence(name, anchor, removing)
