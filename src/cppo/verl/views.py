"""The views of an update's prompts, made ahead in threads: once per prompt, shared by its rollouts.

They equal the trainer's: a function of seed, sample id, epoch and image index, drawn from the image in verl's dataset.
The view then takes the image's own path to the model.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from verl.utils.dataset.rl_dataset import RLHFDataset

from cppo.errors import UserError
from cppo.messages import Messages, embedded_images, prompt_text, replace_images
from cppo.verl.options import VerlOptions
from cppo.views import PixelRoom, stable_sample_id, view_sampler

Pixels = dict[str, Tensor]
"""Image inputs of a row, as the processor returns them."""
GRID = "image_grid_thw"
ENTRIES = ("uid", "raw_prompt", "multi_modal_inputs", "extra_info", "sample_id", "id", "session_id", "global_steps")
"""Entries of verl's batch that views need, where present."""


@dataclass(frozen=True)
class Prompt:
    """The inputs of a rollout's views.

    Attributes:
        uid: verl's, of the prompt of this step.
        messages: the chat, with its images as in the dataset.
        own: the processor's inputs for these images.
        given_id: the row's own id, if any.
        number: of the rollout in its group.
        step: in which verl drew the prompt, from 1.
    """

    uid: str
    messages: Messages
    own: Pixels
    given_id: str | None = None
    number: int = 0
    step: int = 1

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Prompt":
        """From a row of verl's batch (`ENTRIES`) with plain values."""
        holders = (row, row.get("extra_info") or {})
        ids = [holder[name] for holder in holders for name in ("sample_id", "id") if holder.get(name) is not None]
        number, step = int(row.get("session_id") or 0), int(row.get("global_steps") or 1)
        given_id = str(ids[0]) if ids else None
        return cls(str(row["uid"]), list(row["raw_prompt"]), row["multi_modal_inputs"] or {}, given_id, number, step)

    @property
    def shows_its_images(self) -> bool:
        """Whether the row has images, and only its prompt's: a tool may add some."""
        return 0 < len(embedded_images(self.messages)) == len(self.own.get(GRID, ()))


class PromptViews:
    """Makes views of prompts in threads, and keeps them until `forget`.

    Args:
        options: of the method.
        processor: the model's.
        steps_per_epoch, total_steps: of the run, where known: new views are drawn each epoch, and some fade.

    Raises:
        UserError: the processor returns no grid for an image.
    """

    def __init__(
        self, options: VerlOptions, processor: Any, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> None:
        check_processor(processor)
        self._options, self._processor = options, processor
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._sampler = view_sampler(vars(options))
        self._pool = ThreadPoolExecutor(options.view_threads, thread_name_prefix="cppo-views")
        self._room = PixelRoom()
        self._begun: dict[tuple[str, int], Future[dict[str, Pixels]]] = {}

    def begin(self, prompt: Prompt) -> None:
        """Start the views of a prompt, unless they are started or done."""
        key = self._key(prompt)
        if key not in self._begun:
            self._begun[key] = self._pool.submit(self._make, prompt)

    def of(self, prompt: Prompt) -> dict[str, Pixels]:
        """The image inputs of a prompt under each view, by kind, where they differ from its own.

        Raises:
            UserError: an image cannot be read, or a view has another grid.
        """
        self.begin(prompt)
        return self._begun[self._key(prompt)].result()

    def forget(self) -> None:
        """Drop all views."""
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def images(
        self, messages: Messages, sample_id: str, number: int, step: int
    ) -> list[tuple[Image.Image, Image.Image]]:
        """The pair (I+, I-) of each image of a prompt.

        Args:
            messages: with open images.
            sample_id, number, step: as in `Prompt`.
        """
        epoch = 0
        if self._options.view_draws != "once" and self._steps_per_epoch:
            epoch = (step - 1) // self._steps_per_epoch
        name = f"{sample_id}/rollout-{number}" if self._options.view_draws == "rollout" else sample_id
        sampler = self._sampler.at(min(step / self._total_steps, 1.0) if self._total_steps else 0.0)
        pairs = []
        for index, image in enumerate(embedded_images(messages)):
            with self._room.taken(image.size):
                pairs.append(sampler.views(image, name, epoch, index))
        return pairs

    def _key(self, prompt: Prompt) -> tuple[str, int]:
        return prompt.uid, prompt.number if self._options.view_draws == "rollout" else 0

    def _make(self, prompt: Prompt) -> dict[str, Pixels]:
        messages = [_with_open_images(message) for message in prompt.messages]
        sample_id = prompt.given_id or stable_id(messages)
        pairs = self.images(messages, sample_id, prompt.number, prompt.step)
        views = {"preserving": [pair[0] for pair in pairs], "removing": [pair[1] for pair in pairs]}
        made = {kind: self._inputs(replace_images(messages, views[kind])) for kind in self._options.kinds}
        for view in made.values():
            grid, own = view.pop(GRID), prompt.own[GRID].cpu()
            if not torch.equal(grid, own) or view["pixel_values"].shape != prompt.own["pixel_values"].shape:
                raise UserError(
                    f"row {sample_id}: the processor returns the grid {grid.tolist()} for a view, but {own.tolist()} "
                    "for the image itself: leave data.custom_cls and the processor's arguments at verl's defaults"
                )
            view["pixel_values"] = view["pixel_values"].to(prompt.own["pixel_values"])
        return made

    def _inputs(self, messages: Messages | str) -> Pixels:
        """Pixels and grid of the images of a chat, computed as for verl's rollouts."""
        image_processor = self._processor.image_processor
        images, _, _ = asyncio.run(RLHFDataset.process_multi_modal_info(messages, image_processor.patch_size, None))
        made = image_processor(images=images, return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", GRID)}


def check_processor(processor: Any) -> None:
    """Raise UserError unless the processor returns a grid that gives each image's number of tokens."""
    image_processor = getattr(processor, "image_processor", None)
    if GRID not in getattr(image_processor, "model_input_names", ()):
        raise UserError(
            f"{type(processor).__name__} returns no {GRID} for an image, but CPPO inside verl checks views by it: "
            "inside verl it trains models such as Qwen2.5-VL and Qwen3-VL; train this one with `cppo train`"
        )


def _with_open_images(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [{**part, "image": _as_shown(part)} if "image" in part else part for part in content]}


def _as_shown(part: Mapping[str, Any]) -> Image.Image:
    """The image of a message part in the orientation that verl's models see; verl turns no image upright."""
    image = part["image"]
    if isinstance(image, str):
        path = Path(image.removeprefix("file://"))
        if not path.is_file():
            raise UserError(f"image {image!r}: there is no such file; give its bytes, or a path on every node")
        image = Image.open(path)
    shown = image.copy()
    # The place of EXIF data depends on the format, and all of it is here; only transparency belongs to the pixels.
    shown.info = {key: value for key, value in shown.info.items() if key == "transparency"}
    return shown


def stable_id(messages: Messages) -> str:
    """The id that the trainer gives a row without one, from its prompt and images."""
    text = prompt_text(messages)
    assert not isinstance(text, str)
    return stable_sample_id([_plain(message) for message in text], embedded_images(messages))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of images and one text after them as plain text, as in verl's dataset."""
    content = message["content"]
    if isinstance(content, list):
        *before, last = [part for part in content if part.get("type") != "image"] or [{}]
        if not before and last.get("type") == "text" and content[-1] is last:
            return {**message, "content": last["text"]}
        content = [{"type": part["type"], **{k: v for k, v in part.items() if k == "text"}} for part in content]
    return {**message, "content": content}
