"""Convert a dataset row to chat messages with images, then to the model's inputs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from trl import apply_chat_template, prepare_multimodal_messages

from cppo.errors import UserError, one_line
from cppo.messages import Messages, embedded_images, prompt_text, replace_images
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs
from cppo.views import load_rgb, stable_sample_id

Row = dict[str, Any]


@dataclass(frozen=True)
class PromptInputs:
    """The processor's output for one prompt: its token ids, and its image inputs without per-token entries."""

    token_ids: list[int]
    vision: VisionInputs


def canonical_row(row: Mapping[str, Any]) -> Row:
    """A copy of a dataset row with upright RGB images, always in a list `images` (empty for text only).

    Rollouts, anchor and views all start from these images, so they share one conversion.

    Raises:
        UserError: an image cannot be read, `images` is not a list, or `check_prompt` refuses the prompt.
    """
    check_prompt(row)
    if row.get("images") is not None:
        if not isinstance(row["images"], Sequence) or isinstance(row["images"], str):
            kind = type(row["images"]).__name__
            raise UserError(f"images: expected a list of images, got {kind}; a single image is the column `image`")
        images = list(row["images"])
    else:
        images = [row["image"]] if row.get("image") is not None else []
    prompt = replace_images(row["prompt"], [load_rgb(opened(image)) for image in embedded_images(row["prompt"])])
    return {**row, "prompt": prompt, "images": [load_rgb(opened(image)) for image in images]}


def opened(image: Any) -> Any:
    """A PIL image from an entry of TRL's datasets: a PIL image, the path of a file, or pixels in an array or tensor.

    Args:
        image: arrays are uint8, [height, width] or [height, width, channels]; tensors have the channels first.

    Raises:
        UserError: the file cannot be read, or the array is not an image.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return Image.open(image)
        except (OSError, ValueError) as error:
            raise UserError(f"image {str(image)!r} cannot be read ({one_line(error)}); replace or remove it") from error
    if isinstance(image, Tensor):
        image = (image.movedim(0, -1) if image.ndim == 3 else image).numpy(force=True)
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        try:
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
                raise TypeError
            return Image.fromarray(pixels)
        except (TypeError, ValueError):
            raise UserError(
                f"an image is an array of {image.dtype} with shape {list(image.shape)}: give uint8, "
                "[height, width] or [height, width, 3]"
            ) from None
    return image


def check_prompt(row: Mapping[str, Any]) -> None:
    """Raise UserError for a prompt that is plain text beside images, or ends with an assistant's message.

    TRL puts images into chat messages alone. After an assistant's message the response would begin another turn.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        images = row.get("images")
        if row.get("image") is not None or (images is not None and len(images)):
            raise UserError(
                f"the prompt {prompt[:40]!r} is plain text, and its row has images: give it as chat messages, "
                "[{'role': 'user', 'content': prompt}]; `cppo.data.to_dataset` makes such rows of records"
            )
    elif prompt and prompt[-1].get("role") == "assistant":
        begun = str(prompt[-1].get("content"))[:40]
        raise UserError(
            f"a prompt ends with an assistant message ({begun!r}): end it with a user message, which may ask for that "
            "beginning"
        )


def sample_id(row: Mapping[str, Any]) -> str:
    """The row's `sample_id` (or `id`), else an id from its prompt and images."""
    for name in ("sample_id", "id"):
        if row.get(name) is not None:
            return str(row[name])
    return stable_sample_id(prompt_text(row["prompt"]), prompt_images(row))


def prompt_messages(row: Mapping[str, Any]) -> Messages | str:
    """The row's prompt with its images filled in, as TRL's trainer builds it."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return prepare_multimodal_messages(row["prompt"], images=row["images"])


def prompt_images(row: Mapping[str, Any]) -> list[Image.Image]:
    """All images of a canonical row, in the order in which the model sees them."""
    return embedded_images(prompt_messages(row))


def process_prompt(
    processing_class: Any, prompt: Messages | str, tools: list[Any] | None, chat_template_kwargs: Mapping[str, Any]
) -> PromptInputs:
    """Run chat template and processor over one prompt, with the call that TRL makes for the anchor."""
    text, options = _chat_text(processing_class, prompt, tools, chat_template_kwargs)
    images = embedded_images(prompt)
    inputs = dict(processing_class(images=[images], text=[text], padding=True, return_tensors="pt", **options))
    token_ids = inputs.pop("input_ids")[0].tolist()
    vision = {key: value for key, value in inputs.items() if key not in ("attention_mask", *PER_TOKEN_KEYS)}
    vision["num_images"] = [len(images)]
    if "pixel_values" in vision:
        vision["num_tiles"] = [vision["pixel_values"].shape[0]]
    return PromptInputs(token_ids, vision)


def unexpanded_ids(
    processing_class: Any, prompt: Messages | str, tools: list[Any] | None, chat_template_kwargs: Mapping[str, Any]
) -> list[int]:
    """The token ids of one prompt with one placeholder per image, before the processor expands it."""
    text, options = _chat_text(processing_class, prompt, tools, chat_template_kwargs)
    ids: list[int] = processing_class.tokenizer(text, **options)["input_ids"]
    return ids


def _chat_text(
    processing_class: Any, prompt: Messages | str, tools: list[Any] | None, chat_template_kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """A prompt's chat text and its tokenizer options."""
    example: dict[str, Any] = {"prompt": prompt}
    text = apply_chat_template(example, processing_class, tools=tools, **chat_template_kwargs)["prompt"]
    # A template that writes the first token itself must not get it twice; the anchor is tokenized the same way.
    first = processing_class.tokenizer.bos_token
    return text, {"add_special_tokens": False} if first and text.startswith(first) else {}
