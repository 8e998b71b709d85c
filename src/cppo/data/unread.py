"""Find columns that nothing reads and that look like a misspelt name of one that is read: `imgaes` for `images`."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cppo.data.mapping import COLUMNS

NEAR = 0.8
"""Smallest similarity of two names, of 1: twice the number of matching characters, by that of all."""
LEAST_LETTERS = 3
"""Shorter names, such as `id`, are near too many others."""


class UnreadColumns:
    """Counts the rows that have such a column and lack the column that is meant.

    Args:
        columns: {our column: column of the file, or None}, as `check_columns` returns it.
        others: further columns of the file that are read.
    """

    def __init__(self, columns: Mapping[str, str | None], others: Iterable[str] = ()) -> None:
        names = {ours: columns.get(ours, ours) for ours in COLUMNS}
        self._meant = {theirs.partition(".")[0]: ours for ours, theirs in names.items() if theirs is not None}
        if "images" not in columns:
            self._meant["image"] = "images"
        self._read = {*self._meant, *(name.partition(".")[0] for name in others)}
        self._near: dict[str, str | None] = {}
        self._rows: Counter[str] = Counter()

    def see(self, row: Mapping[str, Any]) -> None:
        """Take a row."""
        for column in row:
            if column not in self._near:
                self._near[column] = self._nearest(column)
            near = self._near[column]
            if near is None or row[column] is None:
                continue
            same = (theirs for theirs, ours in self._meant.items() if ours == self._meant[near])
            if all(row.get(theirs) is None for theirs in same):
                self._rows[column] += 1

    def lines(self) -> list[str]:
        """A line for each such column."""
        return [
            f"column {column!r} in {rows:,} row{'s' * (rows > 1)}; did you mean {self._near[column]!r}?"
            for column, rows in self._rows.items()
        ]

    def _nearest(self, column: str) -> str | None:
        if column in self._read:
            return None
        names = [name for name in self._meant if len(name) >= LEAST_LETTERS]
        return next(iter(difflib.get_close_matches(column.lower(), names, n=1, cutoff=NEAR)), None)
