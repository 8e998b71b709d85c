"""The response file of `cppo eval`: every response is written at once, so that a stopped evaluation can resume.

Each line after the header is one record under one condition.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cppo.data import Record
from cppo.errors import UserError
from cppo.evaluation.results import ItemResult
from cppo.line_file import LineFile, LineFormat

OPTION = "--responses"


class ResponseFile:
    """Responses on disk, by condition in the order of the records.

    Raises UserError for a file of another kind or other settings, and for a damaged, unreadable or unwritable file.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self._path, self._file = path, LineFile(path, RESPONSES, settings, OPTION)
        self._lines: dict[str, list[dict[str, Any]]] = {}
        for line in self._file.lines:
            self._lines.setdefault(line["condition"], []).append(line)

    def known(self, condition: str, source: Any) -> tuple[ItemResult, ...]:
        """Results of the first records of `source` under a condition.

        Raises UserError if they belong to other records.
        """
        lines = self._lines.get(condition, [])[: len(source)]
        if lines and (found := source[len(lines) - 1].id) != lines[-1]["id"]:
            raise UserError(
                f"{OPTION}: {self._path} has {lines[-1]['id']!r:.60} where the data has {found!r:.60}: "
                "other data; give another file"
            )
        return tuple(map(_item, lines))

    def append(self, condition: str, record: Record, item: ItemResult, categories: Mapping[str, str]) -> None:
        """Write one record's responses, and hand them to the operating system at once."""
        head = {"condition": condition, "id": item.id, "prompt": record.prompt}
        self._file.append({**head, **vars(item), "categories": dict(categories)})


def _is_complete(line: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    def holds(name: str, kind: type, count: int | None = None) -> bool:
        values = line.get(name)
        return (
            isinstance(values, list)
            and count in (None, len(values))
            and all(isinstance(value, kind) for value in values)
        )

    samples = settings.get("samples")
    return (
        all(isinstance(line.get(name), str) for name in ("condition", "id", "answer"))
        and isinstance(line.get("images"), int)
        and holds("choices", str)
        and holds("responses", str, samples)
        and all(holds(name, float, samples) for name in ("correct", "well_formed"))
    )


RESPONSES = LineFormat("cppo_eval", "cppo eval", "responses", _is_complete)


def _item(line: Mapping[str, Any]) -> ItemResult:
    cells: dict[str, Any] = {one.name: line[one.name] for one in fields(ItemResult)}
    lists = {name: tuple(cell) for name, cell in cells.items() if isinstance(cell, list)}
    return ItemResult(**{**cells, **lists})
