"""Rows left out of training: over-long prompts are counted and named, never shortened or silently dropped."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cppo.data import RecordSource
from cppo.errors import UserError, tell
from cppo.evaluation import LongRow, load_processor, long_rows, prompt_lengths
from cppo.options import RunOptions

NAMED_ROWS = 10
"""Left out rows that a run names on stderr; `cppo data check` names all."""
PROBED_ROWS = 256
"""Number of rows with counted prompts, evenly spread over the data."""


def drop_long_rows(source: RecordSource, options: RunOptions) -> tuple[RecordSource, list[LongRow]]:
    """The rows to train on and those left out by `max_prompt_tokens`; without that option all rows, uncounted.

    Every process counts all rows and so keeps the same ones. Raises UserError if no row is left.
    """
    limit = options.max_prompt_tokens
    if limit is None:
        return source, []
    counts = prompt_lengths(load_processor(options.model), source, system_prompt=options.system_prompt)
    kept = source.keep([index for index, count in enumerate(counts) if count <= limit])
    if not len(kept):
        raise UserError(
            f"{source.name}: max_prompt_tokens = {limit} leaves no row: the shortest prompt has {min(counts)} tokens, "
            "images included; raise it, or lower max_pixels"
        )
    return kept, long_rows(source, counts, limit)


def probe_rows(source: RecordSource, options: RunOptions) -> tuple[list[int], list[int]]:
    """Indices of at most `PROBED_ROWS` rows, evenly spread, and the prompt tokens of each."""
    step = max(1, -(-len(source) // PROBED_ROWS))
    indices = list(range(0, len(source), step))
    processor = load_processor(options.model)
    return indices, prompt_lengths(processor, source.keep(indices), system_prompt=options.system_prompt)


def warn_of_rows(reasons: Sequence[str], what: str) -> None:
    """Name the first left out rows on stderr, and their total number."""
    for reason in reasons[:NAMED_ROWS]:
        tell(f"warning: {reason}")
    if len(reasons) > NAMED_ROWS:
        tell(f"warning: {len(reasons)} {what} in all")


def warn_of_left_out(source: RecordSource, long: Sequence[LongRow], options: RunOptions) -> None:
    """Name skipped bad rows and left out rows on stderr."""
    warn_of_rows([f"row {number} is skipped: {reason}" for number, reason in source.skipped], "rows are skipped")
    if others := source.other_images:
        wanted = f"another number of images than images_per_row = {options.images_per_row}"
        tell(f"warning: {len(others)} rows are left out: they have {wanted}; the first is {others[0]}")
    limit = f"more than max_prompt_tokens = {options.max_prompt_tokens}"
    warn_of_rows(
        [f"{row.place} is left out: {row.tokens} prompt tokens are {limit}" for row in long],
        f"rows of {limit} are left out",
    )


def left_out_summary(source: RecordSource, long: Sequence[LongRow], outside_bands: int = 0) -> dict[str, Any]:
    """Entries of `summary.json`: numbers of bad rows, of rows with other images and of rows outside a band of their
    ratings, and every row that was too long.
    """
    return {
        "skipped_rows": len(source.skipped),
        "rows_with_other_images": len(source.other_images),
        **({"rows_outside_bands": outside_bands} if outside_bands else {}),
        "long_rows": [asdict(row) for row in long],
    }
