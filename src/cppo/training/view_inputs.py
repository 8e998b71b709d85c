"""From a row of the dataset to what the model takes for its perturbed views."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from trl import apply_chat_template, prepare_multimodal_messages

from cppo.errors import UserError, one_line
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs
from cppo.views import PixelRoom, ViewSampler, load_rgb, stable_sample_id

Row = dict[str, Any]
Messages = list[dict[str, Any]]
ViewPair = Future[tuple[Image.Image, Image.Image]]
"""The views I+ and I- of one image, being made."""


@dataclass(frozen=True)
class PromptInputs:
    """What the processor makes of one prompt: its token ids, and its image inputs without what is one entry a token."""

    token_ids: list[int]
    vision: VisionInputs


def canonical_row(row: Mapping[str, Any]) -> Row:
    """A copy of a dataset row whose images are upright RGB, always in a list `images` (empty for text only).

    The rollouts, the anchor and the views all start from these images, so that they share one conversion.

    Raises:
        UserError: an image cannot be read, `images` is no list, or the prompt ends with an assistant's message.
    """
    check_ends_with_question(row["prompt"])
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
    """A PIL image of what TRL's datasets hold: a PIL image, the path of a file, or pixels in an array or tensor.

    Args:
        image: arrays are uint8, [height, width] or [height, width, channels]; tensors have the channels first.

    Raises:
        UserError: the file cannot be read, or the array is no image.
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


def check_ends_with_question(prompt: Messages | str) -> None:
    """Raise UserError for a prompt that ends with an assistant's message: a response begins after another's."""
    if not isinstance(prompt, str) and prompt and prompt[-1].get("role") == "assistant":
        begun = str(prompt[-1].get("content"))[:40]
        raise UserError(
            f"a prompt ends with an assistant message ({begun!r}): let it end with a user message, which may ask for "
            "such a beginning"
        )


def canonical_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of a generation batch as `canonical_row` makes them; copies of a prompt share its prompt and images."""
    canonical: list[Row] = []
    for index, row in enumerate(rows):
        # The copies of a prompt stand side by side: converting, and later processing, one of them serves all.
        if "prompt" not in row:
            canonical.append({**row})  # an environment will bring it
        elif index > 0 and same_prompt(row, rows[index - 1]):
            canonical.append({**row, "prompt": canonical[-1]["prompt"], "images": canonical[-1]["images"]})
        else:
            canonical.append(canonical_row(row))
    return canonical


def same_prompt(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows of the dataset show the same prompt and pixels, and carry the same id."""
    return all(_equal(row.get(key), other.get(key)) for key in ("prompt", "images", "image", "sample_id", "id"))


def _equal(one: Any, other: Any) -> bool:
    """Equality also of lists and mappings that hold arrays or tensors."""
    if isinstance(one, np.ndarray | Tensor):
        return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def first_copies(rows: Sequence[Row]) -> list[int]:
    """For each canonical row the place of the first of the copies of its prompt, which stand side by side."""
    firsts: list[int] = []
    for index, row in enumerate(rows):
        is_copy = index > 0 and row["prompt"] is rows[index - 1]["prompt"]
        firsts.append(firsts[-1] if is_copy else index)
    return firsts


def sample_id(row: Mapping[str, Any]) -> str:
    """The row's `sample_id` (or `id`), or else an id made from its prompt and images."""
    for name in ("sample_id", "id"):
        if row.get(name) is not None:
            return str(row[name])
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = [_text_of(message) for message in prompt]
    return stable_sample_id(prompt, prompt_images(row))


def run_progress(trainer: Any, step: int) -> float:
    """The share of the run that is done once the generation batch that began after `step` steps is trained on."""
    args = trainer.args
    steps = args.steps_per_generation * trainer.num_iterations / args.gradient_accumulation_steps
    return min((step + steps) / max(trainer.state.max_steps, 1), 1.0)


def prompt_messages(row: Mapping[str, Any]) -> Messages | str:
    """The row's prompt with its images filled in, as TRL's trainer builds it."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return prepare_multimodal_messages(row["prompt"], images=row["images"])


def prompt_images(row: Mapping[str, Any]) -> list[Image.Image]:
    """All images of a canonical row, in the order in which the model sees them."""
    return embedded_images(prompt_messages(row))


def embedded_images(prompt: Messages | str) -> list[Image.Image]:
    """The images inside chat messages, in order; a prompt of plain text has none."""
    if isinstance(prompt, str):
        return []
    contents = [message["content"] for message in prompt if isinstance(message.get("content"), list)]
    return [part["image"] for content in contents for part in content if _is_image(part)]


def replace_images(prompt: Messages | str, images: Sequence[Image.Image]) -> Messages | str:
    """A copy of chat messages with other images in the places of the embedded ones; plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    following = iter(images)

    def new_part(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(following)} if _is_image(part) else part

    return [
        {**message, "content": [new_part(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" and part.get("image") is not None


def process_prompt(
    processing_class: Any, prompt: Messages | str, tools: list[Any] | None, chat_template_kwargs: Mapping[str, Any]
) -> PromptInputs:
    """Run chat template and processor over one prompt, with the call that TRL makes for the anchor."""
    example: dict[str, Any] = {"prompt": prompt}
    text = apply_chat_template(example, processing_class, tools=tools, **chat_template_kwargs)["prompt"]
    images = embedded_images(prompt)
    # A template that writes the first token itself is not to get it twice: so is the anchor tokenized.
    first = processing_class.tokenizer.bos_token
    options = {"add_special_tokens": False} if first and text.startswith(first) else {}
    inputs = dict(processing_class(images=[images], text=[text], padding=True, return_tensors="pt", **options))
    token_ids = inputs.pop("input_ids")[0].tolist()
    vision = {key: value for key, value in inputs.items() if key not in ("attention_mask", *PER_TOKEN_KEYS)}
    vision["num_images"] = [len(images)]
    if "pixel_values" in vision:
        vision["num_tiles"] = [vision["pixel_values"].shape[0]]
    return PromptInputs(token_ids, vision)


class ViewMaker:
    """Makes the views of a generation batch: pixels on other threads while rollouts are generated, inputs afterwards.

    Args:
        sampler: draws the perturbed images.
        threads: how many draw at once, at least 1.
        processing_class: the model's processor.
        tools, chat_template_kwargs: what the trainer renders its prompts with.
        draws: when views are drawn anew, the option `view_draws`.
        group_size: G.
    """

    def __init__(
        self,
        sampler: ViewSampler,
        threads: int,
        processing_class: Any,
        tools: list[Any],
        chat_template_kwargs: dict[str, Any],
        draws: str = "epoch",
        group_size: int = 1,
    ) -> None:
        self._sampler, self._draws, self._group_size = sampler, draws, group_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cppo-views")
        self._room = PixelRoom()
        self._process = partial(
            process_prompt, processing_class, tools=tools or None, chat_template_kwargs=chat_template_kwargs
        )

    def begin(self, rows: Sequence[Row], epoch: int, progress: float = 0.0, place: int = 0) -> "BatchViews":
        """Start on the views of canonical rows; copies of a prompt share theirs, unless each rollout has its own.

        Args:
            epoch: the pass over the data.
            progress: as for `ViewStrengths.at`.
            place: of the first row among those of all processes.
        """
        alone = self._draws == "rollout"
        firsts = list(range(len(rows))) if alone else first_copies(rows)
        sampler, key = self._sampler.at(progress), 0 if self._draws == "once" else epoch
        begun = {}
        for first in dict.fromkeys(firsts):
            name = sample_id(rows[first])
            if alone:
                name = f"{name}/rollout-{(place + first) % self._group_size}"
            # Of copies: reward functions are given the row's own images, and may change them meanwhile.
            begun[first] = [
                self._pool.submit(self._views, sampler, image.copy(), name, key, index)
                for index, image in enumerate(prompt_images(rows[first]))
            ]
        return BatchViews(self._process, rows, firsts, begun)

    def _views(
        self, sampler: ViewSampler, image: Image.Image, name: str, key: int, index: int
    ) -> tuple[Image.Image, Image.Image]:
        with self._room.taken(image.size):
            return sampler.views(image, name, key, index)


@dataclass(frozen=True)
class BatchViews:
    """The views of one generation batch, being made.

    Attributes:
        process: from a prompt to the model's inputs.
        rows: of the batch.
        firsts: for each row the first of those that share its views.
        begun: for each of these the pairs (I+, I-) of its images.
    """

    process: Callable[[Messages | str], PromptInputs]
    rows: Sequence[Row]
    firsts: Sequence[int]
    begun: Mapping[int, list[ViewPair]]

    def inputs(
        self, gate: Sequence[bool], prompt_tokens: Sequence[list[int]], kinds: Sequence[str]
    ) -> list[dict[str, VisionInputs] | None]:
        """For each gated-in row the model's inputs under the views of these kinds; None for the other rows.

        The processor runs once per prompt; its rollouts share the same tensors. Views of the other prompts that are not
        begun yet are never made.

        Args:
            gate: which rows are gated in.
            prompt_tokens: each row's prompt as the anchor has it.
            kinds: "removing", "preserving" or both.

        Raises:
            UserError: a view cannot be made, or the processor makes other tokens of it than of its image.
        """
        wanted = {first for first, gated_in in zip(self.firsts, gate, strict=True) if gated_in}
        for first in self.begun.keys() - wanted:
            for pair in self.begun[first]:
                pair.cancel()
        made = {first: self._of_prompt(first, prompt_tokens[first], kinds) for first in sorted(wanted)}
        return [made[first] if gated_in else None for first, gated_in in zip(self.firsts, gate, strict=True)]

    def _of_prompt(self, first: int, tokens: list[int], kinds: Sequence[str]) -> dict[str, VisionInputs]:
        row, pairs = self.rows[first], [pair.result() for pair in self.begun[first]]
        views = {"preserving": [pair[0] for pair in pairs], "removing": [pair[1] for pair in pairs]}
        inputs = {}
        for kind in kinds:
            view = self.process(replace_images(prompt_messages(row), views[kind]))
            if view.token_ids != tokens:
                raise UserError(
                    f"row {sample_id(row)}: the processor makes other prompt tokens of a perturbed view "
                    f"({len(view.token_ids)}) than of the image itself ({len(tokens)}); use a processor whose number "
                    "of image tokens depends on the image's size alone"
                )
            inputs[kind] = view.vision
        return inputs


def _text_of(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = [{key: value for key, value in part.items() if key != "image"} for part in content]
    return {"role": message.get("role"), "content": content}
