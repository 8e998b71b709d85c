"""Shuffle a generation batch by whole groups, so that a micro-batch can share prompts and images over its rollouts."""

from typing import Any, cast

import torch
from torch import Tensor
from trl.trainer.utils import split_tensor_dict, unsplit_pixel_values_by_grid

from cppo.policy.vision_inputs import split_rows


def shuffled_micro_batches(batch: dict[str, Any], group_size: int, count: int) -> list[dict[str, Any]]:
    """Put the groups of a generation batch in random order and cut it into `count` micro-batches.

    TRL shuffles rollout by rollout, which scatters a group over the micro-batches of a step.

    Args:
        batch: what `_generate_and_score_completions` returns; the G rollouts of a prompt stand side by side.
        group_size: G; 1 shuffles row by row, in TRL's order. If the rows are no multiple of it, no group is whole, and
            rows are shuffled one by one too.
        count: micro-batches of equal size.
    """
    by_row = split_rows(batch)
    rows = len(by_row["prompt_ids"])
    size = group_size if rows % group_size == 0 else 1
    order = torch.randperm(rows // size).repeat_interleave(size) * size + torch.arange(size).repeat(rows // size)
    shuffled = {key: _reordered(value, order) for key, value in by_row.items()}
    parts = cast("list[dict[str, Any]]", split_tensor_dict(shuffled, count))
    return [unsplit_pixel_values_by_grid(part) for part in parts]


def _reordered(value: Any, order: Tensor) -> Any:
    """One entry a row, or a scalar of the whole batch, or None."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value[order]
    return None if value is None else [value[row] for row in order.tolist()]
