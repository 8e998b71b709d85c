"""Views as additional rows: a gated-in rollout becomes adjacent rows, one under its image and one under each view.

verl's engines compute log-probabilities and entropies of rows, for any sharding, packing or pipelining. The loss then
finds a rollout under all its images in one micro-batch, because `force_group_size` keeps the rows of a group together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from cppo.verl.views import Pixels

ROLE = "cppo_role"
"""Batch entry: the role of each row, one of the numbers below, or 1 + the index of a view's kind."""
ANCHOR, LONE, FILLER = 0, -1, -2
"""A gated-in rollout under its image; any other rollout; a copy that fills a group and counts for nothing."""
MASKS = ("response_mask", "loss_mask")
"""Batch entries that are 0 where a row is not part of the RL loss."""


@dataclass(frozen=True)
class Layout:
    """The rows of a mini-batch with its views: the source rollout and the role of each."""

    sources: list[int]
    roles: list[int]


def count_groups(gate: Sequence[bool], size: int) -> int:
    """Number of groups of `size` rows: one per gated-in rollout, the others together."""
    gated = sum(gate)
    return gated - (gated - len(gate)) // size


def lay_out(gate: Sequence[bool], size: int, groups: int, filler: int) -> Layout:
    """The rows in `groups` groups of `size`: gated-in rollouts with their views, then all others, then copies.

    Args:
        gate: which rollouts are gated in.
        size: rows of a group: the image's and one per view.
        groups: at least `count_groups`.
        filler: the rollout that is copied.
    """
    gated = [row for row, passes in enumerate(gate) if passes]
    lone = [row for row, passes in enumerate(gate) if not passes]
    copies = groups * size - len(gated) * size - len(lone)
    sources = [row for row in gated for _ in range(size)] + lone + [filler] * copies
    return Layout(sources, [*range(size)] * len(gated) + [LONE] * len(lone) + [FILLER] * copies)


def with_views(
    data: TensorDict, layout: Layout, kinds: Sequence[str], views: Mapping[int, Mapping[str, Pixels]]
) -> TensorDict:
    """The batch in this layout; views' rows have their own pixels and are outside verl's own loss.

    Args:
        data: a rank's part of an optimizer step.
        layout: of its rows.
        kinds: of the views, in their order in a group.
        views: gated-in rollout -> the pixel inputs of each kind.
    """
    laid = tu.index_select_tensor_dict(data, layout.sources)
    inputs = []
    for source, role in zip(layout.sources, layout.roles, strict=True):
        own = plain(data["multi_modal_inputs"][source])
        inputs.append({**own, **views[source][kinds[role - 1]]} if role > ANCHOR else own)
    tu.assign_non_tensor_stack(laid, "multi_modal_inputs", inputs)
    laid[ROLE] = torch.tensor(layout.roles)
    for name in MASKS:
        laid[name] = _kept(laid[name], laid[ROLE])
    tu.assign_non_tensor(laid, force_group_size=len(kinds) + 1)
    return laid


def _kept(mask: Tensor, role: Tensor) -> Tensor:
    """A mask that is 0 in the rows of views and copies."""
    rows = zip(mask.unbind(), role.tolist(), strict=True)
    return tu.nested_tensor_from_tensor_list(
        [row if one in (ANCHOR, LONE) else torch.zeros_like(row) for row, one in rows]
    )


def lengths(data: TensorDict) -> list[int]:
    """Number of tokens of each row, prompt and response."""
    return [len(row) for row in data["input_ids"].unbind()]


def plain(value: Any) -> Any:
    """The value inside tensordict's wrapper, or the value itself."""
    return tu.unwrap_non_tensor_data(value)


def rows_of(data: TensorDict, names: Sequence[str]) -> list[dict[str, Any]]:
    """These entries of each row, unwrapped. A missing entry is left out; an entry for all rows is in each."""
    columns = {name: data[name] for name in names if name in data}
    return [
        {name: plain(of[row]) if isinstance(of, list | Tensor) else of for name, of in columns.items()}
        for row in range(len(data))
    ]
