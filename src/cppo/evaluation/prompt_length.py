"""How long prompts are, in tokens with images, and which rows are too long."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cppo.data import Record, RecordSource, chat_messages
from cppo.evaluation.generate import prompt_inputs

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class LongRow:
    """A row whose prompt has more tokens than wanted; `place` names it, e.g. "my.jsonl line 3"."""

    place: str
    tokens: int


def prompt_lengths(
    processor: Any,
    source: RecordSource,
    *,
    system_prompt: str | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[int]:
    """Prompt tokens of every record, those of its images included, as training and evaluation lay it out.

    Every image goes through the processor. `progress` is called with the number of records just counted.
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
    """The records of more than `limit` prompt tokens, in order."""
    return [LongRow(source.place(index), count) for index, count in enumerate(counts) if count > limit]
