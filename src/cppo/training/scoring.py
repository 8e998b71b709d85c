"""Score rollouts under the image and their views: `score_under_views`, for the loss and before an update.

One forward per backward keeps DDP and FSDP safe (several forwards would mark a parameter ready twice). Ranks with and
without gated-in rollouts run the same number of passes. In a packed forward, the head runs on the anchor and the views
that the score compares. Then tokens are selected, and the head runs on I+ at these tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError
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
from cppo.policy.similarity import Similarities, packed_similarities
from cppo.policy.vision_inputs import (
    PER_TOKEN_KEYS,
    VISION_KEYS,
    VisionInputs,
    slice_rows,
    trimmed,
    without_empty_images,
)
from cppo.training.config import CPPOConfig
from cppo.training.plain_rows import plain_rows

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

        vision = {}
        if self.vision and isinstance(places, range):
            vision = slice_rows(self.vision, places.start, places.stop)
        elif self.vision:
            vision = concatenate_rows([slice_rows(self.vision, place, place + 1) for place in places])
        return Rollouts(
            self.input_ids[list(places)],
            self.attention_mask[list(places)],
            self.num_response_tokens,
            vision,
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
