"""The user's own score, selector, loss term and advantage shaping, for the trainings of the two-process tests."""

import torch

from cppo.perception import advantage_shaping, needs


@needs("kl")
def lost(anchor, removing):
    return removing.exact["kl"] + anchor.logps - removing.logps


def above_mean(score, response_mask, top_fraction, **_):
    total = score.masked_fill(~response_mask, 0).sum(dim=1, keepdim=True)
    return response_mask & (score >= total / response_mask.sum(dim=1, keepdim=True))


@needs("hidden_states")
def turned(scores, options):
    return 1 - torch.cosine_similarity(scores.anchor.hidden_states, scores.removing.hidden_states, dim=-1)


@advantage_shaping
@needs("hidden_states")
def moved_most(scores, advantages, options):
    return advantages[:, None] + 0.1 * scores.anchor.hidden_states.norm(dim=-1) * scores.token_mask
