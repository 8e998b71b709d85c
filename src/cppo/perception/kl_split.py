"""A KL penalty to another policy, weighted by each token's covariance (SENT, arXiv 2512.04359)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cppo.perception.detection import k3_divergence, named, needs, under
from cppo.perception.loss import TERMS
from cppo.perception.responses import ViewScores


class SplitOptions(Protocol):
    """The options of the sink `covariance_kl`; see `CPPOConfig`."""

    @property
    def perception_kl_target(self) -> str: ...
    @property
    def perception_kl_weights(self) -> Sequence[float]: ...
    @property
    def perception_covariance_fraction(self) -> float: ...
    @property
    def perception_covariance_threshold(self) -> float | None: ...


@torch.no_grad()
def covariance(logps: Tensor, advantages: Tensor, token_mask: Tensor) -> Tensor:
    """`(log p - mean log p) (A - mean A)` of each token, [n, T]; means over the selected tokens; 0 elsewhere.

    logps, advantages, token_mask: [n, T].
    """
    count = token_mask.sum().clamp(min=1)
    centred = [values - values.masked_fill(~token_mask, 0.0).sum() / count for values in (logps, advantages)]
    return (centred[0] * centred[1]).masked_fill(~token_mask, 0.0)


@torch.no_grad()
def split_weights(
    covariances: Tensor,
    token_mask: Tensor,
    weights: Sequence[float] = (2.0, 0.5),
    fraction: float = 0.0002,
    threshold: float | None = None,
) -> Tensor:
    """Weights of the selected tokens by their covariance, [n, T]; 0 elsewhere.

    Without a threshold (SENT's code), `max(1, floor(fraction N))` of N tokens, those of largest covariance, have the
    first weight. As many of smallest covariance have the second, which wins where both apply; all others have 0. With a
    threshold (SENT's paper), tokens above it have the first weight and all others the second.
    """
    high, low = weights
    if threshold is not None:
        return torch.where(covariances > threshold, high, low) * token_mask
    found = torch.zeros_like(covariances)
    values = covariances[token_mask]
    count = min(max(1, int(fraction * len(values))), len(values))
    chosen = torch.zeros_like(values)
    chosen[values.topk(count).indices] = high
    chosen[values.topk(count, largest=False).indices] = low
    return found.masked_scatter(token_mask, chosen)


@named(TERMS, "covariance_kl")
@under()
@needs("advantages", "old_logps", "reference_logps", "response_mean")
def covariance_kl(scores: ViewScores, options: SplitOptions) -> Tensor:
    """`split_weights` times the divergence from the old policy or the reference, [n, T], nats (SENT).

    To the policy that made the rollouts: |log p - log p_old|, as in SENT's code. Its gradient at 0 is 0, so it acts
    only where rollouts serve several steps. To the reference: k3, as in SENT's paper.
    """
    assert scores.token_mask is not None
    assert scores.advantages is not None
    logps, advantages = scores.anchor.logps, scores.advantages
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(logps)
    weights = split_weights(
        covariance(logps.detach(), advantages.to(logps), scores.token_mask),
        scores.token_mask,
        options.perception_kl_weights,
        options.perception_covariance_fraction,
        options.perception_covariance_threshold,
    )
    if options.perception_kl_target == "reference":
        assert scores.reference_logps is not None
        return weights * k3_divergence(logps, scores.reference_logps)
    old = logps.detach() if scores.old_logps is None else scores.old_logps
    return weights * (logps - old).abs()
