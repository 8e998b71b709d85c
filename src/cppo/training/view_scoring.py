"""Score gated-in rollouts under their views together with the anchor, as further rows of one forward pass.

One forward a backward keeps DDP and FSDP safe (several forwards would mark a parameter ready twice), and ranks with and
without gated-in rollouts run the same number of passes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError
from cppo.policy import ResponseScores, concatenate_rows, slice_rows
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs, trimmed, without_empty_images
from cppo.training.perception_term import ViewScores

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
"""Inputs of TRL's buffered micro-batches that describe images."""


def model_inputs(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, VisionInputs]:
    """Input ids and attention mask, [B, P + T] each, and the image inputs of a buffered micro-batch."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    vision = without_empty_images({key: inputs.get(key) for key in VISION_KEYS})
    return ids, mask, trimmed(vision, ids.shape[1])


Score = Callable[[Tensor, Tensor, VisionInputs], ResponseScores]
"""(input ids [B, P + T], attention mask [B, P + T], vision inputs) -> scores of the last T tokens of each row."""


def response_mask(inputs: dict[str, Any]) -> Tensor:
    """1 for tokens that the model itself generated: no padding, no tool output; [B, T]."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


@dataclass(frozen=True)
class ViewRequest:
    """The rows of a micro-batch to be scored under their views.

    Attributes:
        views: by the places of the n gated-in rollouts in the micro-batch (where their number is bounded, of those
            drawn) the model's image inputs under the views that were made.
        kinds: the views to score, of "removing" and "preserving".
        scored: those that are scored already, by kind; log-probabilities and entropies [n, T] without gradient.
        weights: of each in the loss, [n].
        response_mask: theirs, [n, T].
        draws: uniform random numbers for their tokens, [n, T], where tokens are selected at random.
    """

    views: dict[int, dict[str, VisionInputs]]
    kinds: tuple[str, ...]
    weights: Tensor
    response_mask: Tensor
    draws: Tensor | None = None
    scored: Mapping[str, ResponseScores] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Places of the gated-in rollouts, in order."""
        return list(self.views)

    @classmethod
    def of(cls, inputs: dict[str, Any], kinds: tuple[str, ...]) -> "ViewRequest":
        """The request of a micro-batch: the rows that carry views, or carried them until `keep_scores` had theirs.

        Raises:
            UserError: they lack one of `kinds`, as rollouts of a checkpoint can after a change of options.
        """
        views = {row: own for row, own in enumerate(inputs["perception_views"]) if own is not None}
        scored = {kind: ResponseScores(*inputs[_kept(kind)]) for kind in kinds if _kept(kind) in inputs}
        kinds = tuple(kind for kind in kinds if kind not in scored)
        for kind in kinds:
            if any(kind not in own for own in views.values()):
                raise UserError(
                    f"the checkpoint's unfinished rollouts have no {kind} views, which the changed options need: "
                    "resume with its own perception options, or from a checkpoint of another step"
                )
        rows = list(views)
        draws = inputs["perception_draws"][rows] if "perception_draws" in inputs else None
        weights, mask = inputs["perception_weights"][rows], response_mask(inputs)[rows]
        return cls(views, kinds, weights, mask, draws, scored)

    def keep_scores(self, inputs: dict[str, Any], scores: Mapping[str, ResponseScores]) -> None:
        """Put the requested rows' scores into their micro-batch, in the place of the views."""
        inputs["perception_views"] = [None if own is None else {} for own in inputs["perception_views"]]
        for kind, found in scores.items():
            inputs[_kept(kind)] = torch.stack([found.logps, found.entropies])

    def view_inputs(self, row: int, kind: str, anchor: VisionInputs, device: torch.device) -> VisionInputs:
        """Image inputs of one of the requested rows under one view, with exactly the anchor's keys."""
        inputs: VisionInputs = {}
        for key, value in anchor.items():
            found = value[row : row + 1] if key in PER_TOKEN_KEYS else self.views[row][kind][key]
            inputs[key] = found.to(device) if isinstance(found, Tensor) else found
        return inputs

    def score(
        self, score: Score, input_ids: Tensor, attention_mask: Tensor, vision: VisionInputs, view_gradients: bool
    ) -> tuple[ResponseScores, ViewScores | None]:
        """Scores of all rows as they are, and those of the requested ones under their views; None if there are none.

        Without `view_gradients` the views take a second pass that builds no graph.
        """
        n, total = len(self.views), input_ids.shape[0]
        if not (n and self.kinds):
            anchor = score(input_ids, attention_mask, vision)
            return anchor, self.view_scores(anchor.pick(self.rows), {}) if n else None
        ids, mask = [input_ids[self.rows]] * len(self.kinds), [attention_mask[self.rows]] * len(self.kinds)
        parts = [self.view_inputs(row, kind, vision, input_ids.device) for kind in self.kinds for row in self.rows]
        if view_gradients:
            scores = score(
                torch.cat([input_ids, *ids]), torch.cat([attention_mask, *mask]), concatenate_rows([vision, *parts])
            )
            anchor, views = scores.pick(slice(total)), scores.pick(slice(total, None))
        else:
            anchor = score(input_ids, attention_mask, vision)
            with torch.no_grad():
                views = score(torch.cat(ids), torch.cat(mask), concatenate_rows(parts))
        by_kind = {kind: views.pick(slice(n * place, n * (place + 1))) for place, kind in enumerate(self.kinds)}
        return anchor, self.view_scores(anchor.pick(self.rows), by_kind)

    def view_scores(self, anchor: ResponseScores, views: Mapping[str, ResponseScores], **exact: Tensor) -> ViewScores:
        """The requested rows' scores under the image and each view, [n, T], as the perception term takes them.

        exact: the divergences over the vocabulary that were taken along, by their names in `ViewScores`.
        """
        views = {**self.scored, **views}
        removing, preserving = views.get("removing"), views.get("preserving")
        return ViewScores(anchor, removing, preserving, self.response_mask, self.draws, **exact)


def _kept(kind: str) -> str:
    """Where a micro-batch keeps the scores under a view."""
    return f"perception_{kind}_scores"


def scores_in_chunks(
    score: Score, input_ids: Tensor, attention_mask: Tensor, vision: VisionInputs, chunk: int
) -> ResponseScores:
    """Score all rows, `chunk` of them at a time (TRL's own cut fails on a chunk of text-only rows); no logits."""
    if chunk >= input_ids.shape[0]:
        return score(input_ids, attention_mask, vision)
    parts = []
    for start in range(0, input_ids.shape[0], chunk):
        end = min(start + chunk, input_ids.shape[0])
        parts.append(score(input_ids[start:end], attention_mask[start:end], slice_rows(vision, start, end)))
    losses = [part.aux_loss for part in parts if part.aux_loss is not None]
    return ResponseScores(
        torch.cat([part.logps for part in parts]),
        torch.cat([part.entropies for part in parts]),
        None,
        torch.stack(losses).mean() if losses else None,
    )


@torch.no_grad()
def idle_pass(score: Score, input_ids: Tensor, attention_mask: Tensor, vision: VisionInputs) -> None:
    """Score one row for nothing: wrappers exchange buffers or weights on each pass, and ranks must make as many.

    A row with images if there is one, since those of the other ranks have some.
    """
    images = vision.get("num_images") or [0]
    row = next((row for row, count in enumerate(images) if count), 0)
    score(input_ids[row : row + 1], attention_mask[row : row + 1], slice_rows(vision, row, row + 1))
