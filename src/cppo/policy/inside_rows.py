"""Plain rows under views inside the model: in each row, some tokens are hidden or have replaced values."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo.policy.inside import INSIDE_KEYS, MASKED, REPLACED, TEXT, ReplacedValues
from cppo.policy.packing import prompt_positions
from cppo.policy.row_tokens import rows_on_host
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs, concatenate_rows, pads_rows


class InsideRows(NamedTuple):
    """Rows for `plain_scores`.

    Attributes:
        input_ids, attention_mask: [B, P + T]; the mask excludes hidden tokens.
        vision: image inputs of the B rows.
        inputs: the model's other inputs.
    """

    input_ids: Tensor
    attention_mask: Tensor
    vision: VisionInputs
    inputs: dict[str, Any]


def rows_inside(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_response_tokens: int,
    rows: Sequence[VisionInputs],
) -> InsideRows:
    """Build rows, some of them under a view inside the model.

    Args:
        model: the transformers model itself, without wrappers (for its M-RoPE positions).
        input_ids, attention_mask: as for `plain_scores`.
        num_response_tokens: T.
        rows: image inputs of each of the B rows (`slice_rows`), with `INSIDE_KEYS` for a row under such a view.
    """
    end = input_ids.shape[1] - num_response_tokens
    prompts, _ = rows_on_host(input_ids, attention_mask, num_response_tokens)
    prompts = [row[TEXT].tolist() if TEXT in row else prompt for row, prompt in zip(rows, prompts, strict=True)]
    width = max(map(len, prompts))
    ids, mask = (tensor.new_zeros(len(rows), width + num_response_tokens) for tensor in (input_ids, attention_mask))
    ids[:, width:], mask[:, width:] = input_ids[:, end:], attention_mask[:, end:]
    vision, positions, replaced = [], [], list[tuple[int, int, Tensor]]()
    none = _without_images(max(rows, key=len))  # rows of text alone may lack image inputs
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        start = width - len(prompt)
        ids[number, start:width], mask[number, start:width] = ids.new_tensor(prompt), 1
        own = {key: _resized(key, value, end, start, width) for key, value in {**none, **row}.items()}
        own = _without_images(own) if TEXT in row else own
        positions.append(_row_positions(model, prompt, own, start, num_response_tokens))
        if MASKED in row:
            unseen = start + row[MASKED].nonzero().squeeze(1).to(ids.device)
            # Nothing sees these ids, but without an image they must not be placeholders.
            ids[number, unseen], mask[number, unseen] = prompt[-1], 0
            own = _without_images(own)
        if REPLACED in row:
            replaced.append((number, start, row[REPLACED][:-1]))
        vision.append({key: value for key, value in own.items() if key not in INSIDE_KEYS})
    inputs: dict[str, Any] = {}
    if replaced:
        inputs["replaced_values"] = ReplacedValues(tuple(replaced))
    # A model that numbers tokens by their images would number the others as if there were none.
    if positions[0].ndim > 1 and any(MASKED in row for row in rows):
        inputs["position_ids"] = torch.stack(positions, dim=1).to(ids.device)
    joined = concatenate_rows(vision)
    if pads_rows(joined) and not joined["pixel_values"].any():
        joined = {key: value for key, value in joined.items() if key in PER_TOKEN_KEYS}
    return InsideRows(ids, mask, joined, inputs)


def _resized(key: str, value: Any, end: int, start: int, width: int) -> Any:
    """Per-token inputs [1, end + T] for a prompt from `start` to `width`; other inputs unchanged."""
    if key not in PER_TOKEN_KEYS:
        return value
    resized = value.new_zeros(1, width + value.shape[1] - end)
    length = min(width - start, end)
    resized[:, width - length :] = value[:, end - length :]
    return resized


def _row_positions(model: Any, prompt: Sequence[int], vision: VisionInputs, start: int, length: int) -> Tensor:
    """Positions of a padded row's tokens, [P + T] or [3, P + T]; 0 for padding."""
    types = vision.get("mm_token_type_ids")
    types = None if types is None else types[:, start : start + len(prompt)]
    own = prompt_positions(model, prompt, types, vision.get("image_grid_thw"))
    steps = (own.max() + 1 + torch.arange(length)).expand(*own.shape[:-1], -1)
    return torch.cat([own.new_zeros(*own.shape[:-1], start), own, steps], dim=-1)


def _without_images(vision: Mapping[str, Any]) -> VisionInputs:
    """The same inputs of a row without images."""

    def none_of(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return [0]
        # Padded rows hold images of zeros.
        return torch.zeros_like(value) if key in PER_TOKEN_KEYS or pads_rows(vision) else value[:0]

    return {key: none_of(key, value) for key, value in vision.items()}
