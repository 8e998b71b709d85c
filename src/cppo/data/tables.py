"""Tables: Parquet files, folders that `datasets` saved, and hub data, memory-mapped by `datasets`.

A table may exceed memory: texts are read once, encoded images on each access.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cppo.data.spec import PathSpec
from cppo.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TableImage:
    """One encoded image of a table, read on access.

    Attributes:
        column: the table with this column only.
        fingerprint: identifies the table.
        row, index: its row from 0, and its place in the row's list (None if the cell is no list).
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


@dataclass(frozen=True)
class Table:
    """The rows of a file, of a folder or of one split on the hub, memory-mapped.

    Attributes:
        table: the rows.
        folder: where image paths begin; None if there are none.
    """

    table: "datasets.Dataset"
    folder: Path | None

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows for `load_rows` with `folder`; encoded images are `TableImage`s."""
        plain = self.table.with_format("arrow")
        columns = {name: plain.select_columns([name]) for name in plain.column_names}
        readers = {name: read for name, feature in self.table.features.items() if (read := _cell_reader(feature))}
        fingerprint = self.table._fingerprint
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
                yield {**row, **{name: read(row[name]) for name, read in readers.items()}}


def _cell_reader(feature: Any) -> Callable[[Any], Any] | None:
    """A function that restores the meant value of a cell with this feature of `datasets`; None if the cell has it.

    A `ClassLabel` becomes its name (null if not set). A float16 or float32 becomes the shortest number that rounds to
    it (0.1, not 0.10000000149011612), in lists and structs too.
    """
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return lambda code: None if code is None or code < 0 else feature.int2str(code)
    if isinstance(feature, datasets.Value) and feature.dtype in ("float16", "float32"):
        narrow = np.dtype(feature.dtype).type
        return lambda number: None if number is None else float(str(narrow(number)))
    if isinstance(feature, dict):
        readers = {name: reader for name, inner in feature.items() if (reader := _cell_reader(inner))}
        if readers:
            return lambda cell: cell and {**cell, **{name: read(cell[name]) for name, read in readers.items()}}
    if isinstance(feature, datasets.List | datasets.LargeList):
        read = _cell_reader(feature.feature)
        if read:
            return lambda cell: cell and [read(item) for item in cell]
    return None


def open_table(spec: PathSpec, split: str) -> Table:
    """The table that a SPEC names; `split` selects one of a folder's splits.

    Raises UserError if it cannot be read, or lacks the split.
    """
    import datasets

    if spec.kind == "parquet":
        return Table(prepared_table(spec.text, "parquet", [spec.path]), spec.image_folder)
    table = _loaded(spec.text, lambda: datasets.load_from_disk(str(spec.path)))
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise UserError(f"data {spec.text!r}: has no split {split!r}; it has {', '.join(table)}")
        table = table[split]
    return Table(table, spec.image_folder)


def prepared_table(label: str, kind: str, files: Sequence[Path], **options: Any) -> "datasets.Dataset":
    """The files of one `kind` ("parquet", "json" or "csv") as one table, as Arrow files in the cache folder.

    `label` is the data's name in messages. Raises UserError if a file cannot be read.
    """

    def prepared() -> Any:
        import datasets
        from pyarrow.dataset import ParquetFragmentScanOptions
        from pyarrow.parquet import read_metadata

        if kind == "parquet" and not any(read_metadata(path).num_rows for path in files):
            raise UserError(f"{label}: there are no rows")
        paths = {"train": [str(path) for path in files]}
        builder = datasets.load_dataset_builder(kind, data_files=paths, **options)
        if hasattr(builder.config, "fragment_scan_options"):
            # Arrow's default reads ahead, and holds a Parquet file as a whole.
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        builder.download_and_prepare()
        return builder.as_dataset(split="train")

    return _loaded(label, prepared)


def _encoded_bytes(cell: Any) -> Any:
    """The bytes in a cell as `datasets` writes images, {"bytes": ..., "path": ...} or bytes alone; None for others."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else None


def _loaded(label: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    # Broken files raise many kinds of errors.
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # `datasets` itself says only that something went wrong
            reason = reason.__cause__
        raise UserError(f"data {label!r}: cannot be read: {one_line(reason):.300}") from error
