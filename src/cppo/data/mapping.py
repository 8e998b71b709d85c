"""Turn one given row (a JSON object or a dict) into one checked `StoredRow`, under a column mapping."""

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Rational, Real
from pathlib import Path
from typing import Any

from cppo.data.images import ImageRef, OtherImages, RowError, image_ref
from cppo.data.record import StoredRow
from cppo.errors import UserError, choose_one

REQUIRED_COLUMNS = ("prompt", "answer")
COLUMNS = (*REQUIRED_COLUMNS, "images", "id", "response", "perception_spans", "choices")
LAYOUTS: dict[str, dict[str, str | None]] = {
    "geometry3k": {"prompt": "problem", "choices": None},  # the question does not contain its choices
    "mmk12": {"prompt": "question"},
    "papo": {"prompt": "problem"},
    "trl": {"answer": "solution"},
    "verl": {"answer": "reward_model.ground_truth"},
    "virl39k": {"prompt": "question", "images": "image", "id": "qid"},
}
"""Column names of well-known data sets and libraries, where they differ from ours. None: not read."""

IMAGE_MARK = "<image>"
_MODEL_MARK = re.compile(r"<\|(?:image|video|vision)\w*\|>|<video>")
"""Tokens that vision-language models read as the place of an image or video."""
ROLES = ("system", "user", "assistant")
MEDIA_COLUMNS = ("video", "videos", "audio", "audios")
"""Media columns that are not images. A row with one is not a question about its images alone."""
MOST_DIGITS = 100
"""Largest exponent of a decimal number that is written out."""


def check_columns(columns: Mapping[str, str | None] | str | None) -> dict[str, str | None]:
    """Return the mapping {our column: their column, or None not to read one}, or the mapping of a layout, as a dict.

    Raises UserError for an unknown column of ours or an unknown layout.
    """
    if isinstance(columns, str):
        if columns not in LAYOUTS:
            hint = f"{choose_one(columns, LAYOUTS)}, or give a mapping such as {{prompt: question}}"
            raise UserError(f"columns: {columns!r} is not a layout; {hint}")
        return LAYOUTS[columns]
    for ours, theirs in (columns or {}).items():
        if ours not in COLUMNS:
            raise UserError(f"columns: {ours!r} is unknown; {choose_one(ours, COLUMNS)} (write {{ours: theirs}})")
        unread = theirs is None and ours not in REQUIRED_COLUMNS
        if not unread and (not isinstance(theirs, str) or not theirs):
            raise UserError(f"columns: {ours} must name a column of the file, not {theirs!r}")
    return dict(columns or {})


def parse_row(
    row: Mapping[str, Any],
    *,
    columns: Mapping[str, str | None],
    folder: Path | None,
    place: str,
    extras: Sequence[str] = (),
    images_per_row: int | None = None,
) -> StoredRow:
    """Check every field of `row` except the pixels of its images. `place` names the row in messages.

    `extras` are further columns to keep, by the row's own names.

    Raises OtherImages if the row has not `images_per_row` images, RowError with the reason if the row is bad.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be a JSON object {{...}}, found {type(row).__name__}")

    _refuse_other_media(row)

    def field(ours: str) -> Any:
        return _cell(row, columns.get(ours, ours))

    def required(ours: str) -> Any:
        value = field(ours)
        if value is None:
            raise RowError(f"column {columns.get(ours, ours)!r} is missing or null")
        return value

    images = _images(row, columns, folder)
    if images_per_row is not None and len(images) != images_per_row:
        raise OtherImages(f"has {len(images)} images")
    own_id, response = field("id"), field("response")
    return StoredRow(
        place=place,
        id=None if own_id is None else _text(_number_as_text(own_id, "id"), "id"),
        prompt=_prompt(required("prompt"), len(images)),
        images=images,
        answer=_answer(required("answer")),
        response=None if response is None else _text(response, "response"),
        perception_spans=_spans(field("perception_spans"), response),
        choices=_choices(field("choices")),
        extras={name: _cell(row, name) for name in extras},
    )


def _cell(row: Mapping[str, Any], name: str | None) -> Any:
    """The cell of a column; for a `name` with dots a value inside a cell: `reward_model.ground_truth`."""
    if name is None:
        return None
    if name in row or "." not in name:
        return row.get(name)
    first, _, rest = name.partition(".")
    inner = row.get(first)
    return _cell(inner, rest) if isinstance(inner, Mapping) else None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, found {json.dumps(value, default=repr):.80}")
    if not value.strip():
        raise RowError(f"{name} is empty")
    if (mark := _MODEL_MARK.search(value)) is not None:
        raise RowError(f"{name} holds {mark[0]}, a token for the model only; write {IMAGE_MARK} for an image")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half of a surrogate pair, which is not a character") from error
    return value


def _number_as_text(value: Any, name: str) -> Any:
    """A number (also NumPy's or Decimal) as text; any other value unchanged."""
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return value
    is_exact = isinstance(value, Rational)  # a whole number may be too large for a float
    if not (is_exact or (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value))):
        raise RowError(f"{name} is {str(value).lower()}, not a number; write it as text if you mean the word")
    exponent = value.adjusted() if isinstance(value, Decimal) else MOST_DIGITS
    return f"{value:f}" if abs(exponent) < MOST_DIGITS else str(value)


def _answer(value: Any) -> str:
    """The expected answer as text; a list of accepted answers as JSON, which the rewards read."""
    if not isinstance(value, list | tuple) or not value:
        return _text(_number_as_text(value, "answer"), "answer")
    accepted = [_text(_number_as_text(one, "answer"), "answer") for one in value]
    return accepted[0] if len(accepted) == 1 else json.dumps(accepted, ensure_ascii=False)


def _is_void(value: Any, depth: int = 8) -> bool:
    """Whether a value is empty: null, empty, or made of such values, as Arrow fills missing cells."""
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return depth > 0 and all(_is_void(one, depth - 1) for one in inner)
    return value is None or (isinstance(value, str) and not value)


def _refuse_other_media(row: Mapping[str, Any]) -> None:
    for name in MEDIA_COLUMNS:
        if not _is_void(row.get(name)):
            raise RowError(f"column {name!r} holds {name.rstrip('s')}, which no model sees")


def _images(row: Mapping[str, Any], columns: Mapping[str, str | None], folder: Path | None) -> tuple[ImageRef, ...]:
    value = _cell(row, columns.get("images", "images"))
    if "images" not in columns and row.get("image") is not None:
        if value is not None:
            raise RowError("both 'image' and 'images' are given; keep one")
        value = row["image"]
    if value is None:
        return ()
    return tuple(image_ref(one, folder) for one in (value if isinstance(value, list | tuple) else [value]))


def _prompt(value: Any, image_count: int) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        text = _text(value, "prompt")
        if IMAGE_MARK not in text:
            return text
        value = [{"role": "user", "content": text}]
    if not isinstance(value, list) or not value:
        raise RowError("prompt must be text or a list of chat messages")
    messages = [_message(message) for message in value]
    if messages[-1]["role"] != "user":
        raise RowError("prompt must end with a user message")
    if all(isinstance(message["content"], str) and IMAGE_MARK not in message["content"] for message in messages):
        return messages
    # Once one content is a list of parts, all are: then only the placeholders mark the images.
    messages = [
        {**message, "content": _parts_of_text(message["content"])} if isinstance(message["content"], str) else message
        for message in messages
    ]
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != image_count:
        raise RowError(f"prompt has {placeholders} image placeholders, but the row has {image_count} images")
    return messages


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise RowError(f"each chat message needs a role ({', '.join(ROLES)}) and a content")
    role, content = message["role"], message.get("content")
    if isinstance(content, list) and content:
        return {"role": role, "content": [_part(part, role) for part in content]}
    return {"role": role, "content": _text(content, f"content of the {role} message")}


def _parts_of_text(text: str) -> list[dict[str, str]]:
    """Text with `<image>` marks as parts; the marks become placeholders."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _part(part: Any, role: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), f"text of the {role} message")}
    if kind == "image" and all(_is_void(value) for name, value in part.items() if name != "type"):
        return {"type": "image"}
    raise RowError('content parts are {"type": "text", "text": ...} or {"type": "image"}; the files go in images')


def _spans(value: Any, response: str | None) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    if response is None:
        raise RowError("perception_spans need a response")
    if not isinstance(value, list | tuple) or not all(_is_span(span, len(response)) for span in value):
        raise RowError(f"perception_spans must be [start, end] pairs with 0 <= start < end <= {len(response)}")
    return tuple((start, end) for start, end in value)


def _choices(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) > len(string.ascii_uppercase):
        raise RowError("choices must be a list of at most 26 texts, for the options A, B, ...")
    return tuple(_text(_number_as_text(choice, "choices"), "choices") for choice in value) or None


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, list | tuple) or len(span) != 2 or any(type(edge) is not int for edge in span):
        return False
    return 0 <= span[0] < span[1] <= length
