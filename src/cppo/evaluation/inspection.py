"""How much each token of sampled responses depends on the image: its scores under the image, I+ and I-."""

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cppo.data import Record, chat_messages
from cppo.evaluation.dependency import padded_mask, score_responses
from cppo.evaluation.detectors import token_truth
from cppo.evaluation.evaluate import score_item
from cppo.evaluation.generate import generate_tokens, prompt_inputs, response_stream
from cppo.perception import (
    DEPENDENCY_SCORES,
    DIVERGENCES,
    SCORES,
    SELECTORS,
    SIMILARITIES,
    ResponseScores,
    dependency_score,
    equal_rewards,
    gate_rollouts,
    needs_of,
    nucleus_entropy,
    select_tokens,
    view_divergence,
)
from cppo.rewards import DEFAULT_WEIGHTS
from cppo.views import ViewSampler

VIEWS = ("image", "preserving", "removing")
ALTERNATIVES = 5


@dataclass(frozen=True)
class InspectOptions:
    """How responses are drawn, and how responses and tokens are selected.

    Attributes:
        samples: responses an item; 1 is greedy, more are sampled.
        temperature: of sampling and of all scores.
        score: one of the user's own scores, shown beside `DEPENDENCY_SCORES`.
        selector, top_fraction, top_rounding: how tokens of each response are selected by score (`select_tokens`).
        gate: which responses take part in the perception loss (`gate_rollouts`).
        tolerance: allowed error of a number in an answer, as a fraction of it.
        run: all options of the run, for selectors that take more of them.
    """

    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    system_prompt: str | None = None
    score: str = "entropy_shift"
    selector: str = "top_positive"
    top_fraction: float = 0.5
    top_rounding: str = "floor"
    gate: str = "advantage"
    tolerance: float = 0.0
    run: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class InspectedToken:
    """One response token. Log-probabilities, entropies and divergences in nats.

    Attributes:
        logps, entropies: under each of `VIEWS`.
        d_preserving, d_removing: divergence between image and view under each of `DIVERGENCES`.
        scores: dependency score under each name of `DEPENDENCY_SCORES`, and the user's own.
        selected: by each score, whether the selector keeps the token.
        alternatives: the most probable tokens with their probabilities under each of `VIEWS`.
        true_perception: whether it states what the image shows; None if the data do not mark it.
    """

    text: str
    logps: dict[str, float]
    entropies: dict[str, float]
    d_preserving: dict[str, float]
    d_removing: dict[str, float]
    scores: dict[str, float]
    selected: dict[str, bool]
    alternatives: dict[str, list[tuple[str, float]]]
    true_perception: bool | None


@dataclass(frozen=True)
class InspectedResponse:
    """A response. `advantage` is computed from the default rewards (accuracy, format); None for a single response.
    `gated_in` says whether it passes the gate of the perception loss.
    """

    text: str
    correct: bool
    well_formed: bool
    advantage: float | None
    gated_in: bool
    tokens: tuple[InspectedToken, ...]


@dataclass(frozen=True)
class InspectedItem:
    """A record's responses, and its images with the views of the scores."""

    record: Record
    preserving: tuple[Image.Image, ...]
    removing: tuple[Image.Image, ...]
    responses: tuple[InspectedResponse, ...]


def inspect_record(
    model: Any, processor: Any, record: Record, sampler: ViewSampler, options: InspectOptions
) -> InspectedItem:
    """Let the model answer a record, and score every response token under the image, I+ and I-.

    A record without images is scored once: nothing depends on an image there, and no token is selected.
    """
    pairs = [sampler.views(image, record.id, 0, place) for place, image in enumerate(record.images)]
    shown = {
        "image": record.images,
        "preserving": tuple(pair[0] for pair in pairs),
        "removing": tuple(pair[1] for pair in pairs),
    }
    prompts = [chat_messages(record.prompt, options.system_prompt)] * options.samples

    def inputs(view: str) -> Any:
        return prompt_inputs(processor, prompts, [shown[view]] * options.samples)

    rows = generate_tokens(
        model,
        processor,
        inputs("image"),
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.samples == 1 else options.temperature,
        streams=[response_stream(options.seed, record.id, sample) for sample in range(options.samples)],
    )
    needed = needs_of(SCORES[options.score])
    hidden, similar = "hidden_states" in needed, needed & SIMILARITIES
    scored = {
        view: score_responses(model, inputs(view), rows, options.temperature, hidden, similar)
        for view in (VIEWS if record.images else ("image",))
    }
    for view in VIEWS:
        scored.setdefault(view, scored["image"])
    mask = padded_mask(rows).to(scored["image"].logps.device)
    texts = processor.batch_decode(rows, skip_special_tokens=True)
    # The responses use streams below `samples`.
    draws = torch.from_numpy(response_stream(options.seed, record.id, options.samples).random(tuple(mask.shape)))
    columns = token_columns(scored, mask & bool(record.images), options, draws.to(mask.device))
    found = score_item(record, texts, options.tolerance)
    rewards = torch.tensor(DEFAULT_WEIGHTS, dtype=torch.float64) @ torch.tensor(
        [found.correct, found.well_formed], dtype=torch.float64
    )
    advantages = (rewards - rewards.mean()).masked_fill(equal_rewards(rewards[:, None], len(rewards)), 0.0)
    gated_in = gate_rollouts(options.gate, advantages, torch.tensor(found.correct)).tolist()
    responses = []
    for row, ids in enumerate(rows):
        truth = token_truth(processor, ids, record)
        tokens = tuple(_token(processor, ids[place], columns, row, place, truth[place]) for place in range(len(ids)))
        advantage = None if len(rows) == 1 else advantages[row].item()
        responses.append(
            InspectedResponse(
                texts[row], found.correct[row] > 0, found.well_formed[row] > 0, advantage, gated_in[row], tokens
            )
        )
    return InspectedItem(record, shown["preserving"], shown["removing"], tuple(responses))


def token_columns(
    scored: dict[str, ResponseScores], mask: Tensor, options: InspectOptions, draws: Tensor
) -> dict[str, dict[str, Any]]:
    """Every number of every token, by group and name, each [B, T] (alternatives: ids and probabilities [B, T, 5]).

    `draws` are uniform random numbers [B, T], for a random selection.
    """
    anchor, removing = scored["image"], scored["removing"]
    names = dict.fromkeys((*DEPENDENCY_SCORES, options.score))
    scores = {name: dependency_score(name, anchor, removing, scored["preserving"], mask) for name in names}
    more = {"entropies": anchor.entropies, "options": options.run}
    if "nucleus_entropies" in needs_of(SELECTORS[options.selector]):
        assert anchor.logits is not None
        more["nucleus_entropies"] = nucleus_entropy(anchor.logits, options.run.perception_nucleus)

    def divergences(view: str) -> dict[str, Any]:
        return {name: view_divergence(name, anchor, scored[view]).tolist() for name in DIVERGENCES}

    return {
        "logps": {view: scored[view].logps.tolist() for view in VIEWS},
        "entropies": {view: scored[view].entropies.tolist() for view in VIEWS},
        "d_preserving": divergences("preserving"),
        "d_removing": divergences("removing"),
        "scores": {name: value.tolist() for name, value in scores.items()},
        "selected": {
            name: (
                select_tokens(options.selector, value, mask, options.top_fraction, draws, options.top_rounding, **more)
                > 0
            ).tolist()
            for name, value in scores.items()
        },
        "alternatives": {view: _most_probable(scored[view].logits) for view in VIEWS},
    }


def _most_probable(logits: Tensor | None) -> tuple[list[Any], list[Any]]:
    assert logits is not None
    top = torch.softmax(logits, dim=-1).topk(min(ALTERNATIVES, logits.shape[-1]), dim=-1)
    return top.indices.tolist(), top.values.tolist()


def _token(
    processor: Any, token: int, columns: dict[str, dict[str, Any]], row: int, place: int, truth: bool | None
) -> InspectedToken:
    decode = processor.tokenizer.decode
    figures = {
        group: {name: value[row][place] for name, value in columns[group].items()}
        for group in ("logps", "entropies", "d_preserving", "d_removing", "scores", "selected")
    }
    alternatives = {
        view: [
            (decode([other]), probability)
            for other, probability in zip(ids[row][place], probabilities[row][place], strict=True)
        ]
        for view, (ids, probabilities) in columns["alternatives"].items()
    }
    return InspectedToken(decode([token]), alternatives=alternatives, true_perception=truth, **figures)
