"""Numbers about a data set: rows, images, answers, repetitions, and overlap with another data set."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cppo.data.record import RecordSource
from cppo.rewards import answer_kind, names_choice

_NOT_PLAIN = re.compile(r"\n|</?\w+>|<\|\w+\|>|####|^\s*\[\s*[\"']")


@dataclass(frozen=True)
class DataSummary:
    """Counts over the usable rows of a data set.

    Attributes:
        images_a_row: {number of images: rows}.
        sizes: (width, height) in pixels of every image.
        answer_kinds: {kind: rows}, see `cppo.rewards.answer_kind`.
        choice_rows: rows with `choices`.
        no_choice: places of rows with an answer that is none of their choices.
        wrapped: places of rows with an answer that is not plain: in tags, after `####`, a list, or of several lines.
        repeated_rows: rows with the question and images of an earlier row.
        shared_images: distinct images that occur in more than one row.
        images: digests of the distinct images' pixels.
    """

    images_a_row: dict[int, int]
    sizes: list[tuple[int, int]]
    answer_kinds: dict[str, int]
    choice_rows: int
    no_choice: list[int]
    wrapped: list[int]
    repeated_rows: int
    shared_images: int
    images: frozenset[str]


def summarize(source: RecordSource, progress: Callable[[int], object] = lambda count: None) -> DataSummary:
    """Read every record once. `progress` is called with 1 after each."""
    images_a_row: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    rows_of_image: Counter[str] = Counter()
    rows_of_key: Counter[tuple[str, ...]] = Counter()
    sizes: list[tuple[int, int]] = []
    choice_rows, no_choice, wrapped = 0, [], []
    for place in range(len(source)):
        row = source.outline(place)
        digests = [image.digest for image in row.images]
        images_a_row[len(digests)] += 1
        kinds[answer_kind(row.answer)] += 1
        rows_of_image.update(set(digests))
        rows_of_key[(json.dumps(row.prompt, sort_keys=True), *digests)] += 1
        sizes += [image.size for image in row.images]
        choice_rows += row.choices is not None
        if row.choices is not None and not names_choice(row.answer, row.choices):
            no_choice.append(place)
        if _NOT_PLAIN.search(row.answer):
            wrapped.append(place)
        progress(1)
    return DataSummary(
        images_a_row=dict(sorted(images_a_row.items())),
        sizes=sizes,
        answer_kinds=dict(kinds.most_common()),
        choice_rows=choice_rows,
        no_choice=no_choice,
        wrapped=wrapped,
        repeated_rows=len(source) - len(rows_of_key),
        shared_images=sum(count > 1 for count in rows_of_image.values()),
        images=frozenset(rows_of_image),
    )
