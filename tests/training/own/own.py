"""Scores, selectors and sinks of a user, right ones first, then one for each mistake."""

import sys

import torch

from cppo.perception import advantage_shaping, needs

LIMIT = 3


def lost(anchor, removing):
    return anchor.logps - removing.logps + 0.1 * (removing.entropies - anchor.entropies)


@needs("kl", "js")
def both(anchor, removing):
    return removing.exact["kl"] + 2 * removing.exact["js"]


@needs("logits")
def variation(logits, removing):
    return (logits.softmax(-1) - removing.softmax(-1)).abs().sum(-1)


@needs("hidden_states")
def moved(anchor, removing):
    return (anchor.hidden_states - removing.hidden_states).norm(dim=-1)


def above_half(score, response_mask, top_fraction, **_):
    best = score.masked_fill(~response_mask, 0).amax(dim=1, keepdim=True)
    return response_mask & (score > 0.5 * best)


@needs("draws")
def lottery(score, response_mask, top_fraction, *, draws, **_):
    return response_mask & (draws < top_fraction)


def hinge(scores, options):
    return (1 + scores.d_preserving - scores.d_removing).relu() + scores.removing.entropies


@needs("hidden_states")
def near(scores, options):
    return 1 - torch.cosine_similarity(scores.anchor.hidden_states, scores.preserving.hidden_states, dim=-1)


@advantage_shaping
def softened(scores, advantages, options):
    return advantages[:, None] * torch.sigmoid(scores.score)


@advantage_shaping
@needs("hidden_states", "rollout_weights")
def moved_most(scores, advantages, options):
    return advantages[:, None] + 0.1 * scores.anchor.hidden_states.norm(dim=-1) * scores.token_mask


def alone(anchor):
    return anchor.logps


def flat(anchor, removing):
    return anchor.logps.mean(dim=1)


def counted(anchor, removing):
    return anchor.logps.long()


def listed(anchor, removing):
    return anchor.logps.tolist()


def undefined(anchor, removing):
    return (anchor.logps * 0).log()


def undeclared(anchor, removing):
    return anchor.hidden_states.norm(dim=-1)


@needs("attention")
def unknown_need(anchor, removing):
    return anchor.logps


def drawn(anchor, removing):
    return torch.rand_like(anchor.logps)


def leaves(anchor, removing):
    sys.exit(3)


def everything(score, response_mask, top_fraction, **_):
    return torch.ones_like(response_mask)


def padded(score, response_mask, top_fraction, **_):
    return response_mask & (score > score.mean(dim=1, keepdim=True))


def undrawn(score, response_mask, top_fraction, *, draws, **_):
    return response_mask & (draws < top_fraction)


def weights(score, response_mask, top_fraction, **_):
    return score


def narrow(score, response_mask, top_fraction):
    return response_mask


def constant(scores, options):
    return scores.d_removing.detach()


def steep(scores, options):
    return (scores.d_removing - scores.d_removing.detach()).sqrt()


@advantage_shaping
def a_rollout(scores, advantages, options):
    return advantages


@needs("logits")
def three(anchor, removing, logits, removing_logits):
    return logits[:, 0]


@needs("logits", "js")
def logits_and_js(logits, removing_logits):
    return logits[:, 0]


def undeclared_logits(anchor, removing):
    return anchor.logits.amax(dim=-1)


def undeclared_kl(anchor, removing):
    return removing.exact["kl"]


def undeclared_mask(anchor, removing, response_mask):
    return anchor.logps * response_mask


def undeclared_layer(anchor, removing):
    return anchor.similarities["last_layer"]


def undeclared_advantages(scores, options):
    return scores.advantages[:, None] * scores.anchor.logps


def mistaken(anchor, removing):
    return anchor.logps * removing.logits_of_js["kl"]


def clamped(anchor, removing):
    return removing.entropies - anchor.logps.clamp_(min=-1.0)


def filled(score, response_mask, top_fraction, **_):
    return score.masked_fill_(~response_mask, 0.0) > 0.5
