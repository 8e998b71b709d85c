"""The views of a generation batch: views for scoring, and views that rollouts are made from."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from PIL import Image

from cppo.errors import UserError
from cppo.messages import Messages, embedded_images, replace_images
from cppo.policy.prompts import PromptInputs, Row, prompt_images, prompt_messages, sample_id
from cppo.policy.vision_inputs import VisionInputs
from cppo.training.rollouts import GenerationBatch
from cppo.views import PixelRoom, ViewSampler, ViewStrengths, drawn_view, view_generators

ViewPair = Future[tuple[Image.Image, Image.Image]]
"""The views I+ and I- of one image, as futures."""
SHOWN = "cppo_shown"
"""The attribute of an image that holds the view for its rollout."""
InputView = Callable[[Messages | str, list[int], np.random.Generator], VisionInputs]
"""(prompt with images, its tokens, random stream) -> inputs of its view."""


class ViewMaker:
    """Makes the views of a generation batch: pixels on other threads while rollouts are generated, inputs afterwards.

    Args:
        sampler: draws the perturbed images.
        threads: number of drawing threads, at least 1.
        process: prompt -> the model's inputs.
        draws: when new views are drawn, the option `view_draws`.
        of_inputs: views of the model's inputs, by kind.
    """

    def __init__(
        self,
        sampler: ViewSampler,
        threads: int,
        process: Callable[[Messages | str], PromptInputs],
        draws: str = "epoch",
        of_inputs: Mapping[str, InputView] | None = None,
    ) -> None:
        self._sampler, self._draws, self._process = sampler, draws, process
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cppo-views")
        self._room, self._of_inputs = PixelRoom(), of_inputs or {}

    def begin(
        self, batch: GenerationBatch, epoch: int, progress: float = 0.0, kinds: Sequence[str] = ("removing",)
    ) -> "BatchViews":
        """Start the views of a batch; a group's rollouts share them, unless each has its own.

        Args:
            epoch: the pass over the data.
            progress: as for `ViewStrengths.at`.
            kinds: the views needed later; without any, none is made.
        """
        alone = self._draws == "rollout"
        firsts = list(range(len(batch.rows))) if alone else batch.firsts
        sampler, key = self._sampler.at(progress), 0 if self._draws == "once" else epoch
        begun, seeds = {}, {}
        for first in dict.fromkeys(firsts):
            row = batch.rows[first]
            name = f"{sample_id(row)}/rollout-{batch.numbers[first]}" if alone else sample_id(row)
            seeds[first] = (sampler.seed, name, key)
            # From copies: reward functions get the row's own images and may change them meanwhile.
            begun[first] = [
                self._pool.submit(self._views, sampler, image.copy(), name, key, index)
                for index, image in enumerate(prompt_images(row) if set(kinds) - self._of_inputs.keys() else ())
            ]
        return BatchViews(self._process, batch.rows, firsts, begun, seeds, self._of_inputs)

    def _views(
        self, sampler: ViewSampler, image: Image.Image, name: str, key: int, index: int
    ) -> tuple[Image.Image, Image.Image]:
        with self._room.taken(image.size):
            return sampler.views(image, name, key, index)


@dataclass(frozen=True)
class BatchViews:
    """The views of one generation batch, in progress.

    Attributes:
        process: prompt -> the model's inputs.
        rows: of the batch.
        keys: for each rollout, its view key: the first rollout that shares its views.
        begun: for each key the pairs (I+, I-) of its images; empty where no view is a picture.
        seeds: for each key the seed, the name and the epoch that its random streams depend on.
        of_inputs: as for `ViewMaker`.
    """

    process: Callable[[Messages | str], PromptInputs]
    rows: Sequence[Row]
    keys: Sequence[int]
    begun: Mapping[int, list[ViewPair]]
    seeds: Mapping[int, tuple[int, str, int]]
    of_inputs: Mapping[str, InputView] = field(default_factory=dict)

    def inputs(
        self, gate: Sequence[bool], prompt_tokens: Sequence[list[int]], kinds: Sequence[str]
    ) -> list[dict[str, VisionInputs] | None]:
        """For each gated-in row, the model's inputs under the views of these kinds; None for the other rows.

        The processor runs once per prompt, and its rollouts share the same tensors. Views of other prompts that are not
        begun are never made.

        Args:
            gate: the gated-in rows.
            prompt_tokens: each row's prompt tokens in the anchor.
            kinds: "removing", "preserving" or both.

        Raises:
            UserError: a view cannot be made, or has other prompt tokens than its image.
        """
        wanted = {key for key, gated_in in zip(self.keys, gate, strict=True) if gated_in}
        for key in self.begun.keys() - wanted:
            for pair in self.begun[key]:
                pair.cancel()
        made = {key: self._of_prompt(key, prompt_tokens[key], kinds) for key in sorted(wanted)}
        return [made[key] if gated_in else None for key, gated_in in zip(self.keys, gate, strict=True)]

    def _of_prompt(self, first: int, tokens: list[int], kinds: Sequence[str]) -> dict[str, VisionInputs]:
        row, pairs = self.rows[first], [pair.result() for pair in self.begun[first]]
        views = {"preserving": [pair[0] for pair in pairs], "removing": [pair[1] for pair in pairs]}
        inputs = {}
        for kind in kinds:
            if kind in self.of_inputs:
                _, removing = view_generators(*self.seeds[first], 0)
                inputs[kind] = self.of_inputs[kind](prompt_messages(row), tokens, removing)
                continue
            view = self.process(replace_images(prompt_messages(row), views[kind]))
            if view.token_ids != tokens:
                raise UserError(
                    f"row {sample_id(row)}: the processor makes other prompt tokens for a view "
                    f"({len(view.token_ids)}) than for the image itself ({len(tokens)}); use a processor with a "
                    "number of image tokens that depends only on the image's size"
                )
            inputs[kind] = view.vision
        return inputs


@dataclass(frozen=True)
class RolloutViews:
    """Draws views that rollouts are made from: augmentation, and NoisyRollout's mix (arXiv 2504.13055).

    A pure function of (seed, sample id, epoch, image index, progress of the run).

    Attributes:
        families: of the views, one drawn per image.
        strengths: of the views.
        fraction: of the prompts (`augmented`) or of each group's rollouts (`mixed`).
    """

    seed: int
    families: Sequence[str]
    strengths: ViewStrengths
    fraction: float

    def augmented(self, batch: GenerationBatch, epoch: int, progress: float) -> list[Row]:
        """The rows; the given fraction of prompts, drawn one by one, shows views, shared in a group.

        progress: as for `ViewStrengths.at`.
        """
        shown: list[Row] = []
        for index, (row, first) in enumerate(zip(batch.rows, batch.firsts, strict=True)):
            if first != index:
                shown.append({**row, "prompt": shown[first]["prompt"], "images": shown[first]["images"]})
                continue
            name = f"{sample_id(row)}/rollout"
            choice, _ = view_generators(self.seed, name, epoch, -1)
            if choice.random() >= self.fraction:
                shown.append(row)
                continue
            images, prompt = row["images"], row["prompt"]
            views = self._views([*images, *embedded_images(prompt)], name, epoch, progress)
            prompt = replace_images(prompt, views[len(images) :])
            shown.append({**row, "prompt": prompt, "images": views[: len(images)]})
        return shown

    def sees_view(self, number: int, group_size: int) -> bool:
        """Whether the rollout of this number in its group is made from a view: the last `round(fraction * G)` are."""
        return number >= group_size - round(self.fraction * group_size)

    def mixed(self, batch: GenerationBatch, group_size: int, epoch: int, progress: float) -> list[Row]:
        """The rows; images of the rollouts that see a view carry it (`shown_image`), the same in a group."""
        views: dict[int, list[Image.Image]] = {}
        rows = []
        for row, group, number in zip(batch.rows, batch.group_ids, batch.numbers, strict=True):
            if not self.sees_view(number, group_size):
                rows.append(row)
                continue
            embedded = [image.copy() for image in embedded_images(row["prompt"])]
            own = {**row, "prompt": replace_images(row["prompt"], embedded)}
            own["images"] = [image.copy() for image in row["images"]]
            if group not in views:
                views[group] = self._views(prompt_images(own), f"{sample_id(row)}/rollout", epoch, progress)
            for image, view in zip(prompt_images(own), views[group], strict=True):
                image.info[SHOWN] = view
            rows.append(own)
        return rows

    def _views(self, images: Sequence[Image.Image], name: str, epoch: int, progress: float) -> list[Image.Image]:
        strengths = self.strengths.at(progress)
        return [
            drawn_view(self.families, image, view_generators(self.seed, name, epoch, index)[0], strengths)
            for index, image in enumerate(images)
        ]


def shown_image(image: Image.Image) -> Image.Image:
    """The view that an image's rollout is made from, or the image itself."""
    return cast(Image.Image, image.info.get(SHOWN, image))
