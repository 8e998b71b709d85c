"""Rows for the plain scorer and TRL's kernel, which do not share prompts: one per rollout and view."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cppo.policy import concatenate_rows
from cppo.policy.inside import INSIDE_KEYS
from cppo.policy.inside_rows import rows_inside
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs, slice_rows

if TYPE_CHECKING:
    from cppo.training.scoring import Rollouts, ViewRequest


def plain_rows(policy: Any, rollouts: "Rollouts", request: "ViewRequest", with_images: bool = False) -> "Rollouts":
    """The requested rollouts under each view, kind by kind; `with_images` puts all rollouts under the image first."""
    ids, mask, length = rollouts.input_ids, rollouts.attention_mask, rollouts.num_response_tokens
    parts = [view_images(request, rollout, kind, rollouts) for kind in request.kinds for rollout in request.rollouts]
    ids, mask = (
        torch.cat([rows] * with_images + [rows[request.rollouts]] * len(request.kinds)) for rows in (ids, mask)
    )
    if not any(part.keys() & INSIDE_KEYS for part in parts):
        vision = concatenate_rows([rollouts.vision] * with_images + parts)
        return replace(rollouts, input_ids=ids, attention_mask=mask, vision=vision)
    if with_images:
        parts = [slice_rows(rollouts.vision, row, row + 1) for row in range(len(rollouts.input_ids))] + parts
    made = rows_inside(policy, ids, mask, length, parts)
    return replace(
        rollouts,
        input_ids=made.input_ids,
        attention_mask=made.attention_mask,
        vision=made.vision,
        more_inputs=made.inputs,
    )


def view_images(request: "ViewRequest", row: int, kind: str, rollouts: "Rollouts") -> VisionInputs:
    """Image inputs of one requested row under one view, for rows that are not packed."""
    vision = rollouts.vision
    if request.views[row][kind].keys() & INSIDE_KEYS:
        return {**slice_rows(vision, row, row + 1), **request.views[row][kind]}
    own = {key: value[row : row + 1] if key in PER_TOKEN_KEYS else value for key, value in vision.items()}
    device = rollouts.input_ids.device
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in request.view_inputs(row, kind, own).items()
    }
