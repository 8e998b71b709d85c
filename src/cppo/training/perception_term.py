"""From the scores under three views to the perception term of the loss and its metrics."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cppo.perception import (
    contrastive_perception_tokens,
    rollout_mean_loss,
    select_tokens,
    token_mean_loss,
)
from cppo.policy import ResponseScores, dependency_score, view_divergence

if TYPE_CHECKING:
    from cppo.training.config import CPPOConfig

METRICS = (
    "cpl",
    "d_preserving",
    "d_removing",
    "selected_fraction",
    "entropy",
    "entropy_preserving",
    "entropy_removing",
)
"""Logged under `perception/`: plain means over the selected tokens (nats), but `selected_fraction` is their share among
the response tokens of the rollouts scored under the views. `cpl` is the sink's value a token, weight apart."""


@dataclass(frozen=True)
class ViewScores:
    """Scores of the n gated-in rollouts of a micro-batch under the image, I+ and I-.

    Attributes:
        anchor, removing, preserving: under the image, I- and I+; None for a view that the method does not look at.
            Those under I+ are needed at the selected tokens alone and may be anything elsewhere, unless their entropy
            has a weight.
        response_mask: theirs, [n, T].
        draws: uniform random numbers [n, T], for a random selection.
        score: the divergence over the vocabulary of anchor and I-, [n, T], where that is the dependency score and was
            taken along with the scores; needed at all response tokens.
        d_preserving, d_removing: those of the anchor and each view, [n, T], where they were taken along; needed at the
            selected tokens.
    """

    anchor: ResponseScores
    removing: ResponseScores | None
    preserving: ResponseScores | None
    response_mask: Tensor
    draws: Tensor | None = None
    score: Tensor | None = None
    d_preserving: Tensor | None = None
    d_removing: Tensor | None = None


class Detection(NamedTuple):
    """Dependency scores and the selected tokens (bool) of gated-in rollouts, [n, T] each; without gradient."""

    score: Tensor
    token_mask: Tensor


@dataclass(frozen=True)
class PerceptionTerm:
    """The perception term of one micro-batch.

    Attributes:
        loss: scalar with a graph, its weights applied.
        detection: which tokens it acts on, and by what score.
        statistics: [len(METRICS), 2], numerator and denominator of each metric, to be summed over ranks.
    """

    loss: Tensor
    detection: Detection
    statistics: Tensor


def perception_token_mask(args: "CPPOConfig", scores: ViewScores) -> Detection:
    """The dependency score, taken here unless it is given, and the tokens that the selector keeps.

    Without scores under I- the dependency score is NaN.
    """
    if scores.score is not None:
        score = scores.score
    elif scores.removing is not None:
        score = dependency_score(args.perception_score, scores.anchor, scores.removing)
    else:
        score = torch.full_like(scores.anchor.logps, torch.nan)
    token_mask = select_tokens(
        args.perception_selector,
        score,
        scores.response_mask,
        args.perception_top_fraction,
        scores.draws,
        args.perception_top_rounding,
    )
    return Detection(score, token_mask)


def loss_entropies(args: "CPPOConfig", scores: ResponseScores) -> Tensor:
    """The entropies that a loss penalizes or rewards, [B, T], nats: exact ones or -log pi of the sampled tokens."""
    return -scores.logps if args.entropy_estimator == "sampled" else scores.entropies


def perception_term(
    args: "CPPOConfig", scores: ViewScores, normalizer: Tensor | float, weights: Tensor | None = None
) -> PerceptionTerm:
    """The perception loss of a micro-batch: contrast (CPPO, arXiv 2601.00501; method.md, section 4) or divergences.

    Args:
        args: the options `perception_*`.
        scores: of the gated-in rollouts.
        normalizer: what the micro-batch's sum is divided by: gated-in rollouts of the step (`rollout`), selected tokens
            of the step (`token`), or a plain factor on the micro-batch's own mean (`microbatch`).
        weights: of the gated-in rollouts, [n], where only some were drawn or they count by their advantage (`rollout`
            alone).
    """
    detection = perception_token_mask(args, scores)
    token_mask = detection.token_mask
    anchor = scores.anchor if args.perception_anchor_gradients else scores.anchor.detached()

    def divergence(view: ResponseScores | None, given: Tensor | None) -> Tensor | None:
        return given if given is not None or view is None else view_divergence(args.perception_divergence, anchor, view)

    d_preserving = divergence(scores.preserving, scores.d_preserving)
    d_removing = divergence(scores.removing, scores.d_removing)
    nothing = torch.zeros_like(scores.anchor.logps)
    pull = nothing if d_preserving is None else args.perception_preserving_weight * d_preserving
    push = nothing if d_removing is None else args.perception_removing_weight * d_removing
    if args.perception_sink == "contrast":
        token_loss = contrastive_perception_tokens(pull, push, args.perception_temperature, token_mask)
    else:
        token_loss = pull - push

    def mean(values: Tensor, over: Tensor) -> Tensor:
        if args.perception_normalization == "rollout":
            return rollout_mean_loss(values, over, normalizer, weights)
        if args.perception_normalization == "token":
            return token_mean_loss(values, over, normalizer)
        return token_mean_loss(values, over) / normalizer

    loss = args.perception_weight * mean(token_loss, token_mask)
    for view, weight in (
        (scores.preserving, args.perception_preserving_entropy_weight),
        (scores.removing, args.perception_removing_entropy_weight),
    ):
        if view is not None and weight:
            loss = loss + weight * mean(loss_entropies(args, view), scores.response_mask)
    statistics = _statistics(scores, token_loss, d_preserving, d_removing, token_mask)
    return PerceptionTerm(loss, detection, statistics)


@torch.no_grad()
def _statistics(
    scores: ViewScores, token_loss: Tensor, d_preserving: Tensor | None, d_removing: Tensor | None, token_mask: Tensor
) -> Tensor:
    selected = token_mask.sum()

    def total(values: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum over the selected tokens and their number; of nothing, 0 and 0."""
        if values is None:
            return selected.new_zeros(()), selected.new_zeros(())
        return values.float().masked_fill(~token_mask, 0.0).sum(), selected

    pairs = [total(values) for values in (token_loss, d_preserving, d_removing)]
    pairs.append((selected, scores.response_mask.bool().sum()))
    pairs += [
        total(None if view is None else view.entropies) for view in (scores.anchor, scores.preserving, scores.removing)
    ]
    return torch.stack([torch.stack([a.float(), b.float()]) for a, b in pairs])
