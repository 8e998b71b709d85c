"""Which rollouts and which of their tokens take part in the contrastive perception loss."""

import math

import torch
from torch import Tensor

GATES = ("advantage", "correct", "none")
SELECTORS = ("top_positive", "top", "random", "all")
ROUNDINGS = ("floor", "ceil")


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

    "top_positive": `select_perception_tokens`; "top": `select_top_tokens`; "random": as many as "top_positive" keeps,
    those with the largest `draws`; "all": every response token, whatever its score.

    score, response_mask: [B, T]. draws: independent uniform numbers, [B, T], needed by "random" alone. rounding: one of
    `ROUNDINGS`. Raises ValueError on an unknown selector, missing draws, or what the functions above refuse.
    """
    if selector == "all":
        return _response_tokens(score, response_mask)
    if selector == "top":
        return select_top_tokens(score, response_mask, top_fraction, rounding)
    if selector not in SELECTORS:
        raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, but is {selector!r}")
    selected = select_perception_tokens(score, response_mask, top_fraction, rounding=rounding)
    if selector == "top_positive":
        return selected
    if draws is None:
        raise ValueError("selector 'random' needs draws, uniform random numbers [B, T]")
    return select_random_tokens(selected, response_mask, draws)


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


def gate_rollouts(gate: str, advantages: Tensor, correctness: Tensor | None = None) -> Tensor:
    """Which rollouts the perception loss may learn from.

    gate "advantage" (published): advantage > 0. "correct": correctness > 0, the value of the reward that
    decides (1.0 for a right answer, 0.0 for a wrong one; a partial credit above 0 counts as right, NaN as
    wrong), which keeps out a well-formatted wrong answer in an all-wrong group. "none": all.

    advantages: [B]. correctness: [B], needed by "correct" alone. Returns bool [B]. Raises ValueError on an
    unknown gate, a wrong shape or a missing correctness.
    """
    if advantages.ndim != 1:
        raise ValueError(f"advantages must have the shape [B], but has {tuple(advantages.shape)}")
    if gate == "advantage":
        return advantages > 0
    if gate == "none":
        return torch.ones_like(advantages, dtype=torch.bool)
    if gate != "correct":
        raise ValueError(f"gate must be one of {', '.join(GATES)}, but is {gate!r}")
    if correctness is None:
        raise ValueError("gate 'correct' needs correctness, the [B] values of the reward that decides")
    if correctness.shape != advantages.shape:
        raise ValueError(
            f"correctness must have the shape of advantages, {tuple(advantages.shape)}, "
            f"but has {tuple(correctness.shape)}"
        )
    return correctness > 0


def equal_rewards(rewards: Tensor, group_size: int) -> Tensor:
    """Which rollouts are of a group whose rewards are all the same, up to rounding: no success of any of them.

    The mean that is subtracted for the advantages is rounded: 12 rewards of 0.9 in float32 are left with advantages of
    6e-4 each once TRL has divided by the standard deviation + 1e-4.

    rewards: [B, F], one column a reward that is compared on its own; B is a multiple of group_size, and groups stand
    side by side. NaN, which TRL leaves out of a group's mean, is left out here. Returns bool [B].
    """
    grouped = rewards.unflatten(0, (-1, group_size))
    most = grouped.nan_to_num(-math.inf).amax(dim=1)
    least = grouped.nan_to_num(math.inf).amin(dim=1)
    rounding = 4 * torch.finfo(rewards.dtype).eps * torch.maximum(most.abs(), least.abs())
    # A group without any known reward has most < least.
    return ((most <= least) | (most - least <= rounding)).all(dim=1).repeat_interleave(group_size)


def draw_rollouts(gate: Tensor, group_size: int, limit: int, generator: torch.Generator) -> Tensor:
    """Draw at most `limit` gated-in rollouts of each group, uniformly, and weight them for those left out.

    gate: bool [B], B a multiple of group_size; the rollouts of a group stand side by side. Returns float32 [B]: k / m
    for the m rollouts drawn among a group's k, 0 for all others. A sum over rollouts with these weights has the sum
    over all gated-in ones as its expectation. Raises ValueError if B is no multiple of group_size or limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, but is {limit}")
    if len(gate) % group_size:
        raise ValueError(f"gate has {len(gate)} rollouts, which is no multiple of group_size = {group_size}")
    weights = gate.float().cpu()
    for group in weights.view(-1, group_size):
        gated = group.nonzero().squeeze(1)
        if len(gated) > limit:
            kept = gated[torch.randperm(len(gated), generator=generator)[:limit]]
            group.zero_()
            group[kept] = len(gated) / limit
    return weights.to(gate.device)
