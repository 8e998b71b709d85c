"""The full check before training: every row's fields and images, bad rows counted up to a limit."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from cppo.data.images import EncodedImage, ImageFacts, OtherImages, RowError, check_image, encoded_bytes
from cppo.data.mapping import REQUIRED_COLUMNS, parse_row
from cppo.data.record import StoredRow
from cppo.errors import UserError
from cppo.progress import Progress
from cppo.views import PixelRoom

ROWS_A_CHUNK = 64
MAX_THREADS = 8


class BadRows(UserError):
    """Too many rows of a file cannot be used.

    Attributes:
        rows: all of them, as `RowChecks.skipped` has them.
        total: rows looked at.
    """

    def __init__(self, message: str, rows: list[tuple[int, str]], total: int) -> None:
        super().__init__(message)
        self.rows, self.total = rows, total


class MissingColumns(UserError):
    """No row of `name` has `columns`, asked for beyond those of the record, by the file's own names; it has `found`."""

    def __init__(self, name: str, columns: Sequence[str], found: Iterable[str]) -> None:
        super().__init__(no_row_has(name, columns, found))
        self.columns = columns


def no_row_has(name: str, columns: Sequence[str], found: Iterable[str]) -> str:
    """The words for columns that no row of `name` has, beside those that are `found`."""
    which = f"column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))}"
    return f"{name}: no row has the {which}; the rows have {', '.join(map(repr, found))}"


class RowChecks:
    """Checks the rows of one file after the other, since ids must be unique over all of them.

    `extras` are further columns to keep, by the files' own names; those in `optional` too, where a file has them.
    `with_facts` notes the facts of each row's images. Images of the same file or the same data are decoded once.
    `skipped` collects the bad rows as (number, "FILE: reason"), `other_images` the places of the rows that have not
    `images_per_row` images, `found` the columns that some row has. Raises UserError unless `max_bad_fraction` is a
    fraction of 1.
    """

    def __init__(
        self,
        columns: Mapping[str, str | None],
        max_bad_fraction: float,
        extras: Sequence[str] = (),
        optional: Sequence[str] = (),
        with_facts: bool = False,
        images_per_row: int | None = None,
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction={max_bad_fraction} must lie between 0 and 1")
        self.skipped: list[tuple[int, str]] = []
        self.other_images: list[str] = []
        self._images_per_row = images_per_row
        self._columns = columns
        self.found: set[str] = set()
        self._extras, self._optional = tuple(extras), tuple(optional)
        self._max_bad_fraction = max_bad_fraction
        self._place_of_id: dict[str, str] = {}
        self._with_facts = with_facts
        self._room = PixelRoom()
        self._content_of: dict[EncodedImage, Path | bytes] = {}
        self._looked_at: dict[Path | bytes, ImageFacts | RowError | None] = {}

    def run(
        self,
        numbered: Iterable[tuple[int, Any]],
        *,
        name: str,
        unit: str,
        folder: Path | None,
        limit: int | None = None,
        total: int | None = None,
    ) -> tuple[StoredRow, ...]:
        """The good rows of one file, at most `limit`, from (number, row or RowError) pairs.

        `unit` says what is numbered, "line" or "row"; `total` how many there are, where that is known. Raises UserError
        if a column is in no row at all, those beyond `limit` included, if too large a fraction of the rows looked at is
        bad (BadRows; of the first few of a file one may be, since the file's own fraction is not known), or if none is
        good.
        """
        good: list[StoredRow] = []
        bad: list[tuple[int, str]] = []
        present: dict[str, None] = {}
        rows = iter(numbered)
        wanted = sys.maxsize if limit is None else limit
        expected = total if limit is None else min(limit, total or limit)
        with (
            ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool,
            Progress(total=expected, desc=f"check {name}", unit="rows") as bar,
        ):
            while chunk := list(islice(rows, min(ROWS_A_CHUNK, wanted - len(good)))):
                parsed = []
                for number, value in chunk:
                    present.update(dict.fromkeys(value) if isinstance(value, Mapping) else {})
                    parsed.append((number, self._parse(value, folder, f"{name} {unit} {number}")))
                self._look(pool, {ref for _, row in parsed for ref in _encoded(row)}, folder)
                for number, row in parsed:
                    checked = self._finish(row)
                    if isinstance(checked, OtherImages):
                        self.other_images.append(f"{name} {unit} {number}")
                    elif isinstance(checked, RowError):
                        bad.append((number, str(checked)))
                    else:
                        good.append(checked)
                bar.update(len(chunk))
        if unit == "line":  # of a table each row has every column
            while self._absent(present) and (left := next(rows, None)) is not None:
                present.update(dict.fromkeys(left[1]) if isinstance(left[1], Mapping) else {})
        self._check_columns_present(name, present)
        self.found.update(present)
        if not good and not bad:
            found = "there are no rows"
            if self.other_images:
                found = f"images_per_row = {self._images_per_row} leaves no row: none has so many images"
            raise UserError(f"{name}: {found}")
        seen = len(good) + len(bad)
        skipped = [(number, f"{name}: {reason}") for number, reason in bad]
        let_pass = len(bad) == 1 and len(good) == limit and self._max_bad_fraction > 0
        if not good or (len(bad) / seen > self._max_bad_fraction and not let_pass):
            raise BadRows(
                f"{name}: {len(bad)} of {seen} rows cannot be used (max_bad_fraction is "
                f"{self._max_bad_fraction:g}); the first is {unit} {bad[0][0]}: {bad[0][1]}",
                skipped,
                seen,
            )
        self.skipped += skipped
        return tuple(good)

    def _parse(self, value: Any, folder: Path | None, place: str) -> StoredRow | RowError:
        if isinstance(value, RowError):
            return value
        try:
            extras = (*self._extras, *self._optional)
            return parse_row(
                value,
                columns=self._columns,
                folder=folder,
                place=place,
                extras=extras,
                images_per_row=self._images_per_row,
            )
        except RowError as error:
            return error

    def _look(self, pool: ThreadPoolExecutor, refs: set[EncodedImage], folder: Path | None) -> None:
        """Decode what was not seen yet; one image of several with the same content."""
        new = refs - self._content_of.keys()
        self._content_of.update(zip(new, pool.map(_content, new), strict=True))
        unseen = {content: ref for ref in new if (content := self._content_of[ref]) not in self._looked_at}

        def look(ref: EncodedImage) -> ImageFacts | RowError | None:
            try:
                return check_image(ref, folder, self._room, with_facts=self._with_facts)
            except RowError as error:
                return error

        self._looked_at.update(zip(unseen, pool.map(look, unseen.values()), strict=True))

    def _finish(self, row: StoredRow | RowError) -> StoredRow | RowError:
        if isinstance(row, RowError):
            return row
        found = {ref: self._looked_at[self._content_of[ref]] for ref in _encoded(row)}
        for looked in found.values():
            if isinstance(looked, RowError):
                return looked
        if row.id is not None:
            if row.id in self._place_of_id:
                return RowError(f"id {row.id!r:.80} is already that of {self._place_of_id[row.id]}")
            self._place_of_id[row.id] = row.place
        if not self._with_facts:
            return row
        facts = [ImageFacts.of(ref) if isinstance(ref, Image.Image) else found[ref] for ref in row.images]
        return replace(row, facts=tuple(one for one in facts if isinstance(one, ImageFacts)))

    def _absent(self, present: Mapping[str, None]) -> dict[str, str | None]:
        """The columns that are looked for and in none of the rows, by the file's names: which of ours each is."""
        ours = {self._columns.get(name, name): name for name in (*REQUIRED_COLUMNS, *self._columns)}
        wanted: dict[str | None, str | None] = {**dict.fromkeys(self._extras), **ours}
        return {
            theirs: name
            for theirs, name in wanted.items()
            if present and theirs is not None and theirs not in present and theirs.partition(".")[0] not in present
        }

    def _check_columns_present(self, name: str, present: Mapping[str, None]) -> None:
        absent = self._absent(present)
        records = {ours: theirs for theirs, ours in absent.items() if ours is not None}
        if records:
            mapping = {**self._columns, **dict.fromkeys(records, "THEIR_NAME")}
            columns = ", ".join(f"{ours}: {theirs or 'null'}" for ours, theirs in mapping.items())
            raise UserError(
                f"{no_row_has(name, list(records.values()), present)}: say which to read with --columns "
                f'"{{{columns}}}", or in a recipe with `columns` beside its `data`'
            )
        if absent:
            raise MissingColumns(name, list(absent), present)


def _encoded(row: StoredRow | RowError) -> list[EncodedImage]:
    if isinstance(row, RowError):
        return []
    return [ref for ref in row.images if not isinstance(ref, Image.Image)]


def _content(ref: EncodedImage) -> Path | bytes:
    """What images with the same data share: the path of a file, else a digest."""
    return ref if isinstance(ref, Path) else sha256(encoded_bytes(ref)).digest()
