"""Ratings of rows by a model's sampled answers, which `cppo data rate` writes once; training matches them to its rows.

A rating belongs to the content of a row: prompt, images and answer. Neither its place nor its id plays a part.
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
    """What the sampled answers to one row say of it.

    Attributes:
        row: the row's content (`RecordSource.content_digest`).
        id: its id, for a reader.
        accuracy: the fraction of the responses that are right.
        confidence: the fraction of the responses that give the most frequent answer; 0 where none gives one.
        semantic_entropy: in nats, over the clusters of equal answers, each weighted by the probabilities of its
            responses (`cppo.evaluation.semantic_entropy`).
        discrete_semantic_entropy: the same, each cluster weighted by the number of its responses.
        clusters: how many different answers there are; a response without one counts as one of its own.
        answers: the clusters, the largest first: the first answer in each, how many responses it has, and their share
            of the probability.
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
    """The rating that a line of the file holds."""
    cells = {one.name: line[one.name] for one in fields(Rating)}
    return Rating(**{**cells, "answers": tuple(map(tuple, cells["answers"]))})


def ratings_of(source: RecordSource, path: str, option: str = "data_ratings") -> list[Rating]:
    """The rating of each record of a source, from a file that `cppo data rate` wrote.

    The file may hold ratings of other rows too. Of rows with the same content the first one's rating counts.

    Raises UserError for a file that cannot be used, or a record without a rating, which it names.
    """
    _, lines = read_lines(path, RATINGS, option)
    known = {line["row"]: line for line in reversed(lines)}
    found = []
    for index in range(len(source)):
        line = known.get(source.content_digest(index))
        if line is None:
            raise UserError(
                f"{option}: {path} has no rating of {source.place(index)}: its prompt, images or answer are others "
                "than when the file was written, or it was not rated; rate this data by `cppo data rate`"
            )
        found.append(rating_of(line))
    return found
