"""A record (a question, its images, its answer) and the lazy sequence of records for training."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from PIL import Image

from cppo.data.images import ANY_SIZE, ImageFacts, ImageRef, PixelBounds, RowError, decode_image
from cppo.data.prompts import Prompt, chat_messages, with_suffix
from cppo.errors import UserError
from cppo.views import stable_sample_id

if TYPE_CHECKING:
    import datasets

BASE_COLUMNS = ("prompt", "images", "answer", "sample_id")
OPTIONAL_COLUMNS = ("response", "perception_spans")
RECORD_COLUMNS = (*BASE_COLUMNS, *OPTIONAL_COLUMNS, "choices")
FIRST_PROMPTS = 8


@dataclass(frozen=True)
class Record:
    """One item for training or evaluation.

    Attributes:
        id: the row's own, else a hash of prompt and pixels.
        prompt: text, or chat messages that end with the user's.
        images: RGB, upright; possibly none.
        answer: the expected answer.
        response: a reference response, for supervised fine-tuning.
        perception_spans: [start, end) character spans of `response` that state what the images show.
        choices: texts of a multiple-choice question's options, in the order A, B, ...
    """

    id: str
    prompt: Prompt
    images: tuple[Image.Image, ...]
    answer: str
    response: str | None = None
    perception_spans: tuple[tuple[int, int], ...] | None = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Outline:
    """A record with the facts of its images instead of their pixels; `prompt` to `choices` as in `Record`."""

    prompt: Prompt
    images: tuple[ImageFacts, ...]
    answer: str
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class StoredRow:
    """A checked row with undecoded images.

    `place` names it in messages: "my.jsonl line 3". `extras` are the cells of further requested columns. `facts` are
    the facts of its images, if the check noted them.
    """

    place: str
    id: str | None
    prompt: Prompt
    images: tuple[ImageRef, ...]
    answer: str
    response: str | None
    perception_spans: tuple[tuple[int, int], ...] | None
    choices: tuple[str, ...] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    facts: tuple[ImageFacts, ...] | None = None

    def texts(self) -> list[str]:
        """All text of the row that a model reads: the prompt's texts, and the response if there is one."""
        messages = [self.prompt] if isinstance(self.prompt, str) else [message["content"] for message in self.prompt]
        parts = [part.get("text", "") for content in messages if isinstance(content, list) for part in content]
        return [*(content for content in messages if isinstance(content, str)), *parts, self.response or ""]

    def identity(self) -> list[Any]:
        """What tells the row from others without reading its images; its place and folder do not count."""
        files = [ref.name for ref in self.images if isinstance(ref, Path)]
        return [self.id, self.prompt, self.answer, self.response, self.choices, files]

    def outline(self) -> Outline:
        """The row without decoded images, if the check noted their facts."""
        facts = tuple(map(ImageFacts.of, self.record().images)) if self.facts is None else self.facts
        return Outline(self.prompt, facts, self.answer, self.choices)

    def record(self) -> Record:
        """Decode the images. Raises UserError if one has become unreadable since the check."""
        try:
            images = tuple(decode_image(ref) for ref in self.images)
        except RowError as error:
            raise UserError(f"{self.place}: {error} (it could be read when the data was checked)") from error
        sample_id = self.id if self.id is not None else stable_sample_id(self.prompt, images)
        return Record(sample_id, self.prompt, images, self.answer, self.response, self.perception_spans, self.choices)


@dataclass(frozen=True)
class StoredRows:
    """Rows of one file or list; each access decodes the record."""

    rows: tuple[StoredRow, ...]

    @property
    def has_choices(self) -> bool:
        return any(row.choices for row in self.rows)

    @property
    def filled(self) -> frozenset[str]:
        return frozenset(name for name in OPTIONAL_COLUMNS if all(getattr(row, name) is not None for row in self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> StoredRow:
        return self.rows[index]

    def texts(self, index: int) -> list[str]:
        return self.rows[index].texts()

    def identity(self, index: int) -> list[Any]:
        return self.rows[index].identity()


class Rows(Protocol):
    """A reader's result: rows, the columns that all rows fill, and the texts of each row from outside."""

    @property
    def filled(self) -> frozenset[str]: ...

    @property
    def has_choices(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> StoredRow: ...

    def texts(self, index: int) -> list[str]: ...

    def identity(self, index: int) -> list[Any]: ...


class RecordSource(Sequence[Record]):
    """Records of one or more sources in their given order, made on access; holds no decoded pixels of files.

    Attributes:
        name: the SPECs it was read from.
        skipped: the bad rows as (line or row number, "FILE: reason").
        other_images: places of rows that were left out for their number of images.
        unread: a line for each column that nothing reads and that looks like a misspelt name.
        pixels: bounds to which each image is scaled when its record is made. They change no `id`.
        prompt_suffix: added to each record's prompt, after a space (`with_suffix`). It changes no `id`.
        columns: the columns that every record fills, as `to_dataset` names them, and the extras.
    """

    def __init__(
        self,
        parts: Sequence[Rows],
        *,
        name: str,
        skipped: Sequence[tuple[int, str]],
        other_images: Sequence[str] = (),
        unread: Sequence[str] = (),
        pixels: PixelBounds = ANY_SIZE,
        prompt_suffix: str | None = None,
        extras: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.skipped = list(skipped)
        self.other_images = list(other_images)
        self.unread = list(unread)
        self.pixels = pixels
        self.prompt_suffix = prompt_suffix
        self.columns = BASE_COLUMNS + tuple(
            column for column in OPTIONAL_COLUMNS if all(column in part.filled for part in parts)
        )
        if any(part.has_choices for part in parts):
            self.columns += ("choices",)
        self.columns += tuple(name for name in extras if name not in self.columns)
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self._parts))
        self._kept: Sequence[int] = range(self._ends[-1])

    def keep(self, indices: Sequence[int]) -> "RecordSource":
        """Only the records at `indices`, in that order."""
        chosen = copy(self)
        chosen._kept = [self._kept[index] for index in indices]
        return chosen

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self._shown(self._row(index))

    def place(self, index: int) -> str:
        """The source of a record, for messages: "my.jsonl line 3"."""
        return self._row(index).place

    def texts(self, index: int) -> list[str]:
        """The texts of a record from outside: prompt and response, without `prompt_suffix`."""
        part, position = self._find(index)
        return part.texts(position)

    def digest(self) -> str:
        """32 hexadecimal digits of all records in their order, by their texts and the names of their images' files."""
        found = hashlib.sha256()
        for index in range(len(self)):
            part, position = self._find(index)
            found.update(json.dumps(part.identity(position), sort_keys=True).encode() + b"\n")
        return found.hexdigest()[:32]

    def response(self, index: int) -> str | None:
        """A record's reference response; no image is decoded."""
        return self._row(index).response

    def outline(self, index: int) -> Outline:
        """A record without its pixels, with the file's image size; fast after `load_records(with_facts=True)`."""
        return self._row(index).outline()

    def content_digest(self, index: int) -> str:
        """32 hexadecimal digits of a record's prompt, images and answer, before pixel bounds and suffix.

        The same in every order of rows and whatever the row's id; after `load_records(with_facts=True)` quickly.
        """
        row = self.outline(index)
        content = [row.prompt, [[image.size, image.digest] for image in row.images], row.answer, row.choices]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def extras(self, index: int) -> Mapping[str, Any]:
        """The further columns that were requested from `load_records`; no image is decoded."""
        return self._row(index).extras

    def _row(self, index: int) -> StoredRow:
        part, position = self._find(index)
        return part[position]

    def _shown(self, row: StoredRow) -> Record:
        record = row.record()
        images = tuple(map(self.pixels.apply, record.images))
        return replace(record, prompt=with_suffix(record.prompt, self.prompt_suffix), images=images)

    def _find(self, index: int) -> tuple[Rows, int]:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        position = self._kept[place]
        part = bisect_right(self._ends, position)
        return self._parts[part], position - (self._ends[part - 1] if part else 0)


def first_prompts(source: Sequence[Record], system_prompt: str | None = None) -> list[Any]:
    """The first prompts of a source as chat messages: enough to see what they ask for."""
    return [chat_messages(source[index].prompt, system_prompt) for index in range(min(FIRST_PROMPTS, len(source)))]


@dataclass(frozen=True)
class _RowBuilder:
    """The dataset's transform: each stored cell is a row number, from which the real value is made."""

    source: RecordSource
    system_prompt: str | None

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        # Rollouts of one prompt have the same number; they are decoded once and share the image objects.
        stored = {number: self.source._row(number) for number in set[int]().union(*batch.values())}
        rows = {number: (self.source._shown(row), row.extras) for number, row in stored.items()}
        return {column: [self._value(column, *rows[number]) for number in numbers] for column, numbers in batch.items()}

    def _value(self, column: str, record: Record, extras: Mapping[str, Any]) -> Any:
        if column == "prompt":
            return chat_messages(record.prompt, self.system_prompt)
        if column == "images":
            return list(record.images)
        if column == "perception_spans":
            return [list(span) for span in record.perception_spans or ()]
        if column == "choices":
            return list(record.choices or ())
        if column == "sample_id":
            return record.id
        return getattr(record, column) if column in RECORD_COLUMNS else extras[column]


def to_dataset(
    source: RecordSource, *, system_prompt: str | None = None, prompt_suffix: str | None = None
) -> "datasets.Dataset":
    """A `datasets.Dataset` that makes its rows on access: a train or eval dataset for TRL's trainers.

    A row is {"prompt": chat messages, "images": RGB PIL images (an empty list for text only), "answer": str,
    "sample_id": str}. If every record has them, it also has "response": str and "perception_spans": [[start, end],
    ...]. If some record has choices, it has "choices": list of str, empty for the others. The extras of `load_records`
    follow.

    Args:
        system_prompt: added before every prompt without a system message of its own.
        prompt_suffix: added to the user's last message, after a space, instead of the source's own suffix.
    """
    import datasets

    if prompt_suffix is not None:
        source = copy(source)
        source.prompt_suffix = prompt_suffix
    numbers = list(range(len(source)))
    table = datasets.Dataset.from_dict(dict.fromkeys(source.columns, numbers))
    return table.with_transform(_RowBuilder(source, system_prompt))
