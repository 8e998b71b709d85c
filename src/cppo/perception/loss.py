"""The perception loss: a contrast (CPPO, arXiv 2601.00501) or a difference of divergences on the perception tokens.

The contrast `softplus((d+ - d-) / tau)` is InfoNCE with one positive, one negative and the similarity -D:
`-log( exp(-d+/tau) / (exp(-d+/tau) + exp(-d-/tau)) )`. It is ln 2 where both divergences are equal.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.perception.detection import (
    SCORES,
    SELECTORS,
    DetectionOptions,
    k3_divergence,
    needs_of,
    to_accumulation_dtype,
    views_of,
)
from cppo.perception.distributions import EXACT_DIVERGENCES
from cppo.perception.responses import ResponseScores, ViewScores
from cppo.perception.shaping import SHAPINGS

K1_LIMIT = 10.0
METRICS = (
    "cpl",
    "d_preserving",
    "d_removing",
    "selected_fraction",
    "entropy",
    "entropy_preserving",
    "entropy_removing",
)
"""The metrics of `perception_loss`: means over the selected tokens (nats). `selected_fraction` is the share of selected
tokens among the response tokens of the rollouts scored under the views. `cpl` is the sink's mean value per token,
without its weight.
"""
Metrics = dict[str, tuple[Tensor, Tensor]]
"""Sum and count of each metric by name; both add up over micro-batches and ranks."""


class LossOptions(DetectionOptions, Protocol):
    """The options that the perception loss reads; see `CPPOConfig`."""

    @property
    def perception_sink(self) -> str: ...
    @property
    def perception_divergence(self) -> str: ...
    @property
    def perception_weight(self) -> float: ...
    @property
    def perception_preserving_weight(self) -> float: ...
    @property
    def perception_removing_weight(self) -> float: ...
    @property
    def perception_preserving_entropy_weight(self) -> float: ...
    @property
    def perception_removing_entropy_weight(self) -> float: ...
    @property
    def perception_temperature(self) -> float: ...
    @property
    def perception_normalization(self) -> str: ...
    @property
    def perception_anchor_gradients(self) -> bool: ...
    @property
    def entropy_estimator(self) -> str: ...


def k1_divergence(logps: Tensor, view_logps: Tensor) -> Tensor:
    """The k1 estimate on the sampled token: `logp - view_logp`, clamped to [-10, 10].

    Its mean over tokens sampled from the anchor is KL(anchor || view); a single value may be negative. In a difference
    of two views, `k1(p, I+) - k1(p, I-)`, the anchor cancels in value and gradient, unless a clamp acts.

    logps, view_logps: [B, T] (any one shape), nats. Returns the same shape. Two equal log-probabilities give exactly 0,
    also two of -inf (a banned token). Raises ValueError on unequal shapes.
    """
    logps, view_logps = to_accumulation_dtype(logps=logps, view_logps=view_logps)
    banned = logps.isneginf() & view_logps.isneginf()  # -inf - (-inf) is NaN
    return (logps - view_logps).masked_fill(banned, 0.0).clamp(-K1_LIMIT, K1_LIMIT)


SAMPLED_DIVERGENCES = {"k1": k1_divergence, "k3": k3_divergence}
"""Estimates from the log-probabilities of the sampled tokens, by name."""
DIVERGENCES = ("k3", *EXACT_DIVERGENCES)
"""Divergences that are never negative, up to rounding; inspection shows these."""


def view_divergence(name: str, anchor: ResponseScores, view: ResponseScores) -> Tensor:
    """The divergence from the policy under the image to the policy under a view, [B, T], nats.

    `name` is one of `SAMPLED_DIVERGENCES` or `EXACT_DIVERGENCES`, or `nll`: KL(sampled token || view) = -log pi(token |
    view), without gradient through the anchor.

    Raises:
        ValueError: an exact divergence needs logits, and the scores have none.
    """
    if name == "nll":
        return -view.logps
    if name in SAMPLED_DIVERGENCES:
        return SAMPLED_DIVERGENCES[name](anchor.logps, view.logps)
    if anchor.logits is None or view.logits is None:
        raise ValueError(f"the exact divergence {name!r} needs logits: score with the plain scorer")
    return EXACT_DIVERGENCES[name](anchor.logits, view.logits)


def contrastive_perception_tokens(
    d_preserving: Tensor,
    d_removing: Tensor,
    temperature: float = 0.1,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The loss of every token before the mean: `softplus((d_preserving - d_removing) / tau)`.

    d_preserving, d_removing: [B, T], divergence of the anchor from I+ and from I-, nats. token_mask: [B, T], bool or
    0/1. Outside the mask, value and gradient are exactly 0, even where a divergence is NaN. Returns [B, T], float32
    (float64 kept), in nats. Raises ValueError on unequal shapes or a temperature that is not positive and finite.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, but is {temperature}")
    d_preserving, d_removing = to_accumulation_dtype(d_preserving=d_preserving, d_removing=d_removing)
    margin = d_preserving - d_removing
    if token_mask is None:
        return -F.logsigmoid(-margin / temperature)
    outside = ~_as_selection(token_mask, margin)
    # Filled before and after: a zero gradient times a NaN derivative would be NaN.
    margin = margin.masked_fill(outside, 0.0)
    return (-F.logsigmoid(-margin / temperature)).masked_fill(outside, 0.0)


def contrastive_perception_loss(
    d_preserving: Tensor,
    d_removing: Tensor,
    token_mask: Tensor,
    temperature: float = 0.1,
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    """Sum of `softplus((d_preserving - d_removing) / tau)` over the selected tokens, divided by `num_tokens`.

    d_preserving, d_removing: [B, T], nats. token_mask: [B, T], the selected tokens. num_tokens: the divisor, e.g. the
    selected tokens of the whole step over all ranks; default: the number selected here. Returns a scalar, float32
    (float64 kept); without selected tokens, a zero with a graph, for any num_tokens. Raises ValueError on unequal
    shapes, a temperature that is not positive and finite, or a negative num_tokens.
    """
    tokens = contrastive_perception_tokens(d_preserving, d_removing, temperature, token_mask)
    return token_mean_loss(tokens, token_mask, num_tokens)


def token_mean_loss(token_loss: Tensor, token_mask: Tensor, num_tokens: Tensor | float | None = None) -> Tensor:
    """Sum of `token_loss` over the selected tokens, divided by `num_tokens` (default: the number selected here).

    token_loss, token_mask: [B, T]; values outside the mask have no effect, even NaN. Returns a scalar, float32 (float64
    kept); without selected tokens, a zero with a graph. Raises ValueError on unequal shapes or a negative num_tokens.
    """
    (token_loss,) = to_accumulation_dtype(token_loss=token_loss)
    selected_BT = _as_selection(token_mask, token_loss)
    if num_tokens is None:
        num_tokens = selected_BT.sum()
    return token_loss.masked_fill(~selected_BT, 0.0).sum() / _divisor("num_tokens", num_tokens, token_loss)


def rollout_mean_loss(
    token_loss: Tensor, token_mask: Tensor, num_rollouts: Tensor | float, weights: Tensor | None = None
) -> Tensor:
    """Mean over each rollout's selected tokens, summed over the rollouts and divided by `num_rollouts`.

    `num_rollouts` is usually the gated-in rollouts of the whole step. Then the parts of a step add up to the same
    number for every split into micro-batches and ranks.

    token_loss, token_mask: [B, T]. weights: per rollout, [B], default 1; the weights of `draw_rollouts` estimate the
    sum over all rollouts without bias. A rollout without a selected token adds 0. Returns a scalar, float32 (float64
    kept); without selected tokens, a zero with a graph. Raises ValueError on unequal shapes or a negative num_rollouts.
    """
    (token_loss,) = to_accumulation_dtype(token_loss=token_loss)
    if token_loss.ndim != 2:
        raise ValueError(f"token_loss must have the shape [B, T], but has {tuple(token_loss.shape)}")
    selected_BT = _as_selection(token_mask, token_loss)
    sum_B = token_loss.masked_fill(~selected_BT, 0.0).sum(dim=1)
    mean_B = sum_B / selected_BT.sum(dim=1).clamp(min=1)
    if weights is not None:
        if weights.shape != mean_B.shape:
            raise ValueError(f"weights must have the shape {tuple(mean_B.shape)}, but has {tuple(weights.shape)}")
        mean_B = mean_B * weights.to(mean_B)
    return mean_B.sum() / _divisor("num_rollouts", num_rollouts, mean_B)


def _as_selection(token_mask: Tensor, like: Tensor) -> Tensor:
    if token_mask.shape != like.shape:
        raise ValueError(
            f"token_mask must have the shape of the loss, {tuple(like.shape)}, but has {tuple(token_mask.shape)}"
        )
    return token_mask.bool()


def _divisor(name: str, count: Tensor | float, like: Tensor) -> Tensor:
    """The count as a tensor, with 1 in place of 0: nothing is selected then, and the sum that it divides is 0."""
    if not isinstance(count, Tensor) and not 0 <= count < math.inf:
        raise ValueError(f"{name} must not be negative and must be finite, but is {count}")
    divisor = torch.as_tensor(count, dtype=like.dtype, device=like.device)
    return torch.where(divisor == 0, 1.0, divisor)


def _weighted(scores: ViewScores, options: LossOptions) -> tuple[Tensor, Tensor]:
    """The two divergences times their weights, [n, T]; 0 for a view that is not scored."""
    nothing = torch.zeros_like(scores.anchor.logps)
    pull, push = scores.d_preserving, scores.d_removing
    return (
        nothing if pull is None else options.perception_preserving_weight * pull,
        nothing if push is None else options.perception_removing_weight * push,
    )


def contrast(scores: ViewScores, options: LossOptions) -> Tensor:
    """`softplus((w+ d+ - w- d-) / tau)` of every token, [n, T], nats (CPPO)."""
    return contrastive_perception_tokens(*_weighted(scores, options), options.perception_temperature, scores.token_mask)


def difference(scores: ViewScores, options: LossOptions) -> Tensor:
    """`w+ d+ - w- d-` of every token, [n, T], nats (PAPO)."""
    pull, push = _weighted(scores, options)
    return pull - push


TERMS: dict[str, Callable[[ViewScores, Any], Tensor]] = {"contrast": contrast, "divergence": difference}
"""Loss sinks by name: (scores with perception tokens and divergences, options) -> the loss of every token, [n, T], with
a graph. Values outside the perception tokens are ignored.
"""


def adds_perception_loss(options: LossOptions) -> bool:
    """Whether a perception loss is added to the RL loss."""
    weights = (
        options.perception_weight,
        options.perception_preserving_entropy_weight,
        options.perception_removing_entropy_weight,
    )
    return options.perception_sink in TERMS and any(weights)


VIEWS = ("removing", "preserving")
"""The views in scoring order."""


def scored_views(options: LossOptions) -> tuple[str, ...]:
    """The views to score: those that a used score compares, and those with a weight in a loss."""
    compared = views_of(SCORES[options.perception_score])
    if options.perception_sink not in (*TERMS, "none"):
        return tuple(view for view in VIEWS if view in compared)
    looks = views_of(TERMS[options.perception_sink], VIEWS) if options.perception_sink in TERMS else VIEWS
    weights = {
        "removing": (options.perception_removing_weight, options.perception_removing_entropy_weight),
        "preserving": (options.perception_preserving_weight, options.perception_preserving_entropy_weight),
    }

    def is_scored(view: str) -> bool:
        weight, entropy_weight = weights[view]
        selects = options.perception_selector != "all" and view in compared
        in_term = view in looks and weight
        return bool((options.perception_weight and (selects or in_term)) or entropy_weight)

    return tuple(view for view in VIEWS if is_scored(view))


def needed(options: LossOptions) -> frozenset[str]:
    """The inputs that score, selector and sink declare by `needs`, beside log-probabilities and entropies."""
    sinks: dict[str, Callable[..., Any]] = {**TERMS, **SHAPINGS}
    functions = [sinks[options.perception_sink]] if options.perception_sink in sinks else []
    score = SCORES[options.perception_score]
    if set(views_of(score)) <= set(scored_views(options)):
        functions.append(score)
    found = frozenset().union(*map(needs_of, functions))
    return found | (needs_of(SELECTORS[options.perception_selector]) - {"draws", "options"})


def loss_entropies(options: LossOptions, scores: ResponseScores) -> Tensor:
    """The entropies in a loss, [B, T], nats: exact, or -log pi of the sampled tokens."""
    return -scores.logps if options.entropy_estimator == "sampled" else scores.entropies


def with_divergences(scores: ViewScores, options: LossOptions) -> ViewScores:
    """The scores with each view's divergence; gradients that the options exclude are stopped."""
    anchor = scores.anchor if options.perception_anchor_gradients else scores.anchor.detached()

    def divergence(view: ResponseScores | None, given: Tensor | None) -> Tensor | None:
        if given is not None or view is None:
            return given
        return view_divergence(options.perception_divergence, anchor, view)

    d_preserving = divergence(scores.preserving, scores.d_preserving)
    d_removing = divergence(scores.removing, scores.d_removing)
    return replace(scores, anchor=anchor, d_preserving=d_preserving, d_removing=d_removing)


def perception_loss(
    scores: ViewScores, options: LossOptions, normalizer: Tensor | float, weights: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """The weighted perception loss of n gated-in rollouts, and its metrics.

    Args:
        scores: with the perception tokens (`detect`).
        options: a sink of `TERMS` and its options.
        normalizer: the divisor of the sum: gated-in rollouts of the step ("rollout") or selected tokens of the step
            ("token"); for "microbatch", a factor on the mean over these rollouts.
        weights: per rollout, [n], where only some were drawn or advantages weight them ("rollout" alone).

    Returns:
        A scalar with a graph, nats, and the metrics of `METRICS`, without a graph.
    """
    token_mask = scores.token_mask
    assert token_mask is not None
    compared = with_divergences(scores, options)
    token_loss = TERMS[options.perception_sink](compared, options)

    over_response = "response_mean" in needs_of(TERMS[options.perception_sink])

    def mean(values: Tensor, over: Tensor) -> Tensor:
        if options.perception_normalization == "rollout":
            return rollout_mean_loss(values, over, normalizer, weights)
        if options.perception_normalization == "token":
            return token_mean_loss(values, over, normalizer)
        return token_mean_loss(values, over) / normalizer

    loss = options.perception_weight * mean(token_loss, scores.response_mask if over_response else token_mask)
    for view, weight in (
        (scores.preserving, options.perception_preserving_entropy_weight),
        (scores.removing, options.perception_removing_entropy_weight),
    ):
        if view is not None and weight:
            loss = loss + weight * mean(loss_entropies(options, view), scores.response_mask)
    values = {"cpl": token_loss, "d_preserving": compared.d_preserving, "d_removing": compared.d_removing}
    for name, view in (("", scores.anchor), ("_preserving", scores.preserving), ("_removing", scores.removing)):
        values[f"entropy{name}"] = None if view is None else view.entropies
    return loss, _metrics(values, token_mask, scores.response_mask)


@torch.no_grad()
def _metrics(values: dict[str, Tensor | None], token_mask: Tensor, response_mask: Tensor) -> Metrics:
    """Sums over the selected tokens and their number; values of None are left out."""
    selected = token_mask.sum()
    found = {
        name: (value.float().masked_fill(~token_mask, 0.0).sum(), selected)
        for name, value in values.items()
        if value is not None
    }
    return {**found, "selected_fraction": (selected, response_mask.bool().sum())}
