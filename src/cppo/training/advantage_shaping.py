"""Sinks that shape the advantages: perception tokens alone keep their rollout's, weighted by its dependency (VPPO), or
every token's is weighted by its own (PGPO).
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cppo.perception import advantage_scale, rollout_dependency, token_advantage_weights
from cppo.training.perception_term import Detection
from cppo.training.view_scoring import ViewRequest

if TYPE_CHECKING:
    from cppo.training.config import CPPOConfig


def shape_advantages(
    micro_batches: Sequence[dict[str, Any]],
    detections: Sequence[tuple[ViewRequest, Detection | None]],
    args: "CPPOConfig",
    accumulation: int,
    gather: Callable[[Tensor], Tensor],
    rank: int,
) -> Tensor:
    """Replace the advantages [B] of micro-batches by those of their tokens, [B, T], as `args.perception_sink` says.

    A rollout without views keeps its advantage at every token.

    Args:
        micro_batches: of this process, changed in place.
        detections: of each, what was asked for and found.
        args: the options `perception_*`.
        accumulation: micro-batches of an optimizer step.
        gather: concatenates a tensor over the processes, in the order of their ranks.
        rank: of this process.

    Returns:
        Mean score of this process's rollouts, NaN for those without views, in the order of the micro-batches.
    """
    dependencies = []
    for inputs, (request, detection) in zip(micro_batches, detections, strict=True):
        dependency = torch.full_like(inputs["advantages"], math.nan)
        if detection is not None:
            dependency[request.rows] = rollout_dependency(detection.score, request.response_mask).to(dependency)
        dependencies.append(dependency)
    mine = torch.cat(dependencies)
    floor = args.perception_advantage_floor
    if args.perception_sink != "mask_advantage":
        scales = [torch.ones_like(part) for part in dependencies]
    elif args.perception_advantage_scope == "batch":
        everyones = gather(mine)
        own = _scale(everyones, floor, everyones)[rank * len(mine) : (rank + 1) * len(mine)]
        scales = list(own.split([len(part) for part in dependencies]))
    else:
        steps = [dependencies[first : first + accumulation] for first in range(0, len(dependencies), accumulation)]
        scales = [_scale(part, floor, torch.cat(step)) for step in steps for part in step]
    for inputs, (request, detection), own in zip(micro_batches, detections, scales, strict=True):
        advantages = inputs["advantages"][:, None].repeat(1, inputs["completion_ids"].shape[1])
        if detection is not None:
            rows = request.rows
            advantages[rows] *= own[rows][:, None] * _token_factors(detection, request, args).to(advantages)
        inputs["advantages"] = advantages
    return mine


def _scale(dependency: Tensor, floor: float, compared: Tensor) -> Tensor:
    """`advantage_scale` of rollouts, [B], some of which are without views (NaN) and keep their advantage."""
    known = ~dependency.isnan()
    scale = torch.ones_like(dependency)
    scale[known] = advantage_scale(dependency[known], floor, compared[~compared.isnan()])
    return scale


def _token_factors(detection: Detection, request: ViewRequest, args: "CPPOConfig") -> Tensor:
    """What multiplies the advantage at each token of the requested rows, [n, T]."""
    if args.perception_sink == "mask_advantage":
        return detection.token_mask
    return token_advantage_weights(
        detection.score, request.response_mask, args.perception_weight_threshold, args.perception_weight_slope
    )
