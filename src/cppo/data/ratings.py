"""Ratings of rows by a model's sampled answers. `cppo data rate` writes them; training matches them to its rows.

A rating belongs to the content of a row: prompt, images and answer. Its place and its id do not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cppo.data.record import RecordSource
from cppo.errors import UserError
from cppo.line_file import LineFormat, read_lines

ENTROPIES = ("semantic_entropy", "discrete_semantic_entropy")
"""The measures that training can sort rows by."""


@dataclass(frozen=True)
class Rating:
    """Rating of one row by its sampled answers.

    Attributes:
        row: the row's content (`RecordSource.content_digest`).
        id: its id, for a reader.
        accuracy: the fraction of right responses.
        confidence: the fraction of responses with the most frequent answer; 0 if no response has an answer.
        semantic_entropy: in nats, over the clusters of equal answers, weighted by their responses' probabilities
            (`cppo.evaluation.semantic_entropy`).
        discrete_semantic_entropy: the same, weighted by their numbers of responses.
        clusters: number of different answers; a response without an answer is a cluster by itself.
        answers: the clusters, largest first: the first answer, number of responses, share of the probability.
    """

    row: str
    id: str
    accuracy: float
    confidence: float
    semantic_entropy: float
    discrete_semantic_entropy: float
    clusters: int
    answers: tuple[tuple[str, int, float], ...]


def _is_complete(line: Mapping[str, Any], _: Mapping[str, Any]) -> bool:
    kinds = {"row": str, "id": str, "clusters": int, "answers": list}
    numbers = ("accuracy", "confidence", *ENTROPIES)
    return all(isinstance(line.get(name), kind) for name, kind in kinds.items()) and all(
        isinstance(line.get(name), float) and line[name] >= 0 for name in numbers
    )


RATINGS = LineFormat("cppo_ratings", "cppo data rate", "ratings", _is_complete)


def rating_of(line: Mapping[str, Any]) -> Rating:
    """The rating in a line of the file."""
    cells = {one.name: line[one.name] for one in fields(Rating)}
    return Rating(**{**cells, "answers": tuple(map(tuple, cells["answers"]))})


def ratings_of(source: RecordSource, path: str, option: str = "data_ratings") -> list[Rating]:
    """The rating of each record of a source, from a file written by `cppo data rate`.

    The file may hold ratings of other rows too. For rows with the same content the first rating counts.

    Raises UserError for an unusable file, or a record without a rating, which it names.
    """
    _, lines = read_lines(path, RATINGS, option)
    known = {line["row"]: line for line in reversed(lines)}
    found = []
    for index in range(len(source)):
        line = known.get(source.content_digest(index))
        if line is None:
            raise UserError(
                f"{option}: {path} has no rating of {source.place(index)}: the row was not rated, or its "
                "prompt, images or answer have changed; rate this data by `cppo data rate`"
            )
        found.append(rating_of(line))
    return found
