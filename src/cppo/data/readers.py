"""Readers: generated tasks, `.jsonl` files, tables and rows in memory, all into one `RecordSource`.

Every row, with its images, is checked before the first is used. Bad rows are skipped and counted, up to a limit.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cppo.data.check import MissingColumns, RowChecks
from cppo.data.hub import open_hub_table
from cppo.data.images import ANY_SIZE, PixelBounds, RowError
from cppo.data.mapping import check_columns
from cppo.data.record import OPTIONAL_COLUMNS, RecordSource, StoredRow, StoredRows
from cppo.data.spec import HubSpec, PathSpec, TaskSpec, parse_spec
from cppo.data.tables import open_table
from cppo.errors import UserError, choose_one
from cppo.parsing import parse_json
from cppo.tasks import TaskOptions, make_item
from cppo.tasks.base import SPLITS


def load_records(
    specs: str | Sequence[str],
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str | None] | str | None = None,
    max_bad_fraction: float = 0.01,
    pixels: PixelBounds = ANY_SIZE,
    prompt_suffix: str | None = None,
    images_per_row: int | None = None,
    extras: Sequence[str] = (),
    optional: Sequence[str] = (),
    with_facts: bool = False,
) -> RecordSource:
    """Read one SPEC, or several in turn.

    Args:
        specs: see docs/train/data.md; all are checked before any is read.
        split: "train" or "test", for SPECs that have splits and name none.
        limit: keep the first `limit` good records of all sources together, and read no further.
        columns: {our column: column of the file, None not to read one}, or the name of a known layout.
        max_bad_fraction: allowed fraction (of 1) of bad rows among the rows read; bad rows are skipped.
        pixels: size bounds to which each image is scaled.
        prompt_suffix: added to the user's last message of every prompt, after a space.
        images_per_row: rows with another number of images are left out, not bad (`RecordSource.other_images`).
        extras: further columns to keep, by the files' own names: `RecordSource.extras` has their values, and
            `to_dataset` passes them on. A task has its options, `family`, `seed`, `split`, `prompt` and `answer`.
        optional: as `extras`, for data that have them.
        with_facts: note size and digest of each image during the check, for `summarize`.

    Raises:
        UserError: names file, row and reason: a bad SPEC or option, columns that no row has (MissingColumns for
            `extras`), too many bad rows, no good row, or the same generated items twice.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; {choose_one(split, SPLITS)}")
    texts = [specs] if isinstance(specs, str) else list(specs)
    if not texts:
        raise UserError("data: no source is given; write tasks:NAME or the path of a file")
    if len(set(texts)) < len(texts):
        raise UserError(f"data: a source is given twice: {', '.join(texts)}")
    mapping = check_columns(columns)
    checks = RowChecks(mapping, max_bad_fraction, extras, optional, with_facts, images_per_row)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    parts: list[TaskRows | StoredRows] = []
    generated: set[TaskRows] = set()
    for spec in [parse_spec(text) for text in texts]:
        left = None if limit is None else limit - sum(map(len, parts))
        if left == 0:
            break
        if isinstance(spec, PathSpec) and spec.kind == "jsonl":
            parts.append(StoredRows(_read_lines(spec, checks, left)))
            continue
        if not isinstance(spec, TaskSpec):
            named = mapping.get("images")
            images = ["images", "image"] if "images" not in mapping else [named] if named else []
            parts.append(StoredRows(_read_table(spec, checks, left, split, images)))
            continue
        n = spec.n if left is None else min(spec.n, left)
        rows = TaskRows(spec.family, spec.options, spec.seed, spec.split or split, n, tuple(extras), tuple(optional))
        checks.found.update(rows.columns)
        if images_per_row not in (None, 1):
            raise UserError(f"data {spec.text!r}: images_per_row = {images_per_row} leaves no row: each has one image")
        if replace(rows, n=0) in generated:
            raise UserError(f"data {spec.text!r}: another source generates the same items; give one another seed")
        generated.add(replace(rows, n=0))
        parts.append(rows)
    kept = [*extras, *(name for name in optional if name.partition(".")[0] in checks.found or name in checks.found)]
    name = " + ".join(texts)
    return RecordSource(
        parts,
        name=name,
        skipped=checks.skipped,
        other_images=checks.other_images,
        unread=checks.unread.lines(),
        pixels=pixels,
        prompt_suffix=prompt_suffix,
        extras=kept,
    )


def load_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str = "rows",
    folder: str | Path | None = None,
    columns: Mapping[str, str | None] | str | None = None,
    max_bad_fraction: float = 0.01,
    extras: Sequence[str] = (),
) -> RecordSource:
    """Like `load_records`, from dicts in memory, numbered from 1.

    Images are PIL images, encoded bytes, or paths relative to `folder`; messages use `name` as the file's.
    """
    checks = RowChecks(check_columns(columns), max_bad_fraction, extras)
    root = None if folder is None else Path(folder).resolve()
    stored = checks.run(enumerate(rows, start=1), name=name, unit="row", folder=root)
    unread = checks.unread.lines()
    return RecordSource([StoredRows(stored)], name=name, skipped=checks.skipped, unread=unread, extras=extras)


@dataclass(frozen=True)
class TaskRows:
    """Items 0 .. n-1 of a generated task; each access generates the item.

    Raises MissingColumns if some of `extra_names`, the columns of `extras`, do not exist.
    """

    filled: ClassVar[frozenset[str]] = frozenset(OPTIONAL_COLUMNS)
    has_choices: ClassVar[bool] = False
    family: str
    options: TaskOptions
    seed: int
    split: str
    n: int
    extra_names: tuple[str, ...] = ()
    optional_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        missing = [name for name in self.extra_names if name not in self.columns]
        if missing:
            raise MissingColumns(f"tasks:{self.family}", missing, self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Allowed names for `extras`."""
        return (*self._shared_columns, "prompt", "answer", "facts")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> StoredRow:
        item = make_item(self.family, self.options, seed=self.seed, index=index, split=self.split)
        columns = {**self._shared_columns, "prompt": item.prompt, "answer": item.answer, "facts": item.facts}
        return StoredRow(
            f"tasks:{self.family} item {index}",
            item.id,
            item.prompt,
            (item.image,),
            item.answer,
            item.response,
            item.perception_spans,
            extras={name: columns.get(name) for name in (*self.extra_names, *self.optional_names)},
        )

    def texts(self, index: int) -> list[str]:
        return []

    def identity(self, index: int) -> list[Any]:
        return [self.family, repr(self.options), self.seed, self.split, index]

    @property
    def _shared_columns(self) -> dict[str, Any]:
        return {"family": self.family, "seed": self.seed, "split": self.split, **asdict(self.options)}


def _read_lines(spec: PathSpec, checks: RowChecks, limit: int | None) -> tuple[StoredRow, ...]:
    try:
        with spec.path.open("rb") as lines:
            total = None
            if limit is None and lines.seekable():
                total = sum(1 for line in lines if line.strip())
                lines.seek(0)
            rows, folder = _json_lines(lines), spec.image_folder
            return checks.run(rows, name=spec.text, unit="line", folder=folder, limit=limit, total=total)
    except OSError as error:
        raise UserError(f"data {spec.text!r}: cannot be read: {error.strerror}") from error


def _read_table(
    spec: PathSpec | HubSpec, checks: RowChecks, limit: int | None, split: str, images: Sequence[str]
) -> tuple[StoredRow, ...]:
    if isinstance(spec, PathSpec):
        source = open_table(spec, split)
    else:
        source = open_hub_table(
            spec.name, split=spec.split or split, config=spec.config, images=images, label=spec.text
        )
    rows, total = enumerate(source.rows(), start=1), len(source.table)
    return checks.run(rows, name=spec.text, unit="row", folder=source.folder, limit=limit, total=total)


def _json_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value or RowError) of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        try:
            yield number, parse_json(text.decode("utf-8"), parse_constant=_refuse_constant)
        except UnicodeDecodeError:
            yield number, RowError("is not UTF-8 text")
        except json.JSONDecodeError as error:
            yield number, RowError(f"is not valid JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:
            yield number, RowError(f"is not valid JSON: {error}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
