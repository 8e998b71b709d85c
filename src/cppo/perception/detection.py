"""Detection of perception tokens: divergences on the sampled token, dependency scores, selection.

A perception token has a high score under an information-removing view. Divergences, entropies and scores are in nats.
Source: "CPPO: Contrastive Perception for Vision Language Policy Optimization" (arXiv 2601.00501). Its synchronous code
estimates divergences by k3 on the sampled token, its asynchronous code by k1. Its text describes full distributions;
the exact divergences implement that.

All functions accept bfloat16 or float16, compute and return float32, and keep float64. Gradients flow through both
arguments of a divergence, and through no score. For a sampling temperature, divide the logits by it first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cppo.perception.distributions import EXACT_DIVERGENCES, nucleus_entropy
from cppo.perception.responses import ResponseScores, ViewScores

K3_LOG_RATIO_LIMIT = 20.0
K3_VALUE_LIMIT = 10.0
ENTROPY_EPSILON = 1e-6
ENTROPY_FLOOR = 1e-5
"""Smallest rise of an entropy, in nats, that counts. TRL and verl compute float32 entropies as `log Z - sum p z`, which
is off by up to 1.5e-5 near 0 (measured). Below the floor, rounding errors would decide between tokens.
"""
ROUNDINGS = ("floor", "ceil")


def to_accumulation_dtype(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Check that all tensors have one shape and a floating dtype; convert them to float32, or float64 if any is.

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
    """Published k3 estimate of KL(anchor || view) from the log-probabilities of the sampled tokens.

    `k3 = exp(x) - x - 1` with `x = clamp(view_logp - logp, -20, 20)`, clamped to [0, 10]. The gradient is zero where a
    clamp acts. `expm1` keeps small values exact.

    logps, view_logps: [B, T] (any one shape), nats. Returns the same shape. Two equal log-probabilities give exactly 0,
    also two of -inf (a banned token). Noise in bf16: docs/results/noise_floor.md. Raises ValueError on unequal shapes.
    """
    logps, view_logps = to_accumulation_dtype(logps=logps, view_logps=view_logps)
    # -inf - (-inf) is NaN; equal arguments have value and gradient zero.
    log_ratio = (view_logps - logps).masked_fill(logps == view_logps, 0.0)
    log_ratio = log_ratio.clamp(-K3_LOG_RATIO_LIMIT, K3_LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=K3_VALUE_LIMIT)


@torch.no_grad()
def entropy_shift(entropy: Tensor, view_entropy: Tensor, relative: bool = True) -> Tensor:
    """Published score of CPPO: the rise of the entropy when the image loses its information.

    With `dH = view_entropy - entropy`, the score is `relu(dH) / (view_entropy + 1e-6)` if `relative` (a fraction of at
    most 1), else `relu(dH)` (nats). A shift below `ENTROPY_FLOOR` gives exactly 0.

    entropy (under the image), view_entropy (under the information-removing view): [B, T], nats. Returns [B, T],
    detached. Source: arXiv 2601.00501. Raises ValueError on unequal shapes.
    """
    entropy, view_entropy = to_accumulation_dtype(entropy=entropy, view_entropy=view_entropy)
    rise = (view_entropy - entropy).relu()
    rise = rise.masked_fill(rise < ENTROPY_FLOOR, 0.0)
    return rise / (view_entropy + ENTROPY_EPSILON) if relative else rise


@torch.no_grad()
def logp_shift(logps: Tensor, view_logps: Tensor) -> Tensor:
    """Score `relu(logp - view_logp)`, nats: the log-probability that the sampled token loses under the view.

    logps, view_logps: [B, T]. Returns [B, T], detached. Raises ValueError on unequal shapes.
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

    A candidate has a non-zero `response_mask`, `score > 0` (never NaN) and, where advantages are given, an advantage >
    0. A row with `count` candidates keeps exactly `max(1, floor(top_fraction * count))` of them, or the ceiling, by
    `rounding`; a row without candidates keeps none. Ties go to the earlier position.

    score: [B, T]. response_mask: [B, T], bool or 0/1. advantages: [B] (per rollout) or [B, T] (per token). rounding:
    one of `ROUNDINGS`. Returns bool [B, T]. Source: arXiv 2601.00501, with top_fraction 0.5; its synchronous code takes
    the floor, its asynchronous code the ceiling. Raises ValueError on a wrong shape, a top_fraction outside (0, 1] or
    an unknown rounding.
    """
    candidate_BT = response_tokens(score, response_mask, top_fraction) & (score > 0)
    if advantages is not None:
        if advantages.shape == score.shape[:1]:
            advantages = advantages[:, None]
        elif advantages.shape != score.shape:
            raise ValueError(
                f"advantages must have the shape [B] or [B, T] of score, {tuple(score.shape)}, "
                f"but has {tuple(advantages.shape)}"
            )
        candidate_BT &= advantages > 0

    return best_tokens(score, candidate_BT, kept_count(candidate_BT, top_fraction, rounding))


def select_tokens(
    selector: str,
    score: Tensor,
    response_mask: Tensor,
    top_fraction: float,
    draws: Tensor | None = None,
    rounding: str = "floor",
    **more: Any,
) -> Tensor:
    """The tokens that a selector of `SELECTORS` keeps, bool [B, T], or their weights, floating [B, T].

    score, response_mask: [B, T]. draws: independent uniform numbers, [B, T]. rounding: one of `ROUNDINGS`. more:
    "entropies", "nucleus_entropies" and "options". Selectors that need draws or more declare it. Raises ValueError on
    an unknown selector, a missing input, or an input that the selector refuses.
    """
    select = registered(SELECTORS, "selector", selector)
    needed = needs_of(select)
    if "draws" in needed and draws is None:
        raise ValueError(f"selector {selector!r} needs draws, uniform random numbers [B, T]")
    taken = {name: more.get(name) for name in sorted(needed - {"draws"})}
    for name, value in taken.items():
        if value is None:
            raise ValueError(f"selector {selector!r} needs {name}")
    return select(score, response_mask.bool(), top_fraction, rounding=rounding, draws=draws, **taken)


def response_tokens(score: Tensor, response_mask: Tensor, top_fraction: float = 1.0) -> Tensor:
    """The response mask as bool [B, T]; checks shapes and fraction."""
    if not 0.0 < top_fraction <= 1.0:
        raise ValueError(f"top_fraction must lie in (0, 1], but is {top_fraction}")
    if score.ndim != 2:
        raise ValueError(f"score must have the shape [B, T], but has {tuple(score.shape)}")
    if response_mask.shape != score.shape:
        raise ValueError(
            f"response_mask must have the shape of score, {tuple(score.shape)}, but has {tuple(response_mask.shape)}"
        )
    return response_mask.bool()


def kept_count(candidate_BT: Tensor, top_fraction: float, rounding: str) -> Tensor:
    """The number of candidates that each row keeps, [B, 1]: at least one, but 0 for a row without candidates.

    Raises ValueError on a rounding that is not one of `ROUNDINGS`.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, but is {rounding!r}")

    def kept(count: int) -> int:
        if rounding == "floor":
            return max(1, math.floor(top_fraction * count))
        return math.ceil(round(top_fraction * count, 9))  # 0.07 x 100 is 7, but its float64 product is above 7

    # A table made in Python's float64 keeps the count exact on devices without float64.
    kept_by_count = torch.tensor(
        [0, *(kept(count) for count in range(1, candidate_BT.shape[1] + 1))], device=candidate_BT.device
    )
    return kept_by_count[candidate_BT.sum(dim=1, keepdim=True)]


def best_tokens(score: Tensor, candidate_BT: Tensor, kept_B1: Tensor) -> Tensor:
    """The `kept_B1` best-scored candidates of each row, bool [B, T]; ties go to the earlier position."""
    ranked = score if score.is_floating_point() else score.float()
    order_BT = torch.sort(
        ranked.detach().masked_fill(~candidate_BT, -math.inf), dim=1, descending=True, stable=True
    ).indices
    positions_BT = torch.arange(score.shape[1], device=score.device).expand_as(order_BT)
    rank_BT = torch.empty_like(order_BT).scatter_(1, order_BT, positions_BT)
    return candidate_BT & (rank_BT < kept_B1)


class DetectionOptions(Protocol):
    """The options that detection reads; see `CPPOConfig`. A selector may read others."""

    @property
    def perception_score(self) -> str: ...
    @property
    def perception_selector(self) -> str: ...
    @property
    def perception_selector_scope(self) -> str: ...
    @property
    def perception_top_fraction(self) -> float: ...
    @property
    def perception_top_rounding(self) -> str: ...
    @property
    def perception_nucleus(self) -> float: ...


Function = TypeVar("Function", bound=Callable[..., Any])


def needs(*names: str) -> Callable[[Function], Function]:
    """Decorator: declare the extra inputs of a score, selector or sink.

    A score may need "hidden_states"; the exact divergences "kl" and "js" (`ResponseScores.exact` of its views); one of
    `SIMILARITIES` (`ResponseScores.similarities` of the anchor); "response_mask", passed by name; or "logits". With
    "logits" it is a function of both policies' logits, [n, V] each, for n tokens at a time, and returns [n].

    A selector may need, each passed by name, "draws", "entropies", "nucleus_entropies", [B, T], or "options".

    A sink may need "hidden_states". A loss term may also need "advantages", "old_logps", "reference_logps"
    (`ViewScores`) and "response_mean", which averages it over all response tokens. An advantage shaping may also need
    "rollout_weights" or "group_weights".
    """

    def declare(function: Function) -> Function:
        setattr(function, "needs", frozenset(names))  # noqa: B010 (mypy knows no such attribute of a function)
        return function

    return declare


def needs_of(function: Callable[..., Any]) -> frozenset[str]:
    """The extra inputs that a function declares by `needs`."""
    return getattr(function, "needs", frozenset())


def under(*views: str) -> Callable[[Function], Function]:
    """Decorator: declare the views that a score compares with the image, in the order of its arguments after the
    anchor.

    The views are "removing" and "preserving". `under()` declares none, for a score of the image alone. Without the
    decorator a score compares I-. A loss term uses the views with a weight; with `under()`, none.
    """

    def declare(function: Function) -> Function:
        setattr(function, "views", views)  # noqa: B010 (as above)
        return function

    return declare


def views_of(function: Callable[..., Any], default: tuple[str, ...] = ("removing",)) -> tuple[str, ...]:
    """The views that a function declares by `under`."""
    return getattr(function, "views", default)


def registered(registry: Mapping[str, Function], kind: str, name: str) -> Function:
    """The function registered under a name. Raises ValueError that lists the names."""
    if name not in registry:
        raise ValueError(f"{kind} must be one of {', '.join(registry)}, but is {name!r}")
    return registry[name]


def named(registry: dict[str, Any], name: str) -> Callable[[Function], Function]:
    """Decorator: register a function under a name."""

    def enter(function: Function) -> Function:
        registry[name] = function
        return function

    return enter


SCORES: dict[str, Callable[..., Tensor]] = {
    "entropy_shift": lambda anchor, removing: entropy_shift(anchor.entropies, removing.entropies),
    "entropy_shift_absolute": lambda anchor, removing: entropy_shift(anchor.entropies, removing.entropies, False),
    **{name: needs("logits")(divergence) for name, divergence in EXACT_DIVERGENCES.items()},
    "logp_shift": lambda anchor, removing: logp_shift(anchor.logps, removing.logps),
    "k3": lambda anchor, removing: k3_divergence(anchor.logps, removing.logps),
    "entropy": under()(lambda anchor: anchor.entropies),
}
"""Dependency scores by name: (`ResponseScores` under the image, then under each view of `under`) -> [B, T], or as
`needs` declares. "entropy", under the image alone, is the control. `cppo.perception.scores` adds more.
"""
DEPENDENCY_SCORES = tuple(SCORES)
"""The scores that evaluations compare; they need only the anchor and I-."""

SELECTORS: dict[str, Callable[..., Tensor]] = {
    "top_positive": lambda score, mask, fraction, *, rounding, draws: select_perception_tokens(
        score, mask, fraction, rounding=rounding
    ),
    "all": lambda score, mask, fraction, *, rounding, draws: response_tokens(score, mask),
}
"""Selectors by name: (score [B, T], response mask, bool, top fraction, rounding=, draws=) -> bool [B, T], or token
weights [B, T], 0 for tokens left out. "all" keeps every token. `cppo.perception.selectors` adds more.
"""


@torch.no_grad()
def dependency_score(
    name: str,
    anchor: ResponseScores,
    removing: ResponseScores | None = None,
    preserving: ResponseScores | None = None,
    response_mask: Tensor | None = None,
) -> Tensor:
    """Each response token's dependency on the image by a score of `SCORES`, [B, T], without gradient.

    Exact divergences that the score needs and that are unknown are computed from the logits. Without a response_mask,
    [B, T], all tokens count. Raises ValueError on an unknown name, or where a needed view, logits, hidden states or
    similarities are missing.
    """
    score = registered(SCORES, "score", name)
    needed, given = needs_of(score), {"removing": removing, "preserving": preserving}
    views = {view: given[view] for view in views_of(score)}
    for one in (anchor, *views.values()):
        if one is None:
            raise ValueError(f"the score {name!r} compares {', '.join(views)}, but not all of them are scored")
        if "hidden_states" in needed and one.hidden_states is None:
            raise ValueError(f"the score {name!r} needs hidden states, but the scorer kept none")
    found = [with_exact(anchor, one, over_logits(name)) for one in views.values() if one is not None]
    if "logits" in needed:
        return found[0].exact["score"]
    taken = {}
    if "response_mask" in needed:
        whole = torch.ones_like(anchor.logps, dtype=torch.bool)
        taken["response_mask"] = whole if response_mask is None else response_mask.bool()
    return score(anchor, *found, **taken).detach()


OverLogits = Callable[[Tensor, Tensor], Tensor]
"""A function of n tokens' logits under the image and under a view, [n, V] each -> [n]."""


def over_logits(name: str) -> dict[str, OverLogits]:
    """The functions of logits under image and view that a score of `SCORES` needs: "score" itself, or divergences."""
    score = SCORES[name]
    if "logits" in needs_of(score):
        return {"score": score}
    return {one: function for one, function in EXACT_DIVERGENCES.items() if one in needs_of(score)}


def over_anchor_logits(options: DetectionOptions) -> dict[str, OverLogits]:
    """The functions of logits under the image that the selector needs; they get these logits twice."""
    if "nucleus_entropies" not in needs_of(SELECTORS[options.perception_selector]):
        return {}
    return {"nucleus_entropy": lambda logits, _: nucleus_entropy(logits, options.perception_nucleus)}


def with_exact(anchor: ResponseScores, view: ResponseScores, functions: Mapping[str, OverLogits]) -> ResponseScores:
    """The view's scores, extended by these functions of full logits. Raises ValueError where logits are missing."""
    exact = dict(view.exact)
    for name, function in functions.items():
        if name not in exact:
            if anchor.logits is None or view.logits is None:
                raise ValueError(f"{name!r} needs full logits: score with the plain scorer")
            exact[name] = function(anchor.logits.flatten(0, 1), view.logits.flatten(0, 1)).view_as(anchor.logps)
    return replace(view, exact=exact)


@torch.no_grad()
def detect(scores: ViewScores, options: DetectionOptions) -> ViewScores:
    """`scores` with the perception tokens, and with the dependency score where it was missing."""
    scores = replace(scores, anchor=with_exact(scores.anchor, scores.anchor, over_anchor_logits(options)))
    score, name = scores.score, options.perception_score
    if score is None and any(getattr(scores, view) is None for view in views_of(registered(SCORES, "score", name))):
        score = torch.full_like(scores.anchor.logps, torch.nan)
    elif score is None:
        score = dependency_score(name, scores.anchor, scores.removing, scores.preserving, scores.response_mask)
    return select(replace(scores, score=score), options)


def select(scores: ViewScores, options: DetectionOptions) -> ViewScores:
    """`scores` with the perception tokens that the selector keeps, in each rollout or in all rollouts together."""
    assert scores.score is not None
    score, mask, more = scores.score, scores.response_mask, dict[str, Tensor | None]()
    more["draws"], more["entropies"] = scores.draws, scores.anchor.entropies
    more["nucleus_entropies"] = scores.anchor.exact.get("nucleus_entropy")
    if options.perception_selector_scope == "batch":
        score, mask = score.reshape(1, -1), mask.reshape(1, -1)
        more = {name: None if values is None else values.reshape(1, -1) for name, values in more.items()}
    fraction, rounding = options.perception_top_fraction, options.perception_top_rounding
    selector = options.perception_selector
    found = select_tokens(selector, score, mask, fraction, rounding=rounding, options=options, **more)
    found = found.view_as(scores.score)
    weights = found if found.is_floating_point() else None
    return replace(scores, token_mask=found > 0, token_weights=weights)
