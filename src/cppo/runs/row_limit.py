"""Rows left out of training: over-long prompts are counted and named, never shortened or dropped in silence."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cppo.data import RecordSource
from cppo.errors import tell
from cppo.evaluation import LongRow, load_processor, without_long_rows
from cppo.recipes import RunOptions

NAMED_ROWS = 10
"""Rows left out that a run names on stderr; `cppo data check` names all."""


def drop_long_rows(
    source: RecordSource, options: RunOptions, system_prompt: str | None = None
) -> tuple[RecordSource, list[LongRow]]:
    """The rows to train on and those left out by `max_prompt_tokens`; without that option all, at no cost.

    Every process counts all rows and so keeps the same ones.

    Raises:
        UserError: no row is left.
    """
    if options.max_prompt_tokens is None:
        return source, []
    return without_long_rows(source, load_processor(options.model), options.max_prompt_tokens, system_prompt)


def warn_of_rows(reasons: Sequence[str], what: str) -> None:
    """Name the first rows left out on stderr, and say how many they are in all."""
    for reason in reasons[:NAMED_ROWS]:
        tell(f"warning: {reason}")
    if len(reasons) > NAMED_ROWS:
        tell(f"warning: {len(reasons)} {what} in all")


def warn_of_left_out(source: RecordSource, long: Sequence[LongRow], options: RunOptions) -> None:
    """Name bad rows that are skipped, and rows with over-long prompts, on stderr."""
    warn_of_rows([f"row {number} is skipped: {reason}" for number, reason in source.skipped], "rows are skipped")
    limit = f"more than max_prompt_tokens = {options.max_prompt_tokens}"
    warn_of_rows(
        [f"{row.place} is left out: {row.tokens} prompt tokens are {limit}" for row in long],
        f"rows of {limit} are left out",
    )


def left_out_summary(source: RecordSource, long: Sequence[LongRow]) -> dict[str, Any]:
    """Entries of `summary.json`: how many rows were bad, and every row that was too long."""
    return {"skipped_rows": len(source.skipped), "long_rows": [asdict(row) for row in long]}
