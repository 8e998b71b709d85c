"""How well a dependency score finds the true perception tokens, for data that mark them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from cppo.data import Record

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class DetectorQuality:
    """A score against the true perception tokens, pooled over tokens; fractions of 1.

    Attributes:
        auprc: area under the precision-recall curve (average precision); chance gives `base_rate`.
        precision, recall: of the selected tokens; precision is None if none is selected.
        base_rate: share of true perception tokens.
        tokens: number of judged tokens.
    """

    auprc: float
    precision: float | None
    recall: float
    base_rate: float
    tokens: int


def detector_quality(score: Sequence[float], selected: Sequence[bool], truth: Sequence[bool]) -> DetectorQuality | None:
    """Compare scores and selection of N tokens with the truth; None if no token is a true one.

    A score that is NaN, as from a diverged model, ranks below all others.
    """
    true = sum(truth)
    if not true:
        return None
    known = [value for value in score if np.isfinite(value)]
    ranked = np.nan_to_num(score, nan=min(known, default=0.0) - 1)
    hits = sum(kept and wanted for kept, wanted in zip(selected, truth, strict=True))
    return DetectorQuality(
        auprc=float(average_precision_score(truth, ranked)),
        precision=hits / sum(selected) if any(selected) else None,
        recall=hits / true,
        base_rate=true / len(truth),
        tokens=len(truth),
    )


def true_spans(response: str, reference: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of a sampled response that state what the image shows, by alignment with the marked reference.

    Both texts are cut into words and symbols and aligned. The place of a marked word counts, whether its value is right
    or wrong. A marked word without a counterpart (left out, or replaced by another number of words) yields nothing.

    Args:
        spans: [start, end) characters of `reference` that state what the images show.

    Returns:
        [start, end) characters of `response`.
    """
    words = [match.span() for match in _WORD.finditer(reference)]
    given = [match.span() for match in _WORD.finditer(response)]
    marked = {
        place for place, (start, end) in enumerate(words) if any(start < last and first < end for first, last in spans)
    }
    if len(words) == len(given):
        return [given[place] for place in sorted(marked)]
    matcher = SequenceMatcher(
        None, [reference[a:b] for a, b in words], [response[a:b] for a, b in given], autojunk=False
    )
    found = []
    for kind, start, end, other, other_end in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and end - start == other_end - other):
            found += [given[other + place - start] for place in range(start, end) if place in marked]
    return found


def token_truth(processor: Any, ids: Sequence[int], record: Record) -> list[bool | None]:
    """Which tokens state what the image shows; None for each if the record has no marked reference response."""
    if record.response is None or record.perception_spans is None:
        return [None] * len(ids)
    ends = [len(processor.tokenizer.decode(ids[: place + 1])) for place in range(len(ids))]
    text = processor.tokenizer.decode(ids)
    spans = true_spans(text, record.response, record.perception_spans)
    starts = [0, *ends[:-1]]
    return [
        any(start < last and first < end and text[max(start, first) : min(end, last)].strip() for first, last in spans)
        for start, end in zip(starts, ends, strict=True)
    ]
