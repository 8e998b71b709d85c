"""Scores of methods other than CPPO, in the registry `SCORES`.

Scores without a second pass: of the sampled token, and of hidden states near those of the image. Scores that fuse
several signals: VEPO's, and robust dependency.
"""

import math

import torch
from torch import Tensor

from cppo.perception.detection import SCORES, named, needs, to_accumulation_dtype, under
from cppo.perception.responses import ResponseScores
from cppo.perception.shaping import scaled

SHIFT_EPSILON = 1e-6


@named(SCORES, "sampled_surprisal")
@under()
def sampled_surprisal(anchor: ResponseScores) -> Tensor:
    """-log p of the sampled token, [B, T], nats. Its mean over samples is the entropy."""
    return -anchor.logps


@named(SCORES, "sampled_entropy")
@under()
def sampled_entropy(anchor: ResponseScores) -> Tensor:
    """-p log p of the sampled token, [B, T], nats: its term in the entropy, at most 1/e.

    MSSR's code (arXiv 2512.18215) uses it as the entropy.
    """
    return -anchor.logps.exp() * anchor.logps.clamp(min=torch.finfo(anchor.logps.dtype).min)


@named(SCORES, "logp_difference")
def logp_difference(anchor: ResponseScores, removing: ResponseScores) -> Tensor:
    """|log p - log p(I-)| of the sampled token, [B, T], nats (ToR, arXiv 2603.25077)."""
    logps, view_logps = to_accumulation_dtype(logps=anchor.logps, view_logps=removing.logps)
    return (logps - view_logps).abs()


@named(SCORES, "logp_difference_relative")
def logp_difference_relative(anchor: ResponseScores, removing: ResponseScores) -> Tensor:
    """|log p - log p(I-)| as a fraction of the larger surprisal, [B, T], at most 1 (ours)."""
    return logp_difference(anchor, removing) / (-torch.minimum(anchor.logps, removing.logps) + SHIFT_EPSILON)


@named(SCORES, "image_cosine")
@under()
@needs("last_layer")
def image_cosine(anchor: ResponseScores) -> Tensor:
    """Cosine of the token's last hidden state with the mean of the image tokens', [B, T]; 0 without an image."""
    return anchor.similarities["last_layer"]


@named(SCORES, "image_cosine_layers")
@under()
@needs("all_layers")
def image_cosine_layers(anchor: ResponseScores) -> Tensor:
    """Mean cosine of the token's hidden states with the image tokens', over image tokens and layers, [B, T] (PEPO)."""
    return anchor.similarities["all_layers"]


@named(SCORES, "image_focus")
@under()
@needs("last_layer", "response_mask")
def image_focus(anchor: ResponseScores, *, response_mask: Tensor) -> Tensor:
    """`compensated` on (1 + cosine) / 2 of the last hidden states, [B, T], in [0, 1.3] (VGPO, arXiv 2604.09349)."""
    return compensated((1.0 + anchor.similarities["last_layer"]) / 2.0, response_mask)


@torch.no_grad()
def compensated(
    score: Tensor, response_mask: Tensor, strength: float = 0.3, start: float = 0.5, top_fraction: float = 0.2
) -> Tensor:
    """The score with more weight on the best tokens late in a response: times `1 + strength t / (T - 1)`.

    t is a token's index among the T response tokens, from 0. Tokens from `floor(start T)` on are late. Among n
    late tokens the `max(1, floor(top_fraction n))` best get the factor, and all that tie with the last of these.

    score: at least 0, [B, T]. response_mask: [B, T]. Returns [B, T], 0 outside the mask. Source: VGPO (arXiv
    2604.09349, eq. 5 and 6). Its code makes scores non-negative by the minimum of a micro-batch, its paper by (1 +
    cosine) / 2.
    """
    mask_BT = response_mask.bool()
    place_BT = mask_BT.cumsum(dim=1) - 1
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    first_B1 = (start * length_B1 + 1e-4).floor()
    late_BT = mask_BT & (place_BT >= first_B1)
    count_B1 = (top_fraction * late_BT.sum(dim=1, keepdim=True) + 1e-4).floor().clamp(min=1)
    ordered_BT = score.masked_fill(~late_BT, -math.inf).sort(dim=1, descending=True).values
    least_B1 = ordered_BT.gather(1, count_B1.long() - 1)
    factor_BT = 1.0 + strength * place_BT.to(score) / (length_B1 - 1).clamp(min=1)
    best_BT = late_BT & (score >= least_B1)
    return torch.where(best_BT, score * factor_BT, score).masked_fill(~mask_BT, 0.0)


@named(SCORES, "anchored_entropy")
@needs("js", "response_mask")
def anchored_entropy(anchor: ResponseScores, removing: ResponseScores, *, response_mask: Tensor) -> Tensor:
    """VEPO's score: entropy of tokens whose distribution depends on the image (arXiv 2606.03937), [B, T], in [0, 1].

    `E (1 - (1 - J)^0.7 (1 - D)^0.3)`, each scaled to [0, 1] over the rollout: J is the Jensen-Shannon divergence from
    I-, D = |H - H(I-)|, E = H.
    """
    shift = (anchor.entropies - removing.entropies).abs()
    signals = (removing.exact["js"], shift, anchor.entropies)
    divergence, shift, entropy = (scaled(signal, response_mask) for signal in signals)
    return fused_entropy(divergence, shift, entropy)


def fused_entropy(divergence: Tensor, shift: Tensor, entropy: Tensor, weight: float = 0.7) -> Tensor:
    """`E (1 - (1 - J)^weight (1 - D)^(1 - weight))` of J, D and E in [0, 1], [B, T]: E where either signal is 1."""
    return entropy * (1.0 - (1.0 - divergence) ** weight * (1.0 - shift) ** (1.0 - weight))


@named(SCORES, "robust_dependency")
@under("removing", "preserving")
@needs("js")
def robust_dependency(anchor: ResponseScores, removing: ResponseScores, preserving: ResponseScores) -> Tensor:
    """High for a token that changes without the image's information and stays under a harmless change, [B, T], nats.

    `J(I-) (1 - J(I+) / ln 2)`, J the Jensen-Shannon divergence from the distribution under the image. It is J(I-) where
    I+ changes nothing, and 0 where I+ changes everything. Ours, after the robust visual dependency of PRPO (arXiv
    2606.08708); no published formula was found.
    """
    return removing.exact["js"] * (1.0 - preserving.exact["js"] / math.log(2.0))
