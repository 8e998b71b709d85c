"""Responses on the pages: tokens shaded by their dependency scores, with safe images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cppo.reports.charts import thin
from cppo.reports.run_data import RunData

IMAGE_URIS = ("data:image/png;base64,", "data:image/jpeg;base64,")


@dataclass(frozen=True)
class Token:
    """One response token.

    `strength` in [0, 1] is its score relative to the best score beside it, 0 if not selected. `true` is whether the
    data mark it as read from the image. `score` is None if there is none.
    """

    text: str
    selected: bool
    score: float | None
    strength: float
    true: bool = False


@dataclass(frozen=True)
class ProbedItem:
    """One held-out item and its greedy responses at several steps: (step, right or not, tokens)."""

    prompt: str
    images: list[str]
    answer: str
    responses: list[tuple[int, bool, list[Token]]]


def shaded(
    texts: Sequence[str], selected: Sequence[bool], scores: Sequence[float | None], true: Sequence[bool | None] = ()
) -> list[Token]:
    """Tokens shaded by their share of the response's best score."""
    best = max((score or 0.0 for score in scores), default=0.0) or 1.0
    truth = list(true) or [None] * len(texts)
    return [
        Token(text, chosen, score, max(0.0, (score or 0.0) / best) if chosen else 0.0, bool(read))
        for text, chosen, score, read in zip(texts, selected, scores, truth, strict=True)
    ]


def safe_images(uris: Sequence[Any]) -> list[str]:
    """The data URIs of pictures among them; nothing else may become a `src`."""
    return [uri for uri in uris if isinstance(uri, str) and uri.startswith(IMAGE_URIS)]


def example(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `samples.jsonl` with its `tokens` and safe `images`."""
    return {
        **sample,
        "images": safe_images(sample["images"]),
        "tokens": shaded(sample["completion_tokens"], sample["perception"], sample["score"]),
    }


def probed_items(run: RunData, columns: int) -> list[ProbedItem]:
    """The items of the run's probes, each at up to `columns` steps: the first, the last and some between."""
    by_id: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for probe in run.probes:
        for item in probe["items"]:
            by_id.setdefault(str(item["id"]), []).append((probe["step"], item))
    items = []
    for looks in by_id.values():
        first = looks[0][1]
        images = next((safe_images(item["images"]) for _, item in looks if item["images"]), [])
        responses = [
            (
                step,
                bool(item["correct"]),
                shaded(item["tokens"], item["selected"], item["score"], item["true_perception"]),
            )
            for step, item in thin(looks, columns)
        ]
        items.append(ProbedItem(first["prompt"], images, first["answer"], responses))
    return items
