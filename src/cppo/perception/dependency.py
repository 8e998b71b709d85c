"""How much a response token depends on the image: scores without gradient, and entropies, in nats.

A token whose score is high under an information-removing view is taken for a perception token. The exact
divergences of `divergence.py` serve as scores too. float32 accumulation, float64 kept.
"""

import torch
from torch import Tensor

from cppo.perception.divergence import log_distribution, to_accumulation_dtype

ENTROPY_EPSILON = 1e-6


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Exact entropy of softmax(logits) over the vocabulary, in nats; differentiable.

    logits: [B, T, V] (any leading shape), already divided by the sampling temperature. Returns [B, T],
    float32 (float64 kept). A banned token (-inf) adds nothing, in value and in gradient. Raises ValueError
    without a vocabulary dimension.
    """
    (logits,) = to_accumulation_dtype(logits=logits)
    log_p = log_distribution("logits", logits)
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(dim=-1)


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
