"""Check every row's fields and images before training; count bad rows up to a limit."""

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
from cppo.data.unread import UnreadColumns
from cppo.errors import UserError
from cppo.progress import Progress
from cppo.views import PixelRoom

ROWS_A_CHUNK = 64
MAX_THREADS = 8


class BadRows(UserError):
    """A file has too many bad rows.

    Attributes:
        rows: the bad rows, as in `RowChecks.skipped`; empty where whole columns are missing.
        total: number of rows checked.
    """

    def __init__(self, message: str, rows: list[tuple[int, str]], total: int) -> None:
        super().__init__(message)
        self.rows, self.total = rows, total


class MissingColumns(UserError):
    """No row of `name` has the requested extra `columns` (names of the file); the rows have `found`."""

    def __init__(self, name: str, columns: Sequence[str], found: Iterable[str]) -> None:
        super().__init__(no_row_has(name, columns, found))
        self.columns = columns


def no_row_has(name: str, columns: Sequence[str], found: Iterable[str]) -> str:
    """Message for `columns` that no row of `name` has, with the columns `found`."""
    which = f"column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))}"
    return f"{name}: no row has the {which}; the rows have {', '.join(map(repr, found))}"


class RowChecks:
    """Checks the rows of several files in turn, since ids must be unique over all files.

    Args:
        extras: further columns to keep, by the files' own names.
        optional: as `extras`, in files that have them.
        with_facts: note the facts of each row's images.

    Images of the same file or the same data are decoded once. `skipped` collects bad rows as (number, "FILE: reason").
    `other_images` collects the places of rows without exactly `images_per_row` images. `found` collects all column
    names, `unread` the misspelt ones. Raises UserError unless `max_bad_fraction` is a fraction of 1.
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
        self.unread = UnreadColumns(columns, (*extras, *optional))
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
        """Return the good rows of one file, at most `limit`, from (number, row or RowError) pairs.

        Args:
            unit: what the numbers count, "line" or "row".
            total: number of rows, if known.

        Raises:
            BadRows: no row, even beyond `limit`, has a column of the record; no row is good; or too large a fraction of
                the checked rows is bad. One of the first few rows may be bad, since the file's fraction is
                not known yet.
            MissingColumns: no row has one of `extras`.
            UserError: there are no rows.
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
                    if isinstance(value, Mapping):
                        present.update(dict.fromkeys(value))
                        self.unread.see(value)
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
        if unit == "line":  # each row of a table has every column
            while self._absent(present) and (left := next(rows, None)) is not None:
                present.update(dict.fromkeys(left[1]) if isinstance(left[1], Mapping) else {})
        self._check_columns_present(name, present, len(good) + len(bad))
        self.found.update(present)
        if not good and not bad:
            found = "there are no rows"
            if self.other_images:
                found = f"images_per_row = {self._images_per_row} leaves no row: no row has that number of images"
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
        """Decode new images only, and one image of several with the same content."""
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
                return RowError(f"id {row.id!r:.80} is already used by {self._place_of_id[row.id]}")
            self._place_of_id[row.id] = row.place
        if not self._with_facts:
            return row
        facts = [ImageFacts.of(ref) if isinstance(ref, Image.Image) else found[ref] for ref in row.images]
        return replace(row, facts=tuple(one for one in facts if isinstance(one, ImageFacts)))

    def _absent(self, present: Mapping[str, None]) -> dict[str, str | None]:
        """The expected columns that no row has, as the file's names: our name of each."""
        ours = {self._columns.get(name, name): name for name in (*REQUIRED_COLUMNS, *self._columns)}
        wanted: dict[str | None, str | None] = {**dict.fromkeys(self._extras), **ours}
        return {
            theirs: name
            for theirs, name in wanted.items()
            if present and theirs is not None and theirs not in present and theirs.partition(".")[0] not in present
        }

    def _check_columns_present(self, name: str, present: Mapping[str, None], checked: int) -> None:
        absent = self._absent(present)
        records = {ours: theirs for theirs, ours in absent.items() if ours is not None}
        if records:
            mapping = {**self._columns, **dict.fromkeys(records, "THEIR_NAME")}
            columns = ", ".join(f"{ours}: {theirs or 'null'}" for ours, theirs in mapping.items())
            raise BadRows(
                f"{no_row_has(name, list(records.values()), present)}: choose the column to read with --columns "
                f'"{{{columns}}}", or with `columns` beside `data` in a recipe',
                [],
                checked,
            )
        if absent:
            raise MissingColumns(name, list(absent), present)


def _encoded(row: StoredRow | RowError) -> list[EncodedImage]:
    if isinstance(row, RowError):
        return []
    return [ref for ref in row.images if not isinstance(ref, Image.Image)]


def _content(ref: EncodedImage) -> Path | bytes:
    """A key shared by images with the same data: a file's path, else a digest."""
    return ref if isinstance(ref, Path) else sha256(encoded_bytes(ref)).digest()
