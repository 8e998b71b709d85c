"""Put together and cut apart the vision inputs of a batch, for every layout that transformers' processors use.

A batch of B rows carries its images in tensors whose first dimension counts patches (Qwen), images (LLaVA,
LLaVA-OneVision), tiles (InternVL) or rows (Idefics), and in lists with one number a row (`num_images`, `num_tiles`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from cppo.policy.families import IMAGES_A_ROW, takes_images_a_row

VisionInputs = dict[str, Any]
"""Keyword inputs of the model that describe images: tensors, or lists with one number a row."""

PER_TOKEN_KEYS = ("token_type_ids", "mm_token_type_ids")
"""Inputs of shape [B, prompt + response], one entry a token."""

ROW_COUNTS = ("num_images", "num_tiles")
"""Bookkeeping of the trainer that is no input of the model."""


def model_images(config: Any, vision: Mapping[str, Any]) -> VisionInputs:
    """Of a batch's vision inputs those that the model's forward takes, the trainer's counts translated into its own.

    config: the model's configuration.
    """
    inputs = {key: value for key, value in vision.items() if key not in ROW_COUNTS}
    if takes_images_a_row(config) and "pixel_values" in inputs and "num_images" in vision:
        inputs[IMAGES_A_ROW] = torch.tensor([count for count in vision["num_images"] if count])
    return inputs


def pads_rows(vision: Mapping[str, Any]) -> bool:
    """Whether images stand in rows [B, images, ...] that are filled up to the fullest one, as Idefics' do."""
    pixel_values = vision.get("pixel_values")
    return pixel_values is not None and pixel_values.ndim == 5 and "image_sizes" not in vision


def without_empty_images(vision: Mapping[str, Any]) -> VisionInputs:
    """Drop absent inputs, and the image inputs altogether when a batch of text-only rows holds no image."""
    present = {key: value for key, value in vision.items() if value is not None}
    if "num_images" in present:
        present.pop(IMAGES_A_ROW, None)  # the same, but for rows of text alone
    pixel_values = present.get("pixel_values")
    if pixel_values is not None and pixel_values.shape[0] == 0:
        return {key: value for key, value in present.items() if key in PER_TOKEN_KEYS}
    return present


def trimmed(vision: Mapping[str, Any], length: int) -> VisionInputs:
    """The vision inputs of rows of `length` tokens, whose per-token inputs may be longer on the left.

    TRL makes these from text to which the tokenizer adds a first token that the template wrote already.
    """
    return {key: value[:, -length:] if key in PER_TOKEN_KEYS else value for key, value in vision.items()}


def split_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose image inputs have one entry a row; `unsplit_pixel_values_by_grid` of TRL joins them again.

    TRL's function takes Idefics' rows [B, images, ...] for images where there happen to be as many.
    """
    if pads_rows(batch):
        return dict(batch)
    return split_pixel_values_by_grid(dict(batch))


def slice_rows(vision: Mapping[str, Any], start: int, end: int) -> VisionInputs:
    """The vision inputs of rows `start` to `end` (exclusive) of a batch."""
    by_row = split_rows(without_empty_images(vision))
    rows = {key: value[start:end] for key, value in by_row.items()}
    if isinstance(rows.get("pixel_values"), list) and not rows["pixel_values"]:
        return {key: value for key, value in rows.items() if key in PER_TOKEN_KEYS}
    return without_empty_images(unsplit_pixel_values_by_grid(rows))


def concatenate_rows(parts: Sequence[Mapping[str, Any]]) -> VisionInputs:
    """Join the vision inputs of several batches, first rows first.

    Tensors whose other dimensions differ (images padded to the largest of their own batch) are padded with zeros at
    the end, as the processors do. A key must be present in all parts or in none.
    """
    keys = list(dict.fromkeys(key for part in parts for key in part))
    joined: VisionInputs = {}
    for key in keys:
        values = [part[key] for part in parts]
        joined[key] = _concatenate(values) if isinstance(values[0], Tensor) else [n for value in values for n in value]
    return joined


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [target - size for target, size in zip(shape, tensor.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(tensor, pads) if any(pads) else tensor)
    return torch.cat(padded)
