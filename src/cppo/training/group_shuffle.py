"""Shuffle a generation batch by groups, so that a micro-batch can share prompts and images over its rollouts."""

from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor

from cppo.policy.vision_inputs import split_rows
from cppo.trl_surface import split_tensor_dict, unsplit_pixel_values_by_grid


def shuffled_micro_batches(batch: dict[str, Any], group_size: int, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Put the groups of a generation batch in random order and cut it into `count` micro-batches.

    The rollouts of a group stay side by side, also where a cut goes through the group. TRL shuffles rollout by rollout,
    which scatters a group over the micro-batches of a step.

    Args:
        batch: this process's part of a generation batch; the G rollouts of a prompt stand side by side.
        group_size: G; 1 shuffles row by row, in TRL's order.
        count: micro-batches of equal size.
        first: the place of the part's first row in the whole batch: groups begin at the multiples of G there.
    """
    by_row = split_rows(batch)
    group = (first % group_size + torch.arange(len(by_row["prompt_ids"]))) // group_size
    rank = torch.randperm(int(group[-1]) + 1).argsort()
    order = rank[group].argsort(stable=True)
    shuffled = {key: _reordered(value, order) for key, value in by_row.items()}
    parts = cast("list[dict[str, Any]]", split_tensor_dict(shuffled, count))
    return [unsplit_pixel_values_by_grid(part) for part in parts]


def rollouts_a_pass(rows: int, group_size: int, micro_batch: int) -> Fraction:
    """Rollouts that share each pass over a prompt and its images, on average over `rows` rollouts of whole groups.

    Args:
        rows: of a process's part of a generation batch.
        group_size: G.
        micro_batch: rollouts of a micro-batch; where it is no multiple of G, cuts go through groups.
    """
    return Fraction(rows, len({(row // group_size, row // micro_batch) for row in range(rows)}))


def _reordered(value: Any, order: Tensor) -> Any:
    """One entry a row, or a scalar of the whole batch, or None."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value[order]
    return None if value is None else [value[row] for row in order.tolist()]
