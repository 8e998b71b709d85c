"""A micro-batch as the scorers take it: its rollouts, and those of them to score under their views."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError
from cppo.perception import ResponseScores, ViewScores
from cppo.policy.inside import INSIDE_KEYS
from cppo.policy.vision_inputs import (
    PER_TOKEN_KEYS,
    VISION_KEYS,
    VisionInputs,
    pick_rows,
    trimmed,
    without_empty_images,
)

KNOWN = {
    "advantages": "advantages",
    "old_logps": "old_per_token_logps",
    "reference_logps": "ref_per_token_logps",
}
"""Field of `ViewScores` for loss terms -> its key in TRL's micro-batches."""


def response_mask(inputs: Mapping[str, Any]) -> Tensor:
    """1 for tokens that the model generated, 0 for padding and tool output; [B, T]."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


@dataclass(frozen=True)
class Rollouts:
    """The B rollouts of a micro-batch, prompts of P and responses of T tokens, as inputs of the scorers.

    Attributes:
        input_ids, attention_mask: [B, P + T]; prompts padded on the left, responses on the right.
        num_response_tokens: T.
        vision: image inputs of the B rows together, where they are not packed.
        group_ids, images: each rollout's group and the image inputs of its prompt, for packing; a micro-batch keeps
            these images on the host.
        prompts, response_lengths: token ids and number of tokens, on the host, where known.
        more_inputs: model inputs beside images, for rows that are not packed; TRL's kernel cannot pass them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    num_response_tokens: int
    vision: VisionInputs = field(default_factory=dict)
    group_ids: Sequence[int] | None = None
    images: Sequence[VisionInputs] = ()
    prompts: Sequence[list[int]] | None = None
    response_lengths: Sequence[int] | None = None
    more_inputs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], packed: bool) -> "Rollouts":
        """From a buffered micro-batch."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].shape[1]
        if packed:
            known = inputs.get("prompt_tokens"), inputs.get("response_length")
            return cls(ids, mask, length, {}, inputs["group_id"], inputs["prompt_images"], *known)
        vision = without_empty_images({key: inputs.get(key) for key in VISION_KEYS})
        return cls(ids, mask, length, trimmed(vision, ids.shape[1]))

    def pick(self, places: Sequence[int]) -> "Rollouts":
        """Only these rollouts."""

        def chosen(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[place] for place in places]

        return Rollouts(
            self.input_ids[list(places)],
            self.attention_mask[list(places)],
            self.num_response_tokens,
            pick_rows(self.vision, places) if self.vision else {},
            chosen(self.group_ids),
            chosen(self.images or None) or (),
            chosen(self.prompts),
            chosen(self.response_lengths),
        )

    def chunks(self, size: int) -> list["Rollouts"]:
        """At most `size` rollouts at a time."""
        total = len(self.input_ids)
        if size >= total:
            return [self]
        return [self.pick(range(start, min(start + size, total))) for start in range(0, total, size)]


@dataclass(frozen=True)
class ViewRequest:
    """The rollouts of a micro-batch to score under their views.

    Attributes:
        views: row -> {view: processor outputs}, for the n rollouts that passed the gate (and were drawn, where their
            number is limited).
        view_keys: row -> key; rollouts of a group with the same key share their views.
        kinds: the views to score, of "removing" and "preserving".
        scored: views already scored, by kind; log-probabilities and entropies [n, T] without gradient.
        weights: of each in the loss, [n].
        response_mask: [n, T].
        draws: uniform random numbers for their tokens, [n, T], for random selection.
        known: their advantages and former log-probabilities, by the names of `ViewScores`, where a loss term needs
            them.
    """

    views: dict[int, dict[str, VisionInputs]]
    view_keys: Sequence[int]
    kinds: tuple[str, ...]
    weights: Tensor
    response_mask: Tensor
    draws: Tensor | None = None
    scored: Mapping[str, ResponseScores] = field(default_factory=dict)
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[int]:
        """Indices of the gated-in rollouts, in order."""
        return list(self.views)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], kinds: tuple[str, ...], taken: Collection[str] = ()) -> "ViewRequest":
        """The request of a micro-batch: the rows with views, or with views until `keep_scores` replaced them.

        taken: the additional inputs of a loss term (`needed`).

        Raises:
            UserError: one of `kinds` is missing, as in a checkpoint's rollouts after a change of options.
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
        keys = inputs.get("view_key", ())
        known = {name: inputs[key][rows] for name, key in KNOWN.items() if name in taken and key in inputs}
        weights, mask = inputs["perception_weights"][rows], response_mask(inputs)[rows]
        return cls(views, keys, kinds, weights, mask, draws, scored, known)

    def alone(self, kinds: tuple[str, ...]) -> "ViewRequest":
        """The same request for only the requested rollouts (`Rollouts.pick`) and these kinds."""
        keys = [self.view_keys[row] for row in self.views] if self.view_keys else ()
        return replace(self, views=dict(enumerate(self.views.values())), view_keys=keys, kinds=kinds)

    def keep_scores(self, inputs: dict[str, Any], scores: Mapping[str, ResponseScores]) -> None:
        """Replace the views in the micro-batch by the requested rollouts' scores."""
        inputs["perception_views"] = [None if own is None else {} for own in inputs["perception_views"]]
        for kind, found in scores.items():
            inputs[_kept(kind)] = torch.stack([found.logps, found.entropies])

    def view_inputs(self, row: int, kind: str, anchor: VisionInputs) -> VisionInputs:
        """Image inputs of one requested rollout under one view, with exactly the keys of its own, `anchor`.

        They are on the host, like all views. A view inside the model is added to the image's inputs.
        """
        if self.views[row][kind].keys() & INSIDE_KEYS:
            return {**anchor, **self.views[row][kind]}
        return {key: value if key in PER_TOKEN_KEYS else self.views[row][kind][key] for key, value in anchor.items()}

    def view_scores(self, anchor: ResponseScores, views: Mapping[str, ResponseScores], **found: Tensor) -> ViewScores:
        """The requested rollouts' scores under the image and each view, [n, T], and what was `found` during scoring."""
        views = {**self.scored, **views}
        removing, preserving = views.get("removing"), views.get("preserving")
        return ViewScores(anchor, removing, preserving, self.response_mask, self.draws, **self.known, **found)


@dataclass(frozen=True)
class ScoredMicroBatch:
    """The scores of the micro-batch in TRL's current loss, for TRL's calls back; only for its rows."""

    rollouts: Rollouts
    scores: ResponseScores

    def scores_of(self, input_ids: Tensor, attention_mask: Tensor) -> ResponseScores:
        """The scores of these rows, [B, P + T]. Raises RuntimeError for rows outside the micro-batch."""
        own = self.rollouts
        if input_ids.shape != own.input_ids.shape or bool(
            ((input_ids != own.input_ids) | (attention_mask != own.attention_mask)).any()
        ):
            raise RuntimeError("TRL asks, while it computes a loss, for scores of other rows than the micro-batch's")
        return self.scores


def _kept(kind: str) -> str:
    """The key of a view's scores in a micro-batch."""
    return f"perception_{kind}_scores"
