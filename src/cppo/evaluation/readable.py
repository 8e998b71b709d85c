"""Which rows a model can read: texts without the model's own marks, and short enough prompts.

A model's own mark means an image: the processor would look for an image that is not there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cppo.data import Record, RecordSource, chat_messages
from cppo.errors import UserError
from cppo.evaluation.generate import prompt_inputs
from cppo.policy.families import vision_placeholder_ids

MARK_NAMES = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")
"""Attributes in which processors and tokenizers keep their marks as text."""
PROMPTS_AT_ONCE = 16


def own_marks(processor: Any) -> list[str]:
    """Marks that the processor and its tokenizer read as the place or the frame of an image or a video."""
    tokenizer = processor.tokenizer
    words = tokenizer.convert_ids_to_tokens(vision_placeholder_ids(processor, None))
    named = [getattr(holder, name, None) for holder in (processor, tokenizer) for name in MARK_NAMES]
    return sorted({word for word in (*words, *named) if isinstance(word, str) and word})


def marked_rows(source: RecordSource, processor: Any) -> list[tuple[int, str]]:
    """(index, mark) of the records with such a mark in one of their texts; no image is decoded."""
    marks = own_marks(processor)
    found = ((index, _first(marks, source.texts(index))) for index in range(len(source)))
    return [(index, mark) for index, mark in found if mark is not None]


def check_marks(processor: Any, sources: Sequence[RecordSource | None], **options: str | None) -> None:
    """Refuse rows, and options by name, with a mark of the model's own. Raises UserError for the first."""
    for name, text in options.items():
        if text is not None and (mark := _first(own_marks(processor), [text])) is not None:
            raise UserError(
                f"{name}: it holds {mark}, which this model reads as the place of an image; write it in another way"
            )
    for source in sources:
        if source is not None and (marked := marked_rows(source, processor)):
            index, mark = marked[0]
            raise UserError(
                f"{source.place(index)}: its text holds {mark}, which this model reads as the place of an "
                f"image ({len(marked)} such rows); write it in another way, and <image> for an image"
            )


@dataclass(frozen=True)
class LongRow:
    """A row with a longer prompt than allowed; `place` names it, e.g. "my.jsonl line 3"."""

    place: str
    tokens: int


def prompt_lengths(
    processor: Any,
    source: RecordSource,
    *,
    system_prompt: str | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[int]:
    """Number of prompt tokens of every record, with image tokens, in the layout of training and evaluation.

    Every image goes through the processor. `progress` is called with the number of newly counted records.
    """
    counts: list[int] = []
    for start in range(0, len(source), PROMPTS_AT_ONCE):
        records: list[Record] = source[start : start + PROMPTS_AT_ONCE]
        prompts = [chat_messages(record.prompt, system_prompt) for record in records]
        inputs = prompt_inputs(processor, prompts, [record.images for record in records])
        counts += inputs["attention_mask"].sum(dim=1).tolist()
        progress(len(records))
    return counts


def long_rows(source: RecordSource, counts: list[int], limit: int) -> list[LongRow]:
    """The records with more than `limit` prompt tokens, in order."""
    return [LongRow(source.place(index), count) for index, count in enumerate(counts) if count > limit]


def _first(marks: Sequence[str], texts: Sequence[str]) -> str | None:
    return next((mark for mark in marks if any(mark in text for text in texts)), None)
