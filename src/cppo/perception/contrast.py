"""The contrastive perception loss (arXiv 2601.00501).

`softplus((d+ - d-) / tau)` is InfoNCE with one positive, one negative and the similarity -D:
`-log( exp(-d+/tau) / (exp(-d+/tau) + exp(-d-/tau)) )`. It is ln 2 where both divergences are equal.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cppo.perception.divergence import to_accumulation_dtype


def contrastive_perception_tokens(
    d_preserving: Tensor,
    d_removing: Tensor,
    temperature: float = 0.1,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The loss of every token, not yet reduced: `softplus((d_preserving - d_removing) / tau)`.

    d_preserving, d_removing: [B, T], divergence of the anchor from I+ and from I-, nats. token_mask: [B, T],
    bool or 0/1; outside it the value and the gradient are exactly 0, even where a divergence is NaN. Returns
    [B, T], float32 (float64 kept), in nats. Raises ValueError on unequal shapes or a temperature that is not
    positive and finite.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, but is {temperature}")
    d_preserving, d_removing = to_accumulation_dtype(d_preserving=d_preserving, d_removing=d_removing)
    margin = d_preserving - d_removing
    if token_mask is None:
        return -F.logsigmoid(-margin / temperature)
    outside = ~_as_selection(token_mask, margin)
    # Filled before and after: a gradient of 0 times the derivative at a NaN would be NaN.
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

    d_preserving, d_removing: [B, T], nats. token_mask: [B, T], the selected tokens. num_tokens: what to
    divide by, for example the selected tokens of the whole step over all ranks; default: the number selected
    here. Returns a scalar, float32 (float64 kept); a zero that still has a graph if no token is selected,
    whatever num_tokens says. Raises ValueError on unequal shapes, a temperature that is not positive and
    finite, or a negative num_tokens.
    """
    tokens = contrastive_perception_tokens(d_preserving, d_removing, temperature, token_mask)
    return token_mean_loss(tokens, token_mask, num_tokens)


def token_mean_loss(token_loss: Tensor, token_mask: Tensor, num_tokens: Tensor | float | None = None) -> Tensor:
    """Sum of `token_loss` over the selected tokens, divided by `num_tokens` (default: the number selected here).

    token_loss, token_mask: [B, T]; values outside the mask, NaN too, count for nothing. Returns a scalar, float32
    (float64 kept); a zero that still has a graph if no token is selected. Raises ValueError on unequal shapes or a
    negative num_tokens.
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

    With the gated-in rollouts of the whole step as `num_rollouts`, the parts of a step add up to the same
    number however it is cut into micro-batches and ranks.

    token_loss, token_mask: [B, T]. weights: of each rollout, [B], 1 if not given; with those of `draw_rollouts` the
    rollouts drawn estimate the sum over all without bias. A rollout without a selected token adds 0. Returns a
    scalar, float32 (float64 kept); a zero that still has a graph if no token is selected. Raises ValueError on
    unequal shapes or a negative num_rollouts.
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
    """The count as a tensor, with 1 in place of 0: nothing is selected then, and the sum it divides is 0."""
    if not isinstance(count, Tensor) and not 0 <= count < math.inf:
        raise ValueError(f"{name} must not be negative and must be finite, but is {count}")
    divisor = torch.as_tensor(count, dtype=like.dtype, device=like.device)
    return torch.where(divisor == 0, 1.0, divisor)
