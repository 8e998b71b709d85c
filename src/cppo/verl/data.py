"""Write records as verl's Parquet file: one row per record, with its images."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from cppo.data import Record, RecordSource, chat_messages
from cppo.data.mapping import IMAGE_MARK
from cppo.errors import UserError
from cppo.files import writing

ROWS_AT_ONCE = 256
REWARD_COLUMNS = ("answer", "choices", "index", "sample_id")
"""Columns of a written row for rewards, beside the completion."""
OTHER_MARKS = ("<video>", "<audio>")
"""Texts that verl reads as the place of another medium in a row with images."""


def write_parquet(
    source: RecordSource,
    path: str | Path,
    name: str,
    *,
    system_prompt: str | None = None,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Write the records in verl's layout.

    A row has `data_source`, `prompt` (chat messages, with `<image>` for each image), `images` (PNG files of the
    records' own pixels), `reward_model.ground_truth` (the answer), and `extra_info` with `index`, `sample_id` (the key
    of a row's views in the trainer) and `choices` (for the accuracy reward).

    Args:
        name: of the data in verl's validation metrics.
        system_prompt: comes before every prompt without a system message.
        progress: called after each row.

    Raises:
        UserError: the file cannot be written, or a row holds text that verl would read as another medium.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct({"role": pa.string(), "content": pa.string()})
    schema = pa.schema(
        {
            "data_source": pa.string(),
            "prompt": pa.list_(message),
            "images": pa.list_(pa.struct({"bytes": pa.binary()})),
            "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
            "extra_info": pa.struct({"index": pa.int64(), "sample_id": pa.string(), "choices": pa.list_(pa.string())}),
        }
    )
    rows = _rows(source, name, system_prompt, progress)
    with writing(Path(path)), pq.ParquetWriter(path, schema) as writer:
        while batch := [row for _, row in zip(range(ROWS_AT_ONCE), rows, strict=False)]:
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _rows(
    source: RecordSource, name: str, system_prompt: str | None, progress: Callable[[], object]
) -> Iterator[dict[str, Any]]:
    for index in range(len(source)):
        record = source[index]
        yield {
            "data_source": name,
            "prompt": _messages(record, system_prompt, source.place(index)),
            "images": [{"bytes": _png(image)} for image in record.images],
            "reward_model": {"style": "rule", "ground_truth": record.answer},
            "extra_info": {"index": index, "sample_id": record.id, "choices": list(record.choices or ()) or None},
        }
        progress()


def _messages(record: Record, system_prompt: str | None, place: str) -> list[dict[str, str]]:
    """Chat messages of text alone; images without a place come before the user's last text."""
    messages = chat_messages(record.prompt, system_prompt)
    texts = [_text(message["content"]) for message in messages]
    if not any(IMAGE_MARK in text for text in texts):
        texts[-1] = IMAGE_MARK * len(record.images) + texts[-1]
    mark = next((mark for mark in OTHER_MARKS if record.images and any(mark in text for text in texts)), None)
    if mark is not None:
        raise UserError(f"{place}: verl would read {mark} in its text as the place of a medium; remove it")
    return [{"role": message["role"], "content": text} for message, text in zip(messages, texts, strict=True)]


def _text(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", IMAGE_MARK) for part in content)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
