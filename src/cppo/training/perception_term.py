"""From the scores under three views to the perception term of the loss and its metrics."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cppo.perception import (
    contrastive_perception_loss,
    contrastive_perception_tokens,
    entropy_shift,
    js_divergence,
    k3_divergence,
    kl_divergence,
    logp_shift,
    rollout_mean_loss,
    select_perception_tokens,
)
from cppo.policy import ResponseScores

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
the response tokens of the rollouts scored under the views."""


@dataclass(frozen=True)
class ExactDivergences:
    """Divergences over the vocabulary where they were taken along with the scores, [n, T] each, else None.

    Attributes:
        score: of anchor and I-, where that is the dependency score; needed at all response tokens.
        preserving, removing: of the anchor and each view; needed at the selected tokens.
    """

    score: Tensor | None = None
    preserving: Tensor | None = None
    removing: Tensor | None = None


@dataclass(frozen=True)
class ViewScores:
    """Scores of the n gated-in rollouts of a micro-batch under the image, I+ and I-, and their response mask [n, T].

    The scores under I+ are needed at the selected tokens alone and may be anything elsewhere.
    """

    anchor: ResponseScores
    preserving: ResponseScores
    removing: ResponseScores
    response_mask: Tensor
    exact: ExactDivergences = ExactDivergences()


@dataclass(frozen=True)
class PerceptionTerm:
    """The perception term of one micro-batch, before its weight.

    Attributes:
        loss: scalar with a graph.
        score: dependency score, [n, T].
        token_mask: the selected tokens, bool [n, T].
        statistics: [len(METRICS), 2], numerator and denominator of each metric, to be summed over ranks.
    """

    loss: Tensor
    score: Tensor
    token_mask: Tensor
    statistics: Tensor


def dependency_score(args: "CPPOConfig", anchor: ResponseScores, removing: ResponseScores) -> Tensor:
    """How much each response token depends on the image, [n, T], without gradient (method.md, section 3)."""
    if args.perception_score in ("entropy_shift", "entropy_shift_absolute"):
        relative = args.perception_score == "entropy_shift"
        return entropy_shift(anchor.entropies, removing.entropies, relative=relative)
    if args.perception_score == "logp_shift":
        return logp_shift(anchor.logps, removing.logps)
    with torch.no_grad():
        return _divergence(args.perception_score, anchor, removing)


def perception_token_mask(
    args: "CPPOConfig",
    anchor: ResponseScores,
    removing: ResponseScores,
    response_mask: Tensor,
    exact_score: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dependency score (taken here unless it is given) and selected tokens of gated-in rollouts, each [n, T]."""
    score = dependency_score(args, anchor, removing) if exact_score is None else exact_score
    return score, select_perception_tokens(score, response_mask, args.perception_top_fraction)


def perception_term(
    args: "CPPOConfig", scores: ViewScores, normalizer: Tensor | float, weights: Tensor | None = None
) -> PerceptionTerm:
    """The contrastive perception loss of a micro-batch (arXiv 2601.00501; method.md, section 4).

    Args:
        args: the options `perception_*`.
        scores: of the gated-in rollouts.
        normalizer: what the micro-batch's sum is divided by: gated-in rollouts of the step (`rollout`), selected tokens
            of the step (`token`), or a plain factor on the micro-batch's own mean (`microbatch`).
        weights: of the gated-in rollouts, [n], where only some were drawn (`rollout` alone).
    """
    exact, name = scores.exact, args.perception_divergence
    score, token_mask = perception_token_mask(args, scores.anchor, scores.removing, scores.response_mask, exact.score)
    d_preserving = (
        exact.preserving if exact.preserving is not None else _divergence(name, scores.anchor, scores.preserving)
    )
    d_removing = exact.removing if exact.removing is not None else _divergence(name, scores.anchor, scores.removing)
    temperature = args.perception_temperature
    token_loss = contrastive_perception_tokens(d_preserving, d_removing, temperature, token_mask)
    if args.perception_normalization == "rollout":
        loss = rollout_mean_loss(token_loss, token_mask, normalizer, weights)
    elif args.perception_normalization == "token":
        loss = contrastive_perception_loss(d_preserving, d_removing, token_mask, temperature, normalizer)
    else:
        loss = contrastive_perception_loss(d_preserving, d_removing, token_mask, temperature) / normalizer
    statistics = _statistics(scores, token_loss, d_preserving, d_removing, token_mask)
    return PerceptionTerm(loss, score, token_mask, statistics)


def _divergence(name: str, anchor: ResponseScores, view: ResponseScores) -> Tensor:
    if name == "k3":
        return k3_divergence(anchor.logps, view.logps)
    if anchor.logits is None or view.logits is None:
        raise ValueError(f"the exact divergence {name!r} needs logits: score with the plain scorer")
    exact = kl_divergence if name == "kl" else js_divergence
    return exact(anchor.logits, view.logits)


@torch.no_grad()
def _statistics(
    scores: ViewScores, token_loss: Tensor, d_preserving: Tensor, d_removing: Tensor, token_mask: Tensor
) -> Tensor:
    selected = token_mask.sum()
    tokens = scores.response_mask.bool().sum()

    def total(values: Tensor, mask: Tensor) -> Tensor:
        return values.float().masked_fill(~mask, 0.0).sum()

    views = (scores.anchor, scores.preserving, scores.removing)
    pairs = [(total(values, token_mask), selected) for values in (token_loss, d_preserving, d_removing)]
    pairs.append((selected, tokens))
    pairs += [(total(view.entropies, token_mask), selected) for view in views]
    return torch.stack([torch.stack([a.float(), b.float()]) for a, b in pairs])
