"""How far apart two next-token distributions are, token by token: k1, k3, KL and JS, in nats.

Source: "CPPO: Contrastive Perception for Vision Language Policy Optimization" (arXiv 2601.00501). The
published implementation uses an estimate on the sampled token, k3 in its synchronous and k1 in its
asynchronous variant; the paper's text speaks of the token distribution, for which the exact divergences
over the vocabulary stand here as well.

All functions accept bfloat16 or float16, compute and return float32, and keep float64. Gradients flow through
both arguments. Distributions at a sampling temperature: divide the logits by it first.
"""

import math

import torch
from torch import Tensor

K1_LIMIT = 10.0
K3_LOG_RATIO_LIMIT = 20.0
K3_VALUE_LIMIT = 10.0


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


def log_distribution(name: str, logits: Tensor) -> Tensor:
    """`log_softmax` over the last dimension, which must not be empty; -inf marks a banned token."""
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have a vocabulary dimension at the end, but its shape is {tuple(logits.shape)}")
    return torch.log_softmax(logits, dim=-1)


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


def k1_divergence(logps: Tensor, view_logps: Tensor) -> Tensor:
    """The k1 estimate on the sampled token: `logp - view_logp`, clamped to [-10, 10].

    Its mean over tokens that the anchor samples is KL(anchor || view); a single value may be negative. In a difference
    of two views, `k1(p, I+) - k1(p, I-)`, the anchor cancels, in value and in gradient, unless a clamp acts.

    logps, view_logps: [B, T] (any one shape), nats. Returns the same shape. Raises ValueError on unequal
    shapes. Two equal log-probabilities give exactly 0, two of -inf (a banned token) too.
    """
    logps, view_logps = to_accumulation_dtype(logps=logps, view_logps=view_logps)
    banned = logps.isneginf() & view_logps.isneginf()  # -inf - (-inf) is NaN
    return (logps - view_logps).masked_fill(banned, 0.0).clamp(-K1_LIMIT, K1_LIMIT)


def kl_divergence(logits: Tensor, view_logits: Tensor) -> Tensor:
    """Exact KL(softmax(logits) || softmax(view_logits)) over the vocabulary: sum of p (log p - log q), nats.

    logits, view_logits: [B, T, V] (any leading shape). Returns [B, T]. A token banned (-inf) in the anchor
    adds nothing; one banned in the view alone makes the divergence +inf, as the definition says. Rounding may
    leave a value of about 1e-7 below zero. Raises ValueError on unequal shapes.
    """
    logits, view_logits = to_accumulation_dtype(logits=logits, view_logits=view_logits)
    return _relative_entropy(log_distribution("logits", logits), log_distribution("view_logits", view_logits))


def js_divergence(logits: Tensor, view_logits: Tensor) -> Tensor:
    """Exact Jensen-Shannon divergence over the vocabulary: half of KL(p || m) + KL(q || m), m = (p + q) / 2.

    logits, view_logits: [B, T, V] (any leading shape). Returns [B, T], nats, symmetric, between 0 and ln 2
    up to rounding, and finite whatever tokens are banned (-inf) on either side. Raises ValueError on unequal
    shapes.
    """
    logits, view_logits = to_accumulation_dtype(logits=logits, view_logits=view_logits)
    log_p = log_distribution("logits", logits)
    log_q = log_distribution("view_logits", view_logits)
    # logaddexp(-inf, -inf) has a NaN gradient; any value will do there, both probabilities are zero.
    banned_in_both = log_p.isneginf() & log_q.isneginf()
    log_mixture = torch.logaddexp(log_p.masked_fill(banned_in_both, 0.0), log_q.masked_fill(banned_in_both, 0.0))
    log_mixture = log_mixture - math.log(2.0)
    return 0.5 * (_relative_entropy(log_p, log_mixture) + _relative_entropy(log_q, log_mixture))


EXACT_DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}
"""Those that need whole distributions, by name."""


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the last dimension, where 0 (log 0 - x) is 0 in value and in gradient."""
    log_ratio = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * log_ratio).sum(dim=-1)
