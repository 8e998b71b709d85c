"""Score rollouts under the image and their views: `score_under_views`, for the loss and before an update.

One forward per backward keeps DDP and FSDP safe (several forwards would mark a parameter ready twice). Ranks with and
without gated-in rollouts run the same number of passes. In a packed forward, the head runs on the anchor and the views
that the score compares. Then tokens are selected, and the head runs on I+ at these tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.perception import (
    EXACT_DIVERGENCES,
    SCORES,
    SIMILARITIES,
    ResponseScores,
    ViewScores,
    detect,
    needed,
    over_anchor_logits,
    over_logits,
    views_of,
)
from cppo.policy import LanguageHead, PackedBatch, PromptGroup, concatenate_rows, pack, plain_scores, prompt_groups
from cppo.policy.inside import INSIDE_KEYS
from cppo.policy.inside_rows import rows_inside
from cppo.policy.similarity import Similarities, packed_similarities
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs, slice_rows
from cppo.training.config import CPPOConfig
from cppo.training.micro_batch import Rollouts, ViewRequest


@dataclass(frozen=True)
class Scorer:
    """Scores a trainer's rollouts.

    Attributes:
        args: the options, with the sampling temperature.
        policy: the transformers model inside the wrappers; the reference has its configuration.
        autocast: the context in which a model runs.
        kernel: TRL's function for rows that are not packed: (model, rollouts, entropies?, auxiliary loss?) -> scores;
            None where the model needs full logits.
        aux_loss: whether updates need a mixture-of-experts model's load-balancing loss.
        processes: number of training processes.
    """

    args: CPPOConfig
    policy: Any
    autocast: Callable[[], AbstractContextManager[Any]]
    kernel: Callable[[Any, Rollouts, bool, bool], ResponseScores] | None
    aux_loss: bool
    processes: int

    def score(self, model: Any, rollouts: Rollouts, entropies: bool = True, aux_loss: bool = False) -> ResponseScores:
        """Score rollouts under the image: packed, with full logits, or by TRL's kernel. model: policy or reference."""
        if rollouts.group_ids is not None:
            return _score_packed(self, model, rollouts, None)[0]
        kernel = None if rollouts.more_inputs else self.kernel
        # Logits and hidden states come only with entropies: reference and old log-probabilities need none of them.
        if kernel is not None and not (entropies and self.args.needs_logits):
            return kernel(model, rollouts, entropies, aux_loss)
        with self.autocast():
            return plain_scores(
                model,
                rollouts.input_ids,
                rollouts.attention_mask,
                rollouts.num_response_tokens,
                self.args.temperature,
                rollouts.vision,
                aux_loss,
                entropies and "hidden_states" in needed(self.args),
                needed(self.args) & SIMILARITIES if entropies else (),
                rollouts.more_inputs,
            )


def score_under_views(
    scorer: Scorer, model: Any, rollouts: Rollouts, request: ViewRequest | None
) -> tuple[ResponseScores, ViewScores | None]:
    """Score all rollouts under the image and the requested ones under their views, and find their perception tokens.

    One forward pass; without `perception_view_gradients` a second pass, which builds no graph, scores the views.

    Args:
        model: the policy, or its wrapper.
        request: of this micro-batch; None without views.

    Returns:
        Log-probabilities and entropies of the B rollouts, and the scores of the n requested ones; None if n is 0.
    """
    if rollouts.group_ids is not None:
        return _score_packed(scorer, model, rollouts, request)
    score = partial(scorer.score, model, aux_loss=scorer.aux_loss)
    if request is None:
        return score(rollouts), None
    n, total = len(request.views), len(rollouts.input_ids)
    if not (n and request.kinds):
        anchor = score(rollouts)
        if scorer.args.separate_view_pass and request.kinds and not n:
            idle_pass(scorer, model, rollouts)
        return anchor, detect(request.view_scores(anchor.pick(request.rollouts), {}), scorer.args) if n else None
    if scorer.args.perception_view_gradients or not torch.is_grad_enabled():
        scores = score(plain_rows(scorer.policy, rollouts, request, with_images=True))
        anchor, views = scores.pick(slice(total)), scores.pick(slice(total, None))
    else:
        anchor = score(rollouts)
        with torch.no_grad():
            views = score(plain_rows(scorer.policy, rollouts, request))
    by_kind = {kind: views.pick(slice(n * place, n * (place + 1))) for place, kind in enumerate(request.kinds)}
    return anchor, detect(request.view_scores(anchor.pick(request.rollouts), by_kind), scorer.args)


@torch.no_grad()
def idle_pass(scorer: Scorer, model: Any, rollouts: Rollouts) -> None:
    """Score one row and discard the result, unless a process trains alone: wrappers exchange buffers or weights on each
    pass, and ranks must run as many.

    A row with images if there is one, because other ranks' rows have some.
    """
    if scorer.processes > 1:
        counts = rollouts.vision.get("num_images") or ["pixel_values" in images for images in rollouts.images]
        row = next((row for row, count in enumerate(counts) if count), 0)
        scorer.score(model, rollouts.pick([row]))


# Plain rows: one per rollout and view, for the plain scorer and TRL's kernel


def plain_rows(policy: Any, rollouts: Rollouts, request: ViewRequest, with_images: bool = False) -> Rollouts:
    """The requested rollouts under each view, kind by kind; `with_images` puts all rollouts under the image first."""
    ids, mask, length = rollouts.input_ids, rollouts.attention_mask, rollouts.num_response_tokens
    parts = [view_images(request, rollout, kind, rollouts) for kind in request.kinds for rollout in request.rollouts]
    ids, mask = (
        torch.cat([rows] * with_images + [rows[request.rollouts]] * len(request.kinds)) for rows in (ids, mask)
    )
    if not any(part.keys() & INSIDE_KEYS for part in parts):
        vision = concatenate_rows([rollouts.vision] * with_images + parts)
        return replace(rollouts, input_ids=ids, attention_mask=mask, vision=vision)
    if with_images:
        parts = [slice_rows(rollouts.vision, row, row + 1) for row in range(len(rollouts.input_ids))] + parts
    made = rows_inside(policy, ids, mask, length, parts)
    return replace(
        rollouts,
        input_ids=made.input_ids,
        attention_mask=made.attention_mask,
        vision=made.vision,
        more_inputs=made.inputs,
    )


def view_images(request: ViewRequest, row: int, kind: str, rollouts: Rollouts) -> VisionInputs:
    """Image inputs of one requested row under one view, for rows that are not packed."""
    vision = rollouts.vision
    if request.views[row][kind].keys() & INSIDE_KEYS:
        return {**slice_rows(vision, row, row + 1), **request.views[row][kind]}
    own = {key: value[row : row + 1] if key in PER_TOKEN_KEYS else value for key, value in vision.items()}
    device = rollouts.input_ids.device
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in request.view_inputs(row, kind, own).items()
    }


# Packed rows: each prompt and image once per group and view


def _score_packed(
    scorer: Scorer, model: Any, rollouts: Rollouts, request: ViewRequest | None
) -> tuple[ResponseScores, ViewScores | None]:
    """`score_under_views` from one packed row. model: has `add_shared_prompt_forward`, or wraps such a model."""
    assert rollouts.group_ids is not None
    args = scorer.args
    anchors = prompt_groups(rollouts.group_ids, rollouts.images)
    views = {}
    if request is not None:
        views = {kind: _view_groups(request, kind, anchors) for kind in request.kinds}
    with scorer.autocast():
        batch = pack(
            scorer.policy,
            rollouts.input_ids,
            rollouts.attention_mask,
            rollouts.num_response_tokens,
            {"anchor": anchors, **views},
            sequential=args.perception_memory == "sequential",
            detached=() if args.perception_view_gradients else tuple(views),
            prompts=rollouts.prompts,
            response_lengths=rollouts.response_lengths,
        )
        names = needed(args) & SIMILARITIES if request is not None and request.rollouts else ()
        with packed_similarities(scorer.policy, names, batch) if names else nullcontext() as near:
            found = model(shared_prompt=batch, readout=partial(_read, args, request, batch, near))
    anchor = ResponseScores(found["anchor_logps"], found["anchor_entropies"])
    return anchor, _view_scores(request, found) if request is not None and request.rollouts else None


def _view_groups(request: ViewRequest, kind: str, anchors: Sequence[PromptGroup]) -> list[PromptGroup]:
    """The requested rollouts under one view, grouped where they share prompt and views."""
    groups = []
    for anchor in anchors:
        by_key: dict[int, list[int]] = {}
        for row in anchor.rollouts:
            if row in request.views:
                by_key.setdefault(request.view_keys[row], []).append(row)
        for rows in by_key.values():
            groups.append(PromptGroup(rows, request.view_inputs(rows[0], kind, anchor.vision)))
    return groups


def _read(
    args: CPPOConfig,
    request: ViewRequest | None,
    batch: PackedBatch,
    near: Similarities | None,
    hidden: Tensor,
    head: LanguageHead,
) -> dict[str, Tensor]:
    """Read the results by name from the hidden states of a packed batch, inside the model's forward.

    Scores and divergences are [B, T], with 0 where a token was not scored under a view. The dependency score, its
    inputs and the perception tokens are for the requested rollouts, [n, T].
    """
    found: dict[str, Tensor] = {}
    keeps_hidden_states = request is not None and request.rollouts and "hidden_states" in needed(args)

    def score(view: str, places: slice | Tensor) -> None:
        logps, entropies = head.scores(hidden[places], batch.targets[places], args.temperature)
        found[f"{view}_logps"] = batch.unpack(places, logps)
        found[f"{view}_entropies"] = batch.unpack(places, entropies)
        if keeps_hidden_states:
            found[f"{view}_hidden_states"] = batch.unpack(places, hidden[places])

    def divergence(function: Callable[..., Tensor], places: slice | Tensor, **gradients: bool) -> Tensor:
        anchor = hidden[batch.counterparts("anchor", places)]
        return batch.unpack(places, head.divergence(function, anchor, hidden[places], args.temperature, **gradients))

    score("anchor", batch.tokens["anchor"])
    if request is None or not request.rollouts:
        return found
    view_gradients = args.perception_view_gradients and torch.is_grad_enabled()
    compared = [view for view in request.kinds if view in views_of(SCORES[args.perception_score])]
    for view in compared:
        with torch.set_grad_enabled(view_gradients):
            score(view, batch.tokens[view])
    exact = {"anchor": over_anchor_logits(args), **dict.fromkeys(compared, over_logits(args.perception_score))}
    with torch.no_grad():
        for view, functions in exact.items():
            for name, function in functions.items():
                found[f"{view}_{name}"] = divergence(function, batch.tokens[view])
    if near is not None:
        found |= {f"anchor_{name}": values for name, values in near.of_view(batch, "anchor").items()}
    detected = detect(_view_scores(request, found), args)
    assert detected.score is not None
    assert detected.token_mask is not None
    found["score"], found["token_mask"] = detected.score, detected.token_mask
    if detected.token_weights is not None:
        found["token_weights"] = detected.token_weights
    selected = torch.zeros(batch.shape, dtype=torch.bool, device=hidden.device)
    selected[request.rollouts] = detected.token_mask
    places = {view: batch.places(view, selected) for view in request.kinds}
    # The loss reads the other views at the selected tokens alone, unless their entropy counts at every token.
    for view in (view for view in request.kinds if view not in compared):
        everywhere = getattr(args, f"perception_{view}_entropy_weight")
        with torch.set_grad_enabled(view_gradients):
            score(view, batch.tokens[view] if everywhere else places[view])
    if args.perception_divergence in EXACT_DIVERGENCES:
        for view in request.kinds:
            found[f"d_{view}"] = divergence(
                EXACT_DIVERGENCES[args.perception_divergence],
                places[view],
                anchor_gradients=args.perception_anchor_gradients,
                view_gradients=args.perception_view_gradients,
            )
    return found


def _view_scores(request: ViewRequest, found: Mapping[str, Tensor]) -> ViewScores:
    """The results so far, for the requested rollouts."""
    whole = ("score", "token_mask", "token_weights")
    own = {name: values if name in whole else values[request.rollouts] for name, values in found.items()}
    scores = {}
    for view in ("anchor", *request.kinds):
        read = {name.removeprefix(f"{view}_"): own[name] for name in own if name.startswith(f"{view}_")}
        if read:
            logps, entropies, hidden = read.pop("logps"), read.pop("entropies"), read.pop("hidden_states", None)
            near = {name: read.pop(name) for name in SIMILARITIES if name in read}
            scores[view] = ResponseScores(logps, entropies, None, None, hidden, read, near)
    known = {name: own[name] for name in (*whole, "d_preserving", "d_removing") if name in own}
    return request.view_scores(scores["anchor"], scores, **known)
