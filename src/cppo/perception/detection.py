"""Which response tokens depend on the image: divergences on the sampled token, dependency scores, selection.

A token whose score under an information-removing view is high is taken for a perception token. Divergences, entropies
and scores are in nats. Source: "CPPO: Contrastive Perception for Vision Language Policy Optimization" (arXiv
2601.00501). Its synchronous code estimates divergences by k3 on the sampled token, its asynchronous code by k1. Its
text speaks of whole distributions, for which the exact divergences stand here.

All functions accept bfloat16 or float16, compute and return float32, and keep float64. Gradients flow through both
arguments of a divergence and through none of a score. Distributions at a sampling temperature: divide the logits by it
first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cppo.perception.distributions import EXACT_DIVERGENCES

K3_LOG_RATIO_LIMIT = 20.0
K3_VALUE_LIMIT = 10.0
ENTROPY_EPSILON = 1e-6
ROUNDINGS = ("floor", "ceil")


def to_accumulation_dtype(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Check that the tensors have one shape and a floating dtype; lift them to float32, or float64 if any is.

    Raises ValueError that names the tensor and its shape or dtype.
    """
    first_name, first = next(iter(tensors.items()))
    dtype = torch.float32
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, but its dtype is {tensor.dtype}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, but has {tuple(tensor.shape)}"
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors.values())


def k3_divergence(logps: Tensor, view_logps: Tensor) -> Tensor:
    """Published estimate of KL(anchor || view) from the log-probabilities of the sampled token alone.

    `k3 = exp(x) - x - 1` with `x = clamp(view_logp - logp, -20, 20)`, never negative and cut at 10; the gradient
    is zero where a clamp acts. Written with `expm1`, which keeps small values exact.

    logps, view_logps: [B, T] (any one shape), nats. Returns the same shape. Raises ValueError on unequal
    shapes. Two equal log-probabilities give exactly 0, two of -inf (a banned token) too. Noise in bf16:
    docs/noise_floor.md.
    """
    logps, view_logps = to_accumulation_dtype(logps=logps, view_logps=view_logps)
    # -inf - (-inf) is NaN; equal arguments have value and gradient zero anyway.
    log_ratio = (view_logps - logps).masked_fill(logps == view_logps, 0.0)
    log_ratio = log_ratio.clamp(-K3_LOG_RATIO_LIMIT, K3_LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=K3_VALUE_LIMIT)


@torch.no_grad()
def entropy_shift(entropy: Tensor, view_entropy: Tensor, relative: bool = True) -> Tensor:
    """Published score of CPPO: by how much the entropy rises when the image loses its information.

    `dH = view_entropy - entropy`; the score is `relu(dH) / (view_entropy + 1e-6)` (a fraction of at most 1)
    if `relative`, else `relu(dH)` (nats); exactly 0 where the shift is not positive.

    entropy (under the image), view_entropy (under the information-removing view): [B, T], nats. Returns [B,
    T], detached. Source: arXiv 2601.00501. Raises ValueError on unequal shapes.
    """
    entropy, view_entropy = to_accumulation_dtype(entropy=entropy, view_entropy=view_entropy)
    rise = (view_entropy - entropy).relu()
    return rise / (view_entropy + ENTROPY_EPSILON) if relative else rise


@torch.no_grad()
def logp_shift(logps: Tensor, view_logps: Tensor) -> Tensor:
    """Score `relu(logp - view_logp)`: the log-probability that the sampled token loses under the view, nats.

    logps, view_logps: [B, T]. Returns [B, T], detached; 0 where the view does not lower it. Raises ValueError
    on unequal shapes.
    """
    logps, view_logps = to_accumulation_dtype(logps=logps, view_logps=view_logps)
    return (logps - view_logps).relu()


def select_perception_tokens(
    score: Tensor,
    response_mask: Tensor,
    top_fraction: float = 0.5,
    advantages: Tensor | None = None,
    rounding: str = "floor",
) -> Tensor:
    """The best-scored `top_fraction` of each rollout's candidate tokens.

    A candidate has `response_mask` non-zero and `score > 0` (so never NaN) and, where advantages are given,
    an advantage > 0. Of the `count` candidates of a row exactly `max(1, floor(top_fraction * count))` are
    kept, or `ceil(top_fraction * count)`, as `rounding` says; none if there are none. Ties go to the earlier
    position.

    score: [B, T]. response_mask: [B, T], bool or 0/1. advantages: [B] (a rollout) or [B, T] (a token).
    rounding: one of `ROUNDINGS`. Returns bool [B, T]. Source: arXiv 2601.00501, where top_fraction is 0.5; its
    synchronous code takes the floor, its asynchronous the ceiling. Raises ValueError on a shape that does not
    fit, a top_fraction outside (0, 1] or an unknown rounding.
    """
    candidate_BT = _response_tokens(score, response_mask, top_fraction) & (score > 0)
    if advantages is not None:
        if advantages.shape == score.shape[:1]:
            advantages = advantages[:, None]
        elif advantages.shape != score.shape:
            raise ValueError(
                f"advantages must have the shape [B] or [B, T] of score, {tuple(score.shape)}, "
                f"but has {tuple(advantages.shape)}"
            )
        candidate_BT &= advantages > 0

    return _best(score, candidate_BT, _kept(candidate_BT, top_fraction, rounding))


def select_top_tokens(score: Tensor, response_mask: Tensor, top_fraction: float, rounding: str = "floor") -> Tensor:
    """The best-scored `top_fraction` of each rollout's response tokens, whatever their sign.

    As `select_perception_tokens` otherwise, whose top fraction is one of the tokens with a positive score. Source: VPPO
    (arXiv 2510.09285), where top_fraction is 0.4 and the rounding "ceil".
    """
    candidate_BT = _response_tokens(score, response_mask, top_fraction)
    return _best(score, candidate_BT, _kept(candidate_BT, top_fraction, rounding))


def select_random_tokens(like: Tensor, response_mask: Tensor, draws: Tensor) -> Tensor:
    """As many of each rollout's response tokens as `like` selects, drawn uniformly: those with the largest `draws`.

    like: bool [B, T]. response_mask: [B, T]. draws: independent uniform numbers, [B, T]. Returns bool [B, T]. Raises
    ValueError on unequal shapes.
    """
    candidate_BT = _response_tokens(draws, response_mask)
    if like.shape != draws.shape:
        raise ValueError(f"like must have the shape of draws, {tuple(draws.shape)}, but has {tuple(like.shape)}")
    return _best(draws, candidate_BT, like.sum(dim=1, keepdim=True))


def select_tokens(
    selector: str,
    score: Tensor,
    response_mask: Tensor,
    top_fraction: float,
    draws: Tensor | None = None,
    rounding: str = "floor",
) -> Tensor:
    """The tokens that a selector of `SELECTORS` keeps, bool [B, T].

    score, response_mask: [B, T]. draws: independent uniform numbers, [B, T], for selectors that need them. rounding:
    one of `ROUNDINGS`. Raises ValueError on an unknown selector, missing draws, or what the functions above refuse.
    """
    select = registered(SELECTORS, "selector", selector)
    if "draws" in needs_of(select) and draws is None:
        raise ValueError(f"selector {selector!r} needs draws, uniform random numbers [B, T]")
    return select(score, response_mask.bool(), top_fraction, rounding=rounding, draws=draws)


def _response_tokens(score: Tensor, response_mask: Tensor, top_fraction: float = 1.0) -> Tensor:
    """The response mask as bool [B, T], after a check of shapes and fraction."""
    if not 0.0 < top_fraction <= 1.0:
        raise ValueError(f"top_fraction must lie in (0, 1], but is {top_fraction}")
    if score.ndim != 2:
        raise ValueError(f"score must have the shape [B, T], but has {tuple(score.shape)}")
    if response_mask.shape != score.shape:
        raise ValueError(
            f"response_mask must have the shape of score, {tuple(score.shape)}, but has {tuple(response_mask.shape)}"
        )
    return response_mask.bool()


def _kept(candidate_BT: Tensor, top_fraction: float, rounding: str) -> Tensor:
    """How many of each row's candidates are kept: at least one, but 0 without any; [B, 1]."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, but is {rounding!r}")

    def kept(count: int) -> int:
        if rounding == "floor":
            return max(1, math.floor(top_fraction * count))
        return math.ceil(round(top_fraction * count, 9))  # 0.07 x 100 is 7, though its product in float64 is above

    # A table in Python's own float64 keeps the count exact on devices that have no float64.
    kept_by_count = torch.tensor(
        [0, *(kept(count) for count in range(1, candidate_BT.shape[1] + 1))], device=candidate_BT.device
    )
    return kept_by_count[candidate_BT.sum(dim=1, keepdim=True)]


def _best(score: Tensor, candidate_BT: Tensor, kept_B1: Tensor) -> Tensor:
    """The `kept_B1` best-scored candidates of each row, ties to the earlier position; bool [B, T]."""
    ranked = score if score.is_floating_point() else score.float()
    order_BT = torch.sort(
        ranked.detach().masked_fill(~candidate_BT, -math.inf), dim=1, descending=True, stable=True
    ).indices
    positions_BT = torch.arange(score.shape[1], device=score.device).expand_as(order_BT)
    rank_BT = torch.empty_like(order_BT).scatter_(1, order_BT, positions_BT)
    return candidate_BT & (rank_BT < kept_B1)


@dataclass(frozen=True)
class ResponseScores:
    """What a policy says of B responses of T tokens (V: vocabulary, H: width), at the sampling temperature.

    Attributes:
        logps: log-probability of each response token, [B, T], nats.
        entropies: entropy of the next-token distribution that each response token was drawn from, [B, T], nats.
        logits: that distribution's logits, [B, T, V], or None where the scorer does not keep them.
        aux_loss: load-balancing loss of a mixture-of-experts model, scalar, or None.
        hidden_states: what the head makes the logits of, [B, T, H], where a score or a sink needs them.
        exact: of a view, its exact divergences from the policy under the image by name, [B, T], nats, where needed.
    """

    logps: Tensor
    entropies: Tensor
    logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: Tensor | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    def pick(self, rows: list[int] | slice) -> "ResponseScores":
        """The scores of these rows, beside the auxiliary loss of all."""
        return self._each(lambda values: values[rows], self.aux_loss)

    def detached(self) -> "ResponseScores":
        """The same scores as constants, without the auxiliary loss."""
        return self._each(Tensor.detach, None)

    def _each(self, change: Callable[[Tensor], Tensor], aux_loss: Tensor | None) -> "ResponseScores":
        logits, hidden = (None if one is None else change(one) for one in (self.logits, self.hidden_states))
        exact = {name: change(values) for name, values in self.exact.items()}
        return ResponseScores(change(self.logps), change(self.entropies), logits, aux_loss, hidden, exact)


@dataclass(frozen=True)
class ViewScores:
    """What the policy says of n rollouts under the image and its views: all that detection and loss take.

    Attributes:
        anchor, removing, preserving: scores under the image, I- and I+; None for a view that the method does not look
            at. Those under I+ are needed at the selected tokens alone and may be anything elsewhere, unless their
            entropy has a weight.
        response_mask: theirs, [n, T].
        draws: uniform random numbers [n, T], for a random selection.
        score: the dependency score, [n, T], where it is known; NaN without scores under I-.
        token_mask: the perception tokens, bool [n, T], once they are selected.
        d_preserving, d_removing: exact divergences of the anchor and each view, [n, T], where they were taken along;
            needed at the selected tokens.
    """

    anchor: ResponseScores
    removing: ResponseScores | None
    preserving: ResponseScores | None
    response_mask: Tensor
    draws: Tensor | None = None
    score: Tensor | None = None
    token_mask: Tensor | None = None
    d_preserving: Tensor | None = None
    d_removing: Tensor | None = None


class DetectionOptions(Protocol):
    """The options by which perception tokens are found; see `CPPOConfig`."""

    @property
    def perception_score(self) -> str: ...
    @property
    def perception_selector(self) -> str: ...
    @property
    def perception_top_fraction(self) -> float: ...
    @property
    def perception_top_rounding(self) -> str: ...


Function = TypeVar("Function", bound=Callable[..., Any])


def needs(*names: str) -> Callable[[Function], Function]:
    """Declare what a score, selector or sink takes beside what it always gets; a decorator.

    Of a score: "hidden_states", the exact divergences "kl" and "js" (`ResponseScores.exact` of I-), or "logits": it is
    then a function of the two policies' logits, [n, V] each, of n tokens at a time, and returns [n]. Of a selector:
    "draws". Of a sink: "hidden_states"; of one that shapes advantages also "rollout_weights".
    """

    def declare(function: Function) -> Function:
        setattr(function, "needs", frozenset(names))  # noqa: B010 (a function has no such attribute for mypy)
        return function

    return declare


def needs_of(function: Callable[..., Any]) -> frozenset[str]:
    """What a function declares by `needs`."""
    return getattr(function, "needs", frozenset())


def registered(registry: Mapping[str, Function], kind: str, name: str) -> Function:
    """The function of that name. Raises ValueError that lists the names."""
    if name not in registry:
        raise ValueError(f"{kind} must be one of {', '.join(registry)}, but is {name!r}")
    return registry[name]


SCORES: dict[str, Callable[..., Tensor]] = {
    "entropy_shift": lambda anchor, removing: entropy_shift(anchor.entropies, removing.entropies),
    "entropy_shift_absolute": lambda anchor, removing: entropy_shift(anchor.entropies, removing.entropies, False),
    **{name: needs("logits")(divergence) for name, divergence in EXACT_DIVERGENCES.items()},
    "logp_shift": lambda anchor, removing: logp_shift(anchor.logps, removing.logps),
    "k3": lambda anchor, removing: k3_divergence(anchor.logps, removing.logps),
    "entropy": lambda anchor, removing: anchor.entropies,
}
"""Dependency scores by name: (`ResponseScores` under the image, under I-) -> [B, T], or as `needs` says. "entropy", of
the image alone, is the control for all others."""
DEPENDENCY_SCORES = tuple(SCORES)
"""Those that come with the package; the user's own join them in `SCORES`."""


def _random(score: Tensor, response_mask: Tensor, top_fraction: float, *, rounding: str, draws: Tensor) -> Tensor:
    like = select_perception_tokens(score, response_mask, top_fraction, rounding=rounding)
    return select_random_tokens(like, response_mask, draws)


SELECTORS: dict[str, Callable[..., Tensor]] = {
    "top_positive": lambda score, mask, fraction, *, rounding, draws: select_perception_tokens(
        score, mask, fraction, rounding=rounding
    ),
    "top": lambda score, mask, fraction, *, rounding, draws: select_top_tokens(score, mask, fraction, rounding),
    "random": needs("draws")(_random),
    "all": lambda score, mask, fraction, *, rounding, draws: _response_tokens(score, mask),
}
"""Selectors by name: (score [B, T], response mask, bool, top fraction, rounding=, draws=) -> bool [B, T]. "random"
keeps as many tokens as "top_positive", those with the largest draws; "all" keeps every one, whatever its score."""


@torch.no_grad()
def dependency_score(name: str, anchor: ResponseScores, removing: ResponseScores) -> Tensor:
    """How much each response token depends on the image by the score of `SCORES`, [B, T], without gradient.

    Exact divergences that it needs are taken of the logits unless they are known. Raises ValueError on an unknown name,
    or where it needs logits or hidden states and the scores have none.
    """
    score = registered(SCORES, "score", name)
    needed = needs_of(score)
    if "hidden_states" in needed and (anchor.hidden_states is None or removing.hidden_states is None):
        raise ValueError(f"the score {name!r} needs hidden states, but the scorer kept none")
    taken = {}
    for one, function in over_logits(name).items():
        if one not in removing.exact:
            if anchor.logits is None or removing.logits is None:
                raise ValueError(f"the score {name!r} needs logits: score with the plain scorer")
            values = function(anchor.logits.flatten(0, 1), removing.logits.flatten(0, 1))
            taken[one] = values.view_as(anchor.logps)
    if "logits" in needed:
        return taken["score"]
    return score(anchor, replace(removing, exact={**removing.exact, **taken})).detach()


def over_logits(name: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of the logits under the image and I- that a score of `SCORES` needs: "score" itself, or divergences."""
    score = SCORES[name]
    if "logits" in needs_of(score):
        return {"score": score}
    return {one: function for one, function in EXACT_DIVERGENCES.items() if one in needs_of(score)}


def detect(scores: ViewScores, options: DetectionOptions) -> ViewScores:
    """`scores` with the perception tokens, and with the dependency score where it was not taken along."""
    score = scores.score
    if score is None and scores.removing is not None:
        score = dependency_score(options.perception_score, scores.anchor, scores.removing)
    elif score is None:
        score = torch.full_like(scores.anchor.logps, torch.nan)
    token_mask = select_tokens(
        options.perception_selector,
        score,
        scores.response_mask,
        options.perception_top_fraction,
        scores.draws,
        options.perception_top_rounding,
    )
    return replace(scores, score=score, token_mask=token_mask)
