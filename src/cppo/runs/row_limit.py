"""Rows left out of training: those with too many images or too long a prompt are counted and named, never shortened."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cppo.data import RecordSource
from cppo.errors import UserError, tell
from cppo.evaluation import LongRow, load_processor, long_rows, prompt_lengths
from cppo.recipes import RunOptions

NAMED_ROWS = 10
"""Rows left out that a run names on stderr; `cppo data check` names all."""


@dataclass(frozen=True)
class LeftOut:
    """Usable rows that a run does not train on.

    Attributes:
        images: places of the rows whose number of images is not `images_per_row`.
        long: of the others, those with more than `max_prompt_tokens` tokens.
    """

    images: list[str]
    long: list[LongRow]


def drop_rows(source: RecordSource, options: RunOptions) -> tuple[RecordSource, LeftOut]:
    """The rows to train on and those left out; without the two options all, at no cost.

    Every process counts all rows and so keeps the same ones. Raises UserError where no row is left.
    """
    images: list[str] = []
    if (wanted := options.images_per_row) is not None:
        fitting = [source.num_images(index) == wanted for index in range(len(source))]
        images = [source.place(index) for index, fits in enumerate(fitting) if not fits]
        if not any(fitting):
            raise UserError(f"{source.name}: images_per_row = {wanted} leaves no row: none has so many images")
        source = source.keep([index for index, fits in enumerate(fitting) if fits])
    limit = options.max_prompt_tokens
    if limit is None:
        return source, LeftOut(images, [])
    counts = prompt_lengths(load_processor(options.model), source, system_prompt=options.system_prompt)
    kept = source.keep([index for index, count in enumerate(counts) if count <= limit])
    if not len(kept):
        raise UserError(
            f"{source.name}: max_prompt_tokens = {limit} leaves no row: the shortest prompt has {min(counts)} tokens, "
            "images included; raise it, or lower max_pixels"
        )
    return kept, LeftOut(images, long_rows(source, counts, limit))


def warn_of_rows(reasons: Sequence[str], what: str) -> None:
    """Name the first rows left out on stderr, and say how many they are in all."""
    for reason in reasons[:NAMED_ROWS]:
        tell(f"warning: {reason}")
    if len(reasons) > NAMED_ROWS:
        tell(f"warning: {len(reasons)} {what} in all")


def warn_of_left_out(source: RecordSource, left_out: LeftOut, options: RunOptions) -> None:
    """Name bad rows that are skipped, and the other rows left out, on stderr."""
    warn_of_rows([f"row {number} is skipped: {reason}" for number, reason in source.skipped], "rows are skipped")
    if left_out.images:
        number = f"another number of images than images_per_row = {options.images_per_row}"
        tell(f"warning: {len(left_out.images)} rows are left out: they have {number}, {left_out.images[0]} first")
    limit = f"more than max_prompt_tokens = {options.max_prompt_tokens}"
    warn_of_rows(
        [f"{row.place} is left out: {row.tokens} prompt tokens are {limit}" for row in left_out.long],
        f"rows of {limit} are left out",
    )


def left_out_summary(source: RecordSource, left_out: LeftOut) -> dict[str, Any]:
    """Entries of `summary.json`: how many rows were bad or had other images, and every row that was too long."""
    return {
        "skipped_rows": len(source.skipped),
        "rows_with_other_images": len(left_out.images),
        "long_rows": [asdict(row) for row in left_out.long],
    }
