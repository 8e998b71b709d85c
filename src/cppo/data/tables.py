"""Tables: Parquet files, folders that `datasets` saved, and hub data, memory-mapped by `datasets`.

A table need not fit into memory: texts are read once, encoded images each time they are asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cppo.data.spec import HubSpec, PathSpec
from cppo.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TableImage:
    """One encoded image of a table, read when it is asked for.

    Attributes:
        column: the table's column of that name alone.
        fingerprint: tells tables apart.
        row, index: its row from 0, and its place in the row's list (None where the cell is no list).
    """

    column: "datasets.Dataset" = field(compare=False, repr=False)
    fingerprint: str
    row: int
    index: int | None

    def read(self) -> bytes:
        """The encoded bytes."""
        (name,) = self.column.column_names
        cell = self.column[self.row : self.row + 1][name].to_pylist()[0]
        return _encoded_bytes(cell if self.index is None else cell[self.index])


def open_table(spec: PathSpec | HubSpec, split: str) -> "datasets.Dataset":
    """The table that a SPEC names, memory-mapped; `split` where the SPEC names none.

    Raises UserError where it cannot be read, or has no such split.
    """
    import datasets

    if isinstance(spec, HubSpec):
        return _loaded(spec, lambda: _prepared(spec.name).as_dataset(split=spec.split or split))
    if spec.kind == "parquet":
        files = {"train": str(spec.path)}
        return _loaded(spec, lambda: _prepared("parquet", data_files=files).as_dataset(split="train"))
    table = _loaded(spec, lambda: datasets.load_from_disk(str(spec.path)))
    if not isinstance(table, datasets.DatasetDict):
        return table
    if split not in table:
        raise UserError(f"data {spec.text!r}: has no split {split!r}, but {', '.join(table)}")
    return table[split]


def _prepared(name: str, **options: Any) -> "datasets.DatasetBuilder":
    """What `datasets.load_dataset` loads from, as Arrow files in the cache folder."""
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    builder = datasets.load_dataset_builder(name, **options)
    if hasattr(builder.config, "fragment_scan_options"):
        # Arrow's own default reads ahead, and holds a Parquet file as a whole.
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
    builder.download_and_prepare()
    return builder


def table_rows(table: "datasets.Dataset") -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a table; encoded images stand as `TableImage`s."""
    plain = table.with_format("arrow")
    columns = {name: plain.select_columns([name]) for name in plain.column_names}
    fingerprint = table._fingerprint
    for start in range(0, len(plain), ROWS_AT_ONCE):
        rows = plain[start : start + ROWS_AT_ONCE].to_pylist()
        for number, row in enumerate(rows, start=start):
            for name, cell in row.items():
                if isinstance(cell, list):
                    row[name] = [
                        TableImage(columns[name], fingerprint, number, index) if _encoded_bytes(item) else item
                        for index, item in enumerate(cell)
                    ]
                elif _encoded_bytes(cell):
                    row[name] = TableImage(columns[name], fingerprint, number, None)
            yield number + 1, row


def _encoded_bytes(cell: Any) -> Any:
    """The bytes in a cell as `datasets` writes images, {"bytes": ..., "path": ...} or bytes alone; None for others."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else None


def _loaded(spec: PathSpec | HubSpec, load: Callable[[], Any]) -> Any:
    try:
        return load()
    # Broken files, unknown names, missing splits and networks that are away all raise errors of their own kinds.
    except Exception as error:
        raise UserError(f"data {spec.text!r}: cannot be read: {one_line(error):.300}") from error
