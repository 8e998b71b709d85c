"""Scoring before an update: tokens or advantages that a method needs first, and views that are scored only once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cppo.perception import SCORES, Everyone, ResponseScores, ViewScores, select_together, shape_advantages, views_of
from cppo.training.micro_batch import Rollouts, ViewRequest, response_mask
from cppo.training.scoring import Scorer, idle_pass, plain_rows, score_under_views


def join_scores(parts: Sequence[ResponseScores]) -> ResponseScores:
    """The scores of all rows, joined from chunks of rows; without logits where there are several chunks."""
    if len(parts) == 1:
        return parts[0]
    losses = [part.aux_loss for part in parts if part.aux_loss is not None]
    return ResponseScores(
        torch.cat([part.logps for part in parts]),
        torch.cat([part.entropies for part in parts]),
        None,
        torch.stack(losses).mean() if losses else None,
    )


@torch.no_grad()
def detect_tokens(scorer: Scorer, model: Any, rollouts: Rollouts, request: ViewRequest) -> ViewScores | None:
    """Scores and perception tokens of a micro-batch's gated-in rollouts, from only the views that the score compares;
    None if there are no such rollouts. All ranks run the same number of passes.
    """
    if not request.rollouts:
        idle_pass(scorer, model, rollouts)
        return None
    compared = views_of(SCORES[scorer.args.perception_score])
    kinds = tuple(kind for kind in request.kinds if kind in compared)
    return score_under_views(scorer, model, rollouts.pick(request.rollouts), request.alone(kinds))[1]


@torch.no_grad()
def scores_of_views(scorer: Scorer, model: Any, rollouts: Rollouts, request: ViewRequest) -> dict[str, ResponseScores]:
    """Scores of the gated-in rollouts under each requested view, without the image; equal passes on all ranks."""
    found: dict[str, ResponseScores] = {}
    own, alone = rollouts.pick(request.rollouts) if request.rollouts else rollouts, request.alone(request.kinds)
    for kind in request.kinds:
        if not request.rollouts:
            idle_pass(scorer, model, rollouts)
        elif own.group_ids is None:
            found[kind] = scorer.score(model, plain_rows(scorer.policy, rollouts, replace(request, kinds=(kind,))))
        else:
            images = [alone.view_inputs(rollout, kind, own.images[rollout]) for rollout in alone.rollouts]
            found[kind] = scorer.score(model, replace(own, group_ids=alone.view_keys, images=images))
    return found


@torch.no_grad()
def shaped_advantages(
    micro_batches: Sequence[dict[str, Any]],
    detect: Callable[[dict[str, Any]], tuple[list[int], ViewScores | None]],
    options: Any,
    accumulation: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Shape the advantages of a new generation batch, in its micro-batches, by the scores of its tokens.

    Args:
        detect: scores a micro-batch: the scored rows, and their scores.
        options: the configuration, with the current weights.
        accumulation: micro-batches of an optimizer step.

    Returns:
        Metrics to log: the selected share of the tokens and the mean score of the rollouts, over all processes.
    """
    found = [detect(inputs) for inputs in micro_batches]
    if options.perception_selector_scope == "batch":
        known = [scores for _, scores in found if scores is not None]
        again = iter(select_together(known, options, partial(_gather_ragged, accelerator), accelerator.process_index))
        found = [(rows, None if scores is None else next(again)) for rows, scores in found]
    counts = torch.zeros(4, device=accelerator.device)
    for inputs, (rows, scores) in zip(micro_batches, found, strict=True):
        if scores is not None and scores.token_mask is not None:
            inputs["perception_detected"] = (rows, scores.score, scores.token_mask)
            counts[:2] += torch.stack([scores.token_mask.sum(), scores.response_mask.bool().sum()])
        del inputs["perception_views"]  # the loss does not need them
    shaped, dependency = shape_advantages(
        [inputs["advantages"] for inputs in micro_batches],
        found,
        [torch.tensor(inputs["group_id"]) for inputs in micro_batches],
        [response_mask(inputs) for inputs in micro_batches],
        options,
        accumulation,
        Everyone(accelerator.gather, accelerator.process_index),
    )
    for inputs, advantages in zip(micro_batches, shaped, strict=True):
        inputs["advantages"] = advantages
    counts[2:] = torch.stack([dependency.nansum(), (~dependency.isnan()).sum()])
    selected, tokens, total, rollouts = accelerator.reduce(counts, "sum").tolist()
    return {
        "perception/selected_fraction": selected / tokens if tokens else math.nan,
        "perception/dependency": total / rollouts if rollouts else math.nan,
    }


def _gather_ragged(accelerator: Accelerator, values: Tensor) -> list[Tensor]:
    """The tensors of all processes, [k, N'] each, in rank order; this process's is [k, N]."""
    values = values.to(accelerator.device)
    lengths = accelerator.gather(torch.tensor([values.shape[1]], device=values.device)).tolist()
    padded = torch.nn.functional.pad(values, (0, max(lengths) - values.shape[1]))
    parts = accelerator.gather(padded[None])
    return [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
