"""Cosines between the hidden states of response tokens and of image tokens (PEPO, VGPO).

`cppo.policy.similarity` computes them layer by layer during a pass, so that no hidden states are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

SIMILARITIES = frozenset({"last_layer", "all_layers"})
"""Inputs that a score may need, by name: cosine of the last hidden state with the mean of the image tokens' (VGPO,
arXiv 2604.09349); mean cosine with each of them over all layers (PEPO, arXiv 2603.22847).
"""
CHUNK = 4096
"""Number of tokens whose hidden states are converted to float32 at a time."""


@dataclass(frozen=True)
class Owners:
    """Which prompt each token of a pass belongs to.

    Attributes:
        of_prompts: the prompt of each of m prompt tokens, [m].
        images: 1 for image tokens, else 0, [m].
        of_responses: the prompt that each of n response tokens answers, [n].
        count: number of prompts.
    """

    of_prompts: Tensor
    images: Tensor
    of_responses: Tensor
    count: int


@torch.no_grad()
def mean_cosine(prompts: Tensor, responses: Tensor, owners: Owners) -> Tensor:
    """Mean cosine of each response token's hidden state with those of its prompt's image tokens, [n]; 0 without any.

    prompts: hidden states of the m tokens, [m, H]. responses: of the n response tokens, [n, H]. Computes in float32;
    keeps float64.
    """
    return _products(responses, _image_means(prompts, owners, unit=True), owners)


@torch.no_grad()
def cosine_to_mean(prompts: Tensor, responses: Tensor, owners: Owners) -> Tensor:
    """Cosine of each response token's hidden state with the mean of its prompt's image tokens', [n]; 0 without any."""
    return _products(responses, normalize(_image_means(prompts, owners, unit=False), dim=-1), owners)


@torch.no_grad()
def of_the_tokens_themselves(predicting: Tensor, attended: Tensor) -> Tensor:
    """Move values from the positions that predict the response tokens to the tokens' own positions, [B, T].

    A token's own position predicts the next token. No pass covers the last token of a response; it keeps the value of
    the position that predicts it.

    predicting: [B, T]. attended: 1 for the tokens of the response, [B, T].
    """
    after = torch.cat([predicting[:, 1:], predicting[:, -1:]], dim=1)
    has_after = torch.cat([attended[:, 1:].bool(), torch.zeros_like(attended[:, :1], dtype=torch.bool)], dim=1)
    return torch.where(has_after, after, predicting)


def _image_means(prompts: Tensor, owners: Owners, unit: bool) -> Tensor:
    """Mean hidden state of each prompt's image tokens, normalized before the mean if `unit`, [count, H]."""
    dtype = torch.promote_types(prompts.dtype, torch.float32)
    sums = prompts.new_zeros((owners.count, prompts.shape[1]), dtype=dtype)
    for hidden, group, image in zip(
        *(part.split(CHUNK) for part in (prompts, owners.of_prompts, owners.images)), strict=True
    ):
        hidden = hidden.to(dtype)
        sums.index_add_(0, group, (normalize(hidden, dim=-1) if unit else hidden) * image[:, None].to(dtype))
    counts = sums.new_zeros(owners.count).index_add_(0, owners.of_prompts, owners.images.to(dtype))
    return sums / counts.clamp(min=1)[:, None]


def _products(responses: Tensor, means: Tensor, owners: Owners) -> Tensor:
    """Dot product of each response token's normalized hidden state with its prompt's vector, [n]."""
    parts = zip(responses.split(CHUNK), owners.of_responses.split(CHUNK), strict=True)
    products = [(normalize(hidden.to(means.dtype), dim=-1) * means[group]).sum(dim=-1) for hidden, group in parts]
    return torch.cat(products)
