"""Selectors of methods other than CPPO, in the registry `SELECTORS`, and selection over a whole batch of rollouts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cppo.perception.detection import (
    SELECTORS,
    DetectionOptions,
    best_tokens,
    kept_count,
    named,
    needs,
    response_tokens,
    select,
    select_perception_tokens,
)
from cppo.perception.responses import ResponseScores, ViewScores


def select_top_tokens(score: Tensor, response_mask: Tensor, top_fraction: float, rounding: str = "floor") -> Tensor:
    """The best-scored `top_fraction` of each rollout's response tokens, whatever their sign.

    Otherwise as `select_perception_tokens`, which counts only tokens with a positive score. Source: VPPO (arXiv
    2510.09285), with top_fraction 0.4 and rounding "ceil".
    """
    candidate_BT = response_tokens(score, response_mask, top_fraction)
    return best_tokens(score, candidate_BT, kept_count(candidate_BT, top_fraction, rounding))


def select_random_tokens(like: Tensor, response_mask: Tensor, draws: Tensor) -> Tensor:
    """As many random response tokens of each rollout as `like` selects: those with the largest `draws`.

    like: bool [B, T]. response_mask: [B, T]. draws: independent uniform numbers, [B, T]. Returns bool [B, T]. Raises
    ValueError on unequal shapes.
    """
    candidate_BT = response_tokens(draws, response_mask)
    if like.shape != draws.shape:
        raise ValueError(f"like must have the shape of draws, {tuple(draws.shape)}, but has {tuple(like.shape)}")
    return best_tokens(draws, candidate_BT, like.sum(dim=1, keepdim=True))


def select_band(score: Tensor, response_mask: Tensor, low: float, high: float) -> Tensor:
    """Each rollout's response tokens between two quantiles of its scores: of n tokens, ranks `low n <= r < high n`.

    Rank 0 is the lowest score; ties go to the earlier position. score, response_mask: [B, T]. low, high: fractions, 0
    <= low <= high <= 1. Returns bool [B, T]. Raises ValueError on other fractions.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"a band of quantiles needs 0 <= low <= high <= 1, but is {low} to {high}")
    candidate_BT = response_tokens(score, response_mask)
    count_B1 = candidate_BT.sum(dim=1, keepdim=True)
    ends = [(fraction * count_B1 - 1e-4).ceil() for fraction in (low, high)]
    below, within = (best_tokens(-score, candidate_BT, end) for end in ends)
    return within & ~below


@named(SELECTORS, "top")
def top(score: Tensor, mask: Tensor, fraction: float, *, rounding: str, draws: Tensor | None) -> Tensor:
    """The best-scored fraction of all tokens."""
    return select_top_tokens(score, mask, fraction, rounding)


@named(SELECTORS, "bottom")
def bottom(score: Tensor, mask: Tensor, fraction: float, *, rounding: str, draws: Tensor | None) -> Tensor:
    """The worst-scored fraction of all tokens."""
    return select_top_tokens(-score, mask, fraction, rounding)


@named(SELECTORS, "random")
@needs("draws")
def random(score: Tensor, mask: Tensor, fraction: float, *, rounding: str, draws: Tensor) -> Tensor:
    """As many tokens as "top_positive" keeps, those with the largest draws."""
    like = select_perception_tokens(score, mask, fraction, rounding=rounding)
    return select_random_tokens(like, mask, draws)


@named(SELECTORS, "band")
@needs("options")
def band(score: Tensor, mask: Tensor, fraction: float, *, rounding: str, draws: Tensor | None, options: Any) -> Tensor:
    """The tokens between the two score quantiles of `perception_band`."""
    return select_band(score, mask, *options.perception_band)


@named(SELECTORS, "band_values")
@needs("options")
def band_values(
    score: Tensor, mask: Tensor, fraction: float, *, rounding: str, draws: Tensor | None, options: Any
) -> Tensor:
    """The tokens with a score between the two values of `perception_band`, both included."""
    low, high = options.perception_band
    return mask & (score >= low) & (score <= high)


@named(SELECTORS, "two_sets")
@needs("nucleus_entropies", "options")
def two_sets(
    score: Tensor,
    mask: Tensor,
    fraction: float,
    *,
    rounding: str,
    draws: Tensor | None,
    nucleus_entropies: Tensor,
    options: Any,
) -> Tensor:
    """Weights of two sets of tokens (ToR, arXiv 2603.25077), [B, T]; 0 outside both.

    `perception_set_weights` holds both weights. The first set is the `perception_entropy_fraction` of highest entropy;
    the second is the best-scored fraction, without tokens of the first.
    """
    reasoning = select_top_tokens(nucleus_entropies, mask, options.perception_entropy_fraction, rounding)
    perceiving = select_top_tokens(score, mask, fraction, rounding)
    first, second = options.perception_set_weights
    return (first * reasoning + second * (perceiving & ~reasoning)).to(score.dtype)


@torch.no_grad()
def select_together(
    found: Sequence[ViewScores], options: DetectionOptions, gather: Callable[[Tensor], list[Tensor]], rank: int
) -> list[ViewScores]:
    """The scores with the tokens that the selector keeps among the tokens of all rollouts and processes.

    Ties go to the lower rank, then to the earlier rollout and position.

    Args:
        found: scored rollouts of this process, T tokens each.
        gather: this process's tensor, [4, N] -> all processes' tensors, [4, N'] each, by rank.
        rank: of this process.
    """
    masks = [scores.response_mask.bool() for scores in found]
    rows = [_selector_inputs(scores)[:, mask] for scores, mask in zip(found, masks, strict=True)]
    parts = gather(torch.cat(rows, dim=1) if rows else torch.empty(4, 0))
    score, entropies, draws, nucleus = torch.cat(parts, dim=1)[:, None]
    anchor = ResponseScores(score, entropies, exact={"nucleus_entropy": nucleus})
    everywhere = torch.ones_like(score, dtype=torch.bool)
    chosen = select(ViewScores(anchor, None, None, everywhere, draws, score), options)
    assert chosen.token_mask is not None
    first = sum(part.shape[1] for part in parts[:rank])
    selected = []
    for scores, mask in zip(found, masks, strict=True):
        own = slice(first, first + int(mask.sum()))
        first = own.stop
        weights = chosen.token_weights
        if weights is not None:
            assert scores.score is not None
            weights = torch.zeros_like(scores.score).masked_scatter(mask, weights[0, own].to(scores.score))
        token_mask = torch.zeros_like(mask).masked_scatter(mask, chosen.token_mask[0, own])
        selected.append(replace(scores, token_mask=token_mask, token_weights=weights))
    return selected


def _selector_inputs(scores: ViewScores) -> Tensor:
    """A selector's inputs per token, [4, n, T]: score, entropies, draws and nucleus entropies."""
    assert scores.score is not None
    nothing = torch.zeros_like(scores.score)
    nucleus = scores.anchor.exact.get("nucleus_entropy", nothing)
    draws = nothing if scores.draws is None else scores.draws.to(nothing)
    return torch.stack([scores.score, scores.anchor.entropies.to(nothing), draws, nucleus.to(nothing)])
