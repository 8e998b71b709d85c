"""Views that rollouts are made from: plain augmentation, and NoisyRollout's mix (arXiv 2504.13055)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cppo.training.view_inputs import (
    Row,
    canonical_rows,
    embedded_images,
    first_copies,
    prompt_images,
    replace_images,
    run_progress,
    sample_id,
)
from cppo.views import ViewStrengths, drawn_view, view_generators


@dataclass(frozen=True)
class RolloutViews:
    """Draws views for rollouts as a pure function of (seed, sample id, epoch, image index, progress of the run).

    Attributes:
        families: of the views, one drawn for each image.
        strengths: theirs.
        fraction: of the prompts (`augmented`) or of each group's rollouts (`mixed`).
    """

    seed: int
    families: Sequence[str]
    strengths: ViewStrengths
    fraction: float

    def augmented(self, rows: Sequence[Row], epoch: int, progress: float) -> list[Row]:
        """The rows, where that fraction of the prompts, drawn for each alone, show views; copies share theirs.

        progress: as for `ViewStrengths.at`.
        """
        shown: list[Row] = []
        for index, (row, first) in enumerate(zip(rows, first_copies(rows), strict=True)):
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

    def mixed(
        self, rows: Sequence[Row], first: int, group_size: int, epoch: int, progress: float
    ) -> list[list[Image.Image]]:
        """The images that each row's rollout is made from: a view for the last rollouts of a group, else its own.

        Args:
            first: place of the first row among those of all processes.
            group_size: G; `round(fraction * G)` rollouts see the view, which is the same for all of them.
        """
        unchanged = group_size - round(self.fraction * group_size)
        images: list[list[Image.Image]] = []
        views: dict[int, list[Image.Image]] = {}
        for place, (row, prompt) in enumerate(zip(rows, first_copies(rows), strict=True), start=first):
            own = prompt_images(row)
            if place % group_size >= unchanged and prompt not in views:
                views[prompt] = self._views(own, f"{sample_id(row)}/rollout", epoch, progress)
            images.append(views[prompt] if place % group_size >= unchanged else own)
        return images

    def _views(self, images: Sequence[Image.Image], name: str, epoch: int, progress: float) -> list[Image.Image]:
        strengths = self.strengths.at(progress)
        return [
            drawn_view(self.families, image, view_generators(self.seed, name, epoch, index)[0], strengths)
            for index, image in enumerate(images)
        ]


def rollout_rows(trainer: Any, inputs: Sequence[Row], step: int) -> list[Row]:
    """The canonical rows of a generation batch that begins after `step` steps; in training augmented on request."""
    rows, args = canonical_rows(inputs), trainer.args
    views = args.rollout_view_sampler()
    if views is None or args.rollout_view_mode != "augment" or not trainer.model.training:
        return rows
    return views.augmented(rows, math.floor(trainer.state.epoch or 0), run_progress(trainer, step))
