"""Score a micro-batch and its views from one packed row: each prompt and image once per group and view.

The order inside the one forward pass: the head on anchor and I- (one gives the entropies that detection needs and the
negative at once), then the selection, then the head on I+ at the selected tokens alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.perception import EXACT_DIVERGENCES
from cppo.policy import LanguageHead, PackedBatch, PromptGroup, ResponseScores, pack, prompt_groups, unwrapped
from cppo.policy.vision_inputs import VisionInputs
from cppo.training.config import CPPOConfig
from cppo.training.perception_term import ViewScores, perception_token_mask
from cppo.training.view_scoring import ViewRequest


def score_shared(
    model: Any,
    args: CPPOConfig,
    request: ViewRequest,
    input_ids: Tensor,
    attention_mask: Tensor,
    vision: VisionInputs,
) -> tuple[ResponseScores, ViewScores | None]:
    """Scores of all rows as they are, and those of the requested ones under their views; None if there are none.

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
    found = model(shared_prompt=batch, readout=partial(_read, args, request, batch))
    anchor = ResponseScores(found["anchor_logps"], found["anchor_entropies"])
    return anchor, _view_scores(request, found) if request.rows else None


def _view_groups(
    request: ViewRequest, kind: str, anchors: list[PromptGroup], vision: VisionInputs, device: torch.device
) -> list[PromptGroup]:
    """The requested rows under one view, together where they share prompt and views."""
    groups = []
    for anchor in anchors:
        by_views: dict[int, list[int]] = {}
        for row in anchor.rows:
            if row in request.views:
                # The rollouts of a prompt share one dictionary; equal prompts of other rows have views of their own.
                by_views.setdefault(id(request.views[row]), []).append(row)
        groups += [PromptGroup(rows, request.view_inputs(rows[0], kind, vision, device)) for rows in by_views.values()]
    return groups


def _read(
    args: CPPOConfig, request: ViewRequest, batch: PackedBatch, hidden: Tensor, head: LanguageHead
) -> dict[str, Tensor]:
    """What is read off the hidden states of a packed batch, inside the model's forward: by name, [B, T] each.

    A token that was not scored under a view has 0.
    """
    found: dict[str, Tensor] = {}

    def score(view: str, places: slice | Tensor) -> None:
        logps, entropies = head.scores(hidden[places], batch.targets[places], args.temperature)
        found[f"{view}_logps"] = batch.unpack(places, logps)
        found[f"{view}_entropies"] = batch.unpack(places, entropies)

    def divergence(name: str, places: slice | Tensor, **gradients: bool) -> Tensor:
        anchor = hidden[batch.counterparts("anchor", places)]
        return batch.unpack(places, head.divergence(name, anchor, hidden[places], args.temperature, **gradients))

    score("anchor", batch.tokens["anchor"])
    if not request.rows:
        return found
    view_gradients = args.perception_view_gradients and torch.is_grad_enabled()
    if "removing" in request.kinds:
        with torch.set_grad_enabled(view_gradients):
            score("removing", batch.tokens["removing"])
        if args.perception_score in EXACT_DIVERGENCES:
            with torch.no_grad():
                found["score"] = divergence(args.perception_score, batch.tokens["removing"])
    selected = torch.zeros(batch.shape, dtype=torch.bool, device=hidden.device)
    selected[request.rows] = perception_token_mask(args, _view_scores(request, found)).token_mask
    places = {view: batch.places(view, selected) for view in request.kinds}
    if "preserving" in request.kinds:
        everywhere = bool(args.perception_preserving_entropy_weight)
        with torch.set_grad_enabled(view_gradients):
            score("preserving", batch.tokens["preserving"] if everywhere else places["preserving"])
    if args.perception_divergence in EXACT_DIVERGENCES:
        for view in request.kinds:
            found[f"d_{view}"] = divergence(
                args.perception_divergence,
                places[view],
                anchor_gradients=args.perception_anchor_gradients,
                view_gradients=args.perception_view_gradients,
            )
    return found


def _view_scores(request: ViewRequest, found: dict[str, Tensor]) -> ViewScores:
    """What was read off so far, of the requested rows."""
    own = {name: values[request.rows] for name, values in found.items()}
    scores = {
        view: ResponseScores(own[f"{view}_logps"], own[f"{view}_entropies"])
        for view in ("anchor", *request.kinds)
        if f"{view}_logps" in own
    }
    exact = {name: own[name] for name in ("score", "d_preserving", "d_removing") if name in own}
    return request.view_scores(scores["anchor"], scores, **exact)
