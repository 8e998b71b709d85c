"""Count, split and join the image inputs of a batch's rows, for every layout of images (see `Family`).

Tensors hold the images of B rows in order; lists have one number per row (`num_images`, `num_tiles`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cppo.policy.families import FAMILIES, family_of
from cppo.trl_surface import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

VisionInputs = dict[str, Any]
"""Keyword inputs of the model that describe images: tensors, or lists with one number per row. Under a view inside the
model, one of `INSIDE_KEYS` is among them.
"""

PER_TOKEN_KEYS = ("token_type_ids", "mm_token_type_ids")
"""Inputs of shape [B, prompt + response], one entry per token."""
VISION_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Inputs of TRL's micro-batches that describe images."""
ROW_COUNTS = ("num_images", "num_tiles")
"""The trainer's counts, which are not inputs of the model."""


def model_images(config: Any, vision: Mapping[str, Any]) -> VisionInputs:
    """The image inputs of the model's forward, from a batch's vision inputs; converts the trainer's counts.

    config: the model's configuration.
    """
    inputs = {key: value for key, value in vision.items() if key not in ROW_COUNTS}
    name = family_of(config).images_a_row
    if name and "pixel_values" in inputs and "num_images" in vision:
        inputs[name] = torch.tensor([count for count in vision["num_images"] if count])
    return inputs


def has_images(config: Any, vision: Mapping[str, Any]) -> bool:
    """Whether rows hold an image; in padded rows, images of zeros do not count."""
    pixel_values = without_empty_images(vision).get("pixel_values")
    return pixel_values is not None and (family_of(config).images != "rows" or bool(pixel_values.any()))


def without_empty_images(vision: Mapping[str, Any]) -> VisionInputs:
    """Drop missing inputs, and all image inputs where a batch holds no image."""
    present = {key: value for key, value in vision.items() if value is not None}
    if "num_images" in present:
        for family in FAMILIES.values():
            present.pop(family.images_a_row, None)  # the same for rows of text alone
    pixel_values = present.get("pixel_values")
    if pixel_values is not None and pixel_values.shape[0] == 0:
        return {key: value for key, value in present.items() if key in PER_TOKEN_KEYS}
    return present


def trimmed(vision: Mapping[str, Any], length: int) -> VisionInputs:
    """The vision inputs of rows of `length` tokens; per-token inputs may be longer on the left.

    TRL builds them from chat text, where the tokenizer adds a first token that the template already wrote.
    """
    return {key: value[:, -length:] if key in PER_TOKEN_KEYS else value for key, value in vision.items()}


def split_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with one image entry per row; TRL's `unsplit_pixel_values_by_grid` joins them again.

    TRL's own function mistakes Idefics' rows [B, images, ...] for images where the counts happen to agree.
    """
    return dict(batch) if pads_rows(batch) else split_pixel_values_by_grid(dict(batch))


def pads_rows(vision: Mapping[str, Any]) -> bool:
    """Whether images are in rows [B, images, ...] padded to the fullest one.

    A batch does not name its family. Such rows have five dimensions, and include all inputs of a family with such rows.
    """
    pixel_values = vision.get("pixel_values")
    filled = (set(family.image_inputs) for family in FAMILIES.values() if family.images == "rows")
    return pixel_values is not None and pixel_values.ndim == 5 and any(names <= vision.keys() for names in filled)


def slice_rows(vision: Mapping[str, Any], start: int, end: int) -> VisionInputs:
    """The vision inputs of rows `start` to `end` (exclusive) of a batch."""
    return pick_rows(vision, range(start, end))


def pick_rows(vision: Mapping[str, Any], places: Sequence[int]) -> VisionInputs:
    """The vision inputs of these rows of a batch, in this order; rows of text alone may be among them."""

    def picked(values: Any) -> Any:
        if isinstance(places, range):
            return values[places.start : places.stop]  # a tensor's rows are not copied
        return values[list(places)] if isinstance(values, Tensor) else [values[place] for place in places]

    rows = {key: picked(values) for key, values in split_rows(without_empty_images(vision)).items()}
    if isinstance(rows.get("pixel_values"), list) and not rows["pixel_values"]:
        return {key: value for key, value in rows.items() if key in PER_TOKEN_KEYS}
    return without_empty_images(unsplit_pixel_values_by_grid(rows))


def concatenate_rows(parts: Sequence[Mapping[str, Any]]) -> VisionInputs:
    """Join the vision inputs of several batches in order.

    Tensors with different other dimensions (images padded to the largest of their own batch) are padded with zeros at
    the end, as the processors do. A key must be present in all parts or in none.
    """
    keys = list(dict.fromkeys(key for part in parts for key in part))
    joined: VisionInputs = {}
    for key in keys:
        values = [part[key] for part in parts]
        joined[key] = padded_cat(values) if isinstance(values[0], Tensor) else [n for value in values for n in value]
    return joined


def join_images(parts: Sequence[VisionInputs]) -> VisionInputs:
    """The model's inputs for the images of several prompts in order; no per-token inputs.

    parts: the images of each prompt, as in `PromptGroup`.
    """
    images = [{key: value for key, value in part.items() if key not in PER_TOKEN_KEYS} for part in parts]
    images = [part for part in images if part]
    if not images:
        return {}
    return {key: padded_cat([part[key] for part in images]) for key in images[0]}


def padded_cat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` that pads tensors with zeros at the end of their smaller dimensions.

    So do the processors: images are padded to the largest of their batch.
    """
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [target - size for target, size in zip(shape, tensor.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(tensor, pads) if any(pads) else tensor)
    return torch.cat(padded)


def counted_images(config: Any, inputs: Mapping[str, Any]) -> VisionInputs | None:
    """The image inputs of [B, P] with the number of images (or tiles) of each row, as `slice_rows` needs it.

    The row's placeholder tokens give the count; None where they leave it unclear.
    """
    family = family_of(config)
    vision = without_empty_images({name: inputs.get(name) for name in (*family.image_inputs, *PER_TOKEN_KEYS)})
    given = vision.pop(family.images_a_row, None)
    pixels = vision.get("pixel_values")
    if pixels is None or family.images == "rows":
        return vision
    tokens = (inputs["input_ids"] == config.image_token_id).sum(dim=1)
    if given is not None:  # of each row that has any
        counts = iter(given.tolist())
        return {**vision, "num_images": [next(counts) if count else 0 for count in tokens.tolist()]}
    if family.images == "patches":
        sizes = vision["image_grid_thw"].prod(dim=1) // config.vision_config.spatial_merge_size**2
    else:
        each, left_over = divmod(int(tokens.sum()), len(pixels))
        if left_over:
            return None
        sizes = tokens.new_full((len(pixels),), each)
    ends, row_ends = sizes.cumsum(dim=0), tokens.cumsum(dim=0)
    seen = torch.searchsorted(ends, row_ends, right=True)
    if not torch.equal(torch.cat([ends.new_zeros(1), ends])[seen], row_ends):
        return None
    return {**vision, "num_images": seen.diff(prepend=seen.new_zeros(1)).tolist()}


def prompt_vision(config: Any, vision: Mapping[str, Any], row: int, length: int) -> VisionInputs:
    """The image inputs that packing needs for the prompt of one row, if it has images.

    config: the model's configuration. length: of the row.
    """
    return packable(config, trimmed(slice_rows(vision, row, row + 1), length))


def with_pixel_noise(vision: Mapping[str, Any], deviation: float, rng: np.random.Generator) -> VisionInputs:
    """A processor's image inputs with Gaussian noise of this standard deviation on its normalized pixels.

    Source: the code of VEPO (arXiv 2606.03937), which adds noise after the processor and clips nothing.
    """
    pixels = vision["pixel_values"]
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32))
    return {**vision, "pixel_values": pixels + deviation * noise.to(pixels.dtype)}


def packable(config: Any, vision: Mapping[str, Any]) -> VisionInputs:
    """The model's inputs for the images of one row, if it has any, and its per-token inputs."""
    own = {key: value for key, value in vision.items() if key in PER_TOKEN_KEYS}
    if not has_images(config, vision):
        return own
    images = model_images(config, {key: value for key, value in without_empty_images(vision).items() if key not in own})
    if family_of(config).images == "rows":
        images = {key: value.flatten(0, 1)[:, None] for key, value in images.items()}  # one row per image
    return {**images, **own}
