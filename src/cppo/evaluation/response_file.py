"""The response file of `cppo eval`: every response as soon as it is there, for a stopped evaluation to go on from.

Line 1 is a header with the settings; each further line is one record under one condition. Lines of other settings,
another model or other data never get into the same file.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cppo.data import Record
from cppo.errors import UserError
from cppo.evaluation.results import ItemResult
from cppo.parsing import parse_json

MARK = "cppo_eval"
VERSION = 1


class ResponseFile:
    """Responses on disk, by condition in the order of the records.

    Raises UserError for a file of something else or of other settings, a damaged one, or one that cannot be read or
    written.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._lines: dict[str, list[dict[str, Any]]] = {}
        # What comes back from the file has gone through JSON too.
        self._settings = json.loads(json.dumps(settings))
        try:
            self._open()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"--responses: cannot use {path}: {reason}") from error

    def known(self, condition: str, source: Any) -> tuple[ItemResult, ...]:
        """Results of the first records of `source` under a condition.

        Raises UserError where the last of them is of another record.
        """
        lines = self._lines.get(condition, [])[: len(source)]
        if lines and (found := source[len(lines) - 1].id) != lines[-1]["id"]:
            raise UserError(
                f"--responses: {self._path} has {lines[-1]['id']!r:.60} where the data has {found!r:.60}: "
                "other data; give another file"
            )
        return tuple(map(_item, lines))

    def append(self, condition: str, record: Record, item: ItemResult, categories: Mapping[str, str]) -> None:
        """Write one record's responses, and hand them to the operating system at once."""
        head = {"condition": condition, "id": item.id, "prompt": record.prompt}
        self._write({**head, **vars(item), "categories": dict(categories)})

    def _open(self) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            if data and not data.startswith(f'{{"{MARK}"'.encode()):
                raise self._foreign()
            self._path.write_bytes(b"")
            self._write({MARK: VERSION, **self._settings})
            return
        lines = whole.decode("utf-8").split("\n")[:-1]
        header = self._parsed(lines[0], 1)
        if header.pop(MARK, None) != VERSION:
            raise self._foreign()
        self._check_settings(header)
        for number, text in enumerate(lines[1:], start=2):
            line = self._parsed(text, number)
            if not self._is_complete(line):
                raise self._damaged(number)
            self._lines.setdefault(line["condition"], []).append(line)
        if len(whole) < len(data):  # the line that a stop cut off
            with self._path.open("r+b") as file:
                file.truncate(len(whole))

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        for name in dict.fromkeys((*stored, *self._settings)):
            before, now = stored.get(name), self._settings.get(name)
            if before != now:
                raise UserError(
                    f"--responses: {self._path} holds responses of another evaluation: {name} was "
                    f"{json.dumps(before):.80}, now {json.dumps(now):.80}; give another file"
                )

    def _parsed(self, text: str, number: int) -> dict[str, Any]:
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number == 1:
                raise self._foreign()
            raise self._damaged(number)
        return line

    def _is_complete(self, line: Mapping[str, Any]) -> bool:
        def holds(name: str, kind: type, count: int | None = None) -> bool:
            values = line.get(name)
            return (
                isinstance(values, list)
                and count in (None, len(values))
                and all(isinstance(value, kind) for value in values)
            )

        samples = self._settings["samples"]
        return (
            all(isinstance(line.get(name), str) for name in ("condition", "id", "answer"))
            and isinstance(line.get("images"), int)
            and holds("choices", str)
            and holds("responses", str, samples)
            and all(holds(name, float, samples) for name in ("correct", "well_formed"))
        )

    def _damaged(self, number: int) -> UserError:
        return UserError(f"--responses: {self._path} line {number} is damaged; give another file")

    def _foreign(self) -> UserError:
        return UserError(f"--responses: {self._path} was not written by cppo eval; give another file")

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write((json.dumps(line) + "\n").encode("utf-8"))


def _item(line: Mapping[str, Any]) -> ItemResult:
    cells: dict[str, Any] = {one.name: line[one.name] for one in fields(ItemResult)}
    lists = {name: tuple(cell) for name, cell in cells.items() if isinstance(cell, list)}
    return ItemResult(**{**cells, **lists})
