"""Inspected items as a self-contained page, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from cppo.data import question_text
from cppo.evaluation.detectors import DetectorQuality, detector_quality
from cppo.evaluation.inspection import VIEWS, InspectedItem, InspectedResponse, InspectedToken, InspectOptions
from cppo.perception import DEPENDENCY_SCORES, DIVERGENCES
from cppo.reports.page import render_page
from cppo.views import image_data_uri

IMAGE_SIDE = 200
"""Longest side in pixels of a picture; 200 items with three pictures each must stay under 10 MB."""

NO_TRUTH = (
    "no response token is marked as read from the image; the columns `response` and `perception_spans` mark such words"
)
"""Why there is no table of detectors."""


def json_item(item: InspectedItem, score: str) -> dict[str, Any]:
    """An item as JSON values: `tokens` of its first response, the other responses complete under `responses`.

    Args:
        score: the dependency score of `score` and `selected`; the others are under `scores`.
    """
    first, *others = item.responses
    return {
        "id": item.record.id,
        "prompt": question_text(item.record.prompt),
        "answer": item.record.answer,
        **_json_response(first, score),
        "responses": [_json_response(response, score) for response in others],
    }


def _json_response(response: InspectedResponse, score: str) -> dict[str, Any]:
    return {
        "response": response.text,
        "correct": response.correct,
        "well_formed": response.well_formed,
        "advantage": response.advantage,
        "gated": response.gated_in,
        "tokens": [_json_token(token, score) for token in response.tokens],
    }


def _json_token(token: InspectedToken, score: str) -> dict[str, Any]:
    return {
        "text": token.text,
        "logp": token.logps["image"],
        "logp_preserving": token.logps["preserving"],
        "logp_removing": token.logps["removing"],
        "entropy": token.entropies["image"],
        "entropy_preserving": token.entropies["preserving"],
        "entropy_removing": token.entropies["removing"],
        "score": token.scores[score],
        "selected": token.selected[score],
        "true_perception": token.true_perception,
        "scores": token.scores,
        "d_preserving": token.d_preserving,
        "d_removing": token.d_removing,
        "alternatives": token.alternatives,
    }


def detector_table(items: Sequence[InspectedItem]) -> dict[str, DetectorQuality]:
    """Quality of every score over all tokens with known truth; empty if there are none."""
    tokens = [
        token
        for item in items
        for response in item.responses
        for token in response.tokens
        if token.true_perception is not None
    ]
    truth = [bool(token.true_perception) for token in tokens]
    table = {}
    for name in tokens[0].scores if tokens else ():
        quality = detector_quality(
            [token.scores[name] for token in tokens], [token.selected[name] for token in tokens], truth
        )
        if quality is not None:
            table[name] = quality
    return table


def sampling_text(asked: InspectOptions) -> str:
    """How the responses were drawn, compared with `cppo eval`."""
    if asked.samples == 1:
        return "1 an item, greedy, as in `cppo eval`"
    drawn = f"{asked.samples} an item, sampled at temperature {asked.temperature:g}"
    return f"{drawn}, as in training; `--samples 1` is greedy, as in `cppo eval`"


def render_inspection(items: Sequence[InspectedItem], *, model: str, data: str, score: str) -> str:
    """The page; it opens with `score`. A script writes the texts of model and data, from JSON, as plain text."""
    texts: dict[str, int] = {}
    content = {
        "scores": list(dict.fromkeys((*DEPENDENCY_SCORES, score))),
        "divergences": DIVERGENCES,
        "views": VIEWS,
        "chosen": score,
        "items": [_page_item(item, texts) for item in items],
        "texts": texts,
    }
    content["texts"] = list(texts)
    return render_page(
        "inspection.html.j2",
        model=model,
        data=data,
        count=len(items),
        table={name: asdict(quality) for name, quality in detector_table(items).items()},
        no_truth=NO_TRUTH,
        content=_json_in_html(content),
    )


def _page_item(item: InspectedItem, texts: dict[str, int]) -> dict[str, Any]:
    rows = (item.record.images, item.preserving, item.removing)
    return {
        "id": item.record.id,
        "question": question_text(item.record.prompt),
        "answer": item.record.answer,
        "images": [[image_data_uri(image, IMAGE_SIDE, lossless_side=0) for image in row] for row in rows],
        "responses": [
            {
                "correct": response.correct,
                "advantage": response.advantage,
                "gated": response.gated_in,
                "tokens": [_page_token(token, texts) for token in response.tokens],
            }
            for response in item.responses
        ],
    }


def _page_token(token: InspectedToken, texts: dict[str, int]) -> list[Any]:
    """A token as a short list: text, truth, selected (bits), scores, log-probs, entropies, d+, d-, alternatives."""

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    def short(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.3g}") for value in values]

    return [
        number(token.text),
        None if token.true_perception is None else int(token.true_perception),
        sum(int(selected) << place for place, selected in enumerate(token.selected.values())),
        short([*token.scores.values()]),
        short([token.logps[view] for view in VIEWS]),
        short([token.entropies[view] for view in VIEWS]),
        short([token.d_preserving[name] for name in DIVERGENCES]),
        short([token.d_removing[name] for name in DIVERGENCES]),
        [[[number(text), round(1000 * share)] for text, share in token.alternatives[view]] for view in VIEWS],
    ]


def _json_in_html(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
