"""Texts that hold a model's own marks of images: its processor would look for an image that is not there."""

from collections.abc import Sequence
from typing import Any

from cppo.data import RecordSource
from cppo.errors import UserError
from cppo.policy.families import vision_placeholder_ids

NAMES = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")
"""Attributes under which processors and tokenizers keep their marks as text."""


def own_marks(processor: Any) -> list[str]:
    """What the processor and its tokenizer read as the place or the frame of an image or a video."""
    tokenizer = processor.tokenizer
    words = tokenizer.convert_ids_to_tokens(vision_placeholder_ids(processor, None))
    named = [getattr(holder, name, None) for holder in (processor, tokenizer) for name in NAMES]
    return sorted({word for word in (*words, *named) if isinstance(word, str) and word})


def marked_rows(source: RecordSource, processor: Any) -> list[tuple[int, str]]:
    """(index, mark) of the records with such a mark in a text of theirs; no image is decoded."""
    marks = own_marks(processor)
    found = ((index, _first(marks, source.texts(index))) for index in range(len(source)))
    return [(index, mark) for index, mark in found if mark is not None]


def check_marks(processor: Any, sources: Sequence[RecordSource | None], **options: str | None) -> None:
    """Refuse rows, and options by their names, with a mark of the model's own. Raises UserError with the first."""
    for name, text in options.items():
        if text is not None and (mark := _first(own_marks(processor), [text])) is not None:
            raise UserError(
                f"{name}: it holds {mark}, which this model reads as the place of an image; write it otherwise"
            )
    for source in sources:
        if source is not None and (marked := marked_rows(source, processor)):
            index, mark = marked[0]
            raise UserError(
                f"{source.place(index)}: its text holds {mark}, which this model reads as the place of an image "
                f"({len(marked)} such rows); write it otherwise, and <image> where an image stands"
            )


def _first(marks: Sequence[str], texts: Sequence[str]) -> str | None:
    return next((mark for mark in marks if any(mark in text for text in texts)), None)
