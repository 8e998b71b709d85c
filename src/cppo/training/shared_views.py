"""Score a micro-batch and its views from one packed row: each prompt and image once per group and view.

The order inside the one forward pass: the head on anchor and I- (one gives the entropies that detection needs and the
negative at once), then the selection, then the head on I+ at the selected tokens alone.
"""

from typing import Any

import torch
from torch import Tensor

from cppo.perception import EXACT_DIVERGENCES
from cppo.policy import LanguageHead, PackedBatch, PromptGroup, ResponseScores, pack, prompt_groups, unwrapped
from cppo.policy.vision_inputs import VisionInputs
from cppo.training.config import CPPOConfig
from cppo.training.perception_term import ExactDivergences, perception_token_mask
from cppo.training.view_scoring import ViewRequest


def score_shared(
    model: Any,
    args: CPPOConfig,
    request: ViewRequest,
    input_ids: Tensor,
    attention_mask: Tensor,
    vision: VisionInputs,
) -> None:
    """Score all rows as they are and the requested ones under their views; keep the scores in the request.

    Args:
        model: has `cppo.policy.add_shared_prompt_forward`, or wraps such a model.
        args: the options `perception_*` and the sampling temperature.
        request: of this micro-batch.
        input_ids, attention_mask: [B, P + T].
        vision: image inputs of the B rows.
    """
    num_tokens = request.response_mask.shape[1]
    anchors = prompt_groups(input_ids, attention_mask, num_tokens, vision)
    views = {kind: _view_groups(request, kind, anchors, vision, input_ids.device) for kind in request.kinds}
    batch = pack(
        unwrapped(model),
        input_ids,
        attention_mask,
        num_tokens,
        {"anchor": anchors, **views},
        sequential=args.perception_memory == "sequential",
        detached=() if args.perception_view_gradients else request.kinds,
    )
    found = model(shared_prompt=batch, readout=_Readout(args, request, batch))

    def rows_of(view: str) -> ResponseScores:
        return ResponseScores(
            batch.unpack(view, found[f"{view}_logps"]), batch.unpack(view, found[f"{view}_entropies"])
        )

    def exact(name: str) -> Tensor | None:
        return batch.unpack(request.kinds[0], found[name])[request.rows] if name in found else None

    request.anchor = rows_of("anchor")
    if request.rows:
        divergences = ExactDivergences(exact("score"), exact("d_preserving"), exact("d_removing"))
        request.keep({kind: rows_of(kind).pick(request.rows) for kind in request.kinds}, divergences)


def _view_groups(
    request: ViewRequest, kind: str, anchors: list[PromptGroup], vision: VisionInputs, device: torch.device
) -> list[PromptGroup]:
    """The requested rows under one view, together where they share prompt and views."""
    place = {row: index for index, row in enumerate(request.rows)}
    groups = []
    for anchor in anchors:
        by_views: dict[int, list[int]] = {}
        for row in anchor.rows:
            if row in place:
                # The rollouts of a prompt share one dictionary; equal prompts of other rows have views of their own.
                by_views.setdefault(id(request.views[place[row]]), []).append(row)
        groups += [
            PromptGroup(rows, request.view_inputs(place[rows[0]], kind, vision, device)) for rows in by_views.values()
        ]
    return groups


class _Readout:
    """What is read off the hidden states of a packed batch; runs inside the model's forward."""

    def __init__(self, args: CPPOConfig, request: ViewRequest, batch: PackedBatch) -> None:
        self.args, self.request, self.batch = args, request, batch
        # All views hold the same tokens in the same order.
        self.any_view = next(view for view in batch.tokens if view != "anchor")

    def __call__(self, hidden: Tensor, head: LanguageHead) -> dict[str, Tensor]:
        args, batch = self.args, self.batch
        anchor = batch.tokens["anchor"]
        removing, preserving = batch.tokens.get("removing"), batch.tokens.get("preserving")
        found: dict[str, Tensor] = {}

        def score(view: str, states: Tensor, targets: Tensor) -> None:
            found[f"{view}_logps"], found[f"{view}_entropies"] = head.scores(states, targets, args.temperature)

        score("anchor", hidden[anchor], batch.targets[anchor])
        if not self.request.rows:
            return found
        if removing is not None:
            with torch.set_grad_enabled(args.perception_view_gradients and torch.is_grad_enabled()):
                score("removing", hidden[removing], batch.targets[removing])
        # Where the requested rows' tokens lie among the anchor's, in the order of the views.
        anchor_places = batch.gather(self.any_view, self._places("anchor"))
        if removing is not None and args.perception_score in EXACT_DIVERGENCES:
            with torch.no_grad():
                found["score"] = head.divergence(
                    args.perception_score, hidden[anchor][anchor_places], hidden[removing], args.temperature
                )
        selected = torch.zeros(batch.shape, dtype=torch.bool, device=hidden.device)
        selected[self.request.rows] = self._selected(found)
        picked = batch.gather(self.any_view, selected).nonzero().squeeze(1)
        compared = {} if removing is None else {"d_removing": removing}
        if preserving is not None:
            compared["d_preserving"] = preserving
            with torch.set_grad_enabled(args.perception_view_gradients and torch.is_grad_enabled()):
                score("preserving", hidden[preserving][picked], batch.targets[preserving][picked])
            for name in ("preserving_logps", "preserving_entropies"):
                found[name] = self._spread(found[name], picked)
        if args.perception_divergence in EXACT_DIVERGENCES:
            for name, view in compared.items():
                values = head.divergence(
                    args.perception_divergence,
                    hidden[anchor][anchor_places[picked]],
                    hidden[view][picked],
                    args.temperature,
                    anchor_gradients=args.perception_anchor_gradients,
                    view_gradients=args.perception_view_gradients,
                )
                found[name] = self._spread(values, picked)
        return found

    def _places(self, view: str) -> Tensor:
        """[B, T]: each scored token's place among the view's."""
        part = self.batch.tokens[view]
        places = torch.arange(part.stop - part.start, device=self.batch.targets.device)
        return self.batch.unpack(view, places)

    def _spread(self, values: Tensor, picked: Tensor) -> Tensor:
        """Values of the picked tokens among zeros for the view's other tokens."""
        part = self.batch.tokens[self.any_view]
        return values.new_zeros(part.stop - part.start).index_put((picked,), values)

    def _selected(self, found: dict[str, Tensor]) -> Tensor:
        """The selected tokens of the requested rows, bool [n, T]."""
        batch, request = self.batch, self.request

        def scores(view: str) -> ResponseScores:
            values = (found[f"{view}_{name}"].detach() for name in ("logps", "entropies"))
            return ResponseScores(*(batch.unpack(view, value)[request.rows] for value in values))

        exact = batch.unpack("removing", found["score"])[request.rows] if "score" in found else None
        removing = scores("removing") if "removing" in batch.tokens else None
        mask, draws = request.response_mask, request.draws
        return perception_token_mask(self.args, scores("anchor"), removing, mask, exact, draws).token_mask
