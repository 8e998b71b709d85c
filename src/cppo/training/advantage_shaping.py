"""The sink 'advantage': perception tokens alone keep their rollout's advantage, weighted by its dependency (VPPO)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cppo.perception import advantage_scale, rollout_dependency
from cppo.training.perception_term import Detection
from cppo.training.view_scoring import ViewRequest


def shape_advantages(
    micro_batches: Sequence[dict[str, Any]],
    detections: Sequence[tuple[ViewRequest, Detection | None]],
    floor: float,
    gather: Callable[[Tensor], Tensor],
    rank: int,
) -> Tensor:
    """Replace the advantages [B] of micro-batches by those of their tokens, [B, T] (VPPO, arXiv 2510.09285).

    A rollout without views keeps its advantage at every token.

    Args:
        micro_batches: of this process, changed in place.
        detections: of each, what was asked for and found.
        floor: smallest weight of a rollout.
        gather: concatenates a tensor over the processes, in the order of their ranks; all rollouts are compared.
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
    everyones = gather(mine)
    known = ~everyones.isnan()
    scale = torch.ones_like(everyones)
    scale[known] = advantage_scale(everyones[known], floor)
    own_scale = scale[rank * len(mine) : (rank + 1) * len(mine)].split([len(part) for part in dependencies])
    for inputs, (request, detection), weights in zip(micro_batches, detections, own_scale, strict=True):
        advantages = inputs["advantages"][:, None].repeat(1, inputs["completion_ids"].shape[1])
        if detection is not None:
            rows = request.rows
            advantages[rows] = advantages[rows] * weights[rows][:, None] * detection.token_mask
        inputs["advantages"] = advantages
    return mine
