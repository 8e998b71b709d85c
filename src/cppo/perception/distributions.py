"""Exact divergences and entropies of full next-token distributions, in nats.

All functions accept bfloat16 or float16, compute and return float32, and keep float64. Gradients flow through every
argument.
"""

import math

import torch
from torch import Tensor


def log_distributions(**logits: Tensor) -> tuple[Tensor, ...]:
    """`log_softmax` of each over the last dimension in float32, or float64 if any is; -inf marks a banned token.

    Raises ValueError that names logits with a non-floating dtype, a shape unlike the first, or no vocabulary dimension.
    """
    shape, dtype = next(iter(logits.values())).shape, torch.float32
    for name, tensor in logits.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of logits, {tuple(shape)}, but has {tuple(tensor.shape)}")
        if not (tensor.is_floating_point() and shape and shape[-1]):
            raise ValueError(
                f"{name} must have a floating-point dtype and a vocabulary dimension at the end, but has shape "
                f"{tuple(shape)} and {tensor.dtype}"
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(torch.log_softmax(tensor.to(dtype), dim=-1) for tensor in logits.values())


def kl_divergence(logits: Tensor, view_logits: Tensor) -> Tensor:
    """Exact KL(softmax(logits) || softmax(view_logits)) over the vocabulary: sum of p (log p - log q), nats.

    logits, view_logits: [B, T, V] (any leading shape). Returns [B, T]. A token banned (-inf) in the anchor adds
    nothing; a token banned only in the view makes the divergence +inf, as defined. Rounding may leave about 1e-7 below
    zero. Raises ValueError on unequal shapes.
    """
    return _relative_entropy(*log_distributions(logits=logits, view_logits=view_logits))


def js_divergence(logits: Tensor, view_logits: Tensor) -> Tensor:
    """Exact Jensen-Shannon divergence over the vocabulary: half of KL(p || m) + KL(q || m), m = (p + q) / 2.

    logits, view_logits: [B, T, V] (any leading shape). Returns [B, T], nats, symmetric, between 0 and ln 2 up to
    rounding, and finite for any banned tokens (-inf). Raises ValueError on unequal shapes.
    """
    log_p, log_q = log_distributions(logits=logits, view_logits=view_logits)
    # logaddexp(-inf, -inf) has a NaN gradient; any finite value works here, both probabilities are zero.
    banned_in_both = log_p.isneginf() & log_q.isneginf()
    log_mixture = torch.logaddexp(log_p.masked_fill(banned_in_both, 0.0), log_q.masked_fill(banned_in_both, 0.0))
    log_mixture = log_mixture - math.log(2.0)
    return 0.5 * (_relative_entropy(log_p, log_mixture) + _relative_entropy(log_q, log_mixture))


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the last dimension; 0 (log 0 - x) is 0 in value and gradient."""
    log_ratio = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * log_ratio).sum(dim=-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Exact entropy of softmax(logits) over the vocabulary, in nats; differentiable.

    logits: [B, T, V] (any leading shape), already divided by the sampling temperature. Returns [B, T], float32 (float64
    kept). A banned token (-inf) adds nothing to value or gradient. Raises ValueError without a vocabulary dimension.
    """
    (log_p,) = log_distributions(logits=logits)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(dim=-1)


def nucleus_entropy(logits: Tensor, mass: float) -> Tensor:
    """Entropy of softmax(logits) cut to its nucleus and renormalized, in nats: the distribution that `top_p` sampling
    uses.

    The nucleus is the smallest set of most probable tokens with total probability of at least `mass`. The sort orders
    equally probable tokens. With mass 1 the result is `entropy_from_logits`.

    logits: [B, T, V] (any leading shape), already divided by the sampling temperature. Returns [B, T], float32 (float64
    kept). Raises ValueError on a mass outside (0, 1] or without a vocabulary dimension.
    """
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"mass must lie in (0, 1], but is {mass}")
    if mass == 1.0:
        return entropy_from_logits(logits)
    (log_p,) = log_distributions(logits=logits)
    log_p = log_p.sort(dim=-1, descending=True).values
    before = log_p.exp().cumsum(dim=-1) - log_p.exp()
    return entropy_from_logits(log_p.masked_fill(before >= mass, -math.inf))


EXACT_DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}
"""Exact divergences by name."""
