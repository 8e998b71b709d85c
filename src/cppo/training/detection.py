"""Scoring apart from the loss: before a step, to count its perception tokens or to shape its advantages by them, or of
new rollouts under their views, by the policy that made them.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cppo.methods import SHAPING_SINKS
from cppo.policy import concatenate_rows, slice_rows
from cppo.training.advantage_shaping import shape_advantages
from cppo.training.perception_term import Detection, perception_token_mask
from cppo.training.row_scorer import row_scorer
from cppo.training.shared_views import score_shared
from cppo.training.view_scoring import ViewRequest, idle_pass, model_inputs
from cppo.trl_surface import log_metric, next_micro_batches


@torch.no_grad()
def detect(trainer: Any, model: Any, request: ViewRequest, inputs: dict[str, Any]) -> Detection | None:
    """Scores and selected tokens of a buffered micro-batch's gated-in rollouts; None if it has none.

    All ranks make as many passes.
    """
    ids, mask, vision = model_inputs(inputs)
    length = request.response_mask.shape[1]
    if not request.rows:
        if trainer.accelerator.num_processes > 1:
            idle_pass(row_scorer(trainer, model, length, shares=trainer._shares_prompts), ids, mask, vision)
        return None
    kinds = tuple(kind for kind in request.kinds if kind == "removing")
    own = replace(request, views=dict(enumerate(request.views.values())), kinds=kinds)
    images = concatenate_rows([slice_rows(vision, row, row + 1) for row in request.rows])
    rows = ids[request.rows], mask[request.rows], images
    if trainer._shares_prompts:
        with trainer.accelerator.autocast():
            _, scores = score_shared(model, trainer.args, own, *rows)
    else:
        _, scores = own.score(row_scorer(trainer, model, length), *rows, view_gradients=True)
    assert scores is not None
    return perception_token_mask(trainer.args, scores)


def step_normalizer(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor | float:
    """What divides a micro-batch's sum, so that the micro-batches and ranks of a step add up to the step's mean."""
    steps = trainer.current_gradient_accumulation_steps
    if trainer.args.perception_normalization == "microbatch":
        return float(steps)
    # DDP averages the ranks' gradients, so each rank's sum counts num_processes times.
    ranks = trainer.accelerator.num_processes
    if trainer.args.perception_normalization == "rollout":
        # The rollouts counted are the generation batch's; one optimizer step trains on this share of them.
        return inputs["perception_num_rollouts"] * (steps / trainer.args.steps_per_generation) / ranks
    if trainer._step_tokens is None:
        trainer._step_tokens = count_step_tokens(trainer, model, steps)
    return trainer._step_tokens / ranks


def count_step_tokens(trainer: Any, model: Any, steps: int) -> Tensor:
    """Selected tokens of the `steps` micro-batches of the optimizer step that begins now, over all ranks."""
    count = torch.zeros((), device=trainer.accelerator.device)
    for inputs in next_micro_batches(trainer, steps):
        request = ViewRequest.of(inputs, trainer.args.scored_views)
        if trainer.args.perception_selector == "all":
            count += request.response_mask.sum()
            continue
        detection = detect(trainer, model, request, inputs)
        if detection is not None:
            count += detection.token_mask.sum()
    return trainer.accelerator.reduce(count, "sum")


def score_before_updates(trainer: Any, micro_batches: list[dict[str, Any]]) -> None:
    """What is to be known of a new generation batch before its first update; for most methods nothing."""
    args = trainer.args
    if args.perception_sink in SHAPING_SINKS:
        detect_and_shape(trainer, micro_batches)
    elif args.adds_perception_loss and args.perception_view_policy == "rollout":
        score_rollouts(trainer, micro_batches)


@torch.no_grad()
def score_rollouts(trainer: Any, micro_batches: list[dict[str, Any]]) -> None:
    """Score a new generation batch under its views, and keep the scores in the place of the views.

    All ranks make as many passes.
    """
    for inputs in micro_batches:
        request = ViewRequest.of(inputs, trainer.args.scored_views)
        ids, mask, vision = model_inputs(inputs)
        length = request.response_mask.shape[1]
        score = row_scorer(trainer, trainer.model_wrapped, length, shares=trainer._shares_prompts)
        scores = {}
        for kind in request.kinds:
            if request.rows:
                views = [request.view_inputs(row, kind, vision, ids.device) for row in request.rows]
                scores[kind] = score(ids[request.rows], mask[request.rows], concatenate_rows(views))
            elif trainer.accelerator.num_processes > 1:
                idle_pass(score, ids, mask, vision)
        request.keep_scores(inputs, scores)


def detect_and_shape(trainer: Any, micro_batches: list[dict[str, Any]]) -> None:
    """Sinks that shape advantages: detect in a new generation batch, and shape its advantages by the scores."""
    detections = []
    for inputs in micro_batches:
        request = ViewRequest.of(inputs, trainer.args.scored_views)
        detection = detect(trainer, trainer.model_wrapped, request, inputs)
        detections.append((request, detection))
        if detection is not None:
            inputs["perception_detected"] = (request.rows, *detection)
        del inputs["perception_views"]  # the loss has no use for them
    accelerator, args = trainer.accelerator, trainer.args
    dependency = shape_advantages(
        micro_batches,
        detections,
        args,
        trainer.current_gradient_accumulation_steps,
        accelerator.gather,
        accelerator.process_index,
    )

    counts = torch.zeros(4, device=accelerator.device)
    for request, detection in detections:
        if detection is not None:
            counts[:2] += torch.stack([detection.token_mask.sum(), request.response_mask.bool().sum()])
    counts[2:] = torch.stack([dependency.nansum(), (~dependency.isnan()).sum()])
    selected, tokens, total, rollouts = accelerator.reduce(counts, "sum").tolist()
    log_metric(trainer, "perception/selected_fraction", selected / tokens if tokens else math.nan)
    log_metric(trainer, "perception/dependency", total / rollouts if rollouts else math.nan)
