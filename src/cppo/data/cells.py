"""Cells of a table as people write them: class labels by name, narrow floats without the digits that widening adds."""

from collections.abc import Callable
from typing import Any

import numpy as np


def cell_reader(feature: Any) -> Callable[[Any], Any] | None:
    """What turns a cell of a column with this feature of `datasets` into what was meant; None if it is that already.

    A `ClassLabel` becomes its name (null for one that is not set), a float16 or float32 the shortest number that it
    stands for (0.1, not 0.10000000149011612), in lists and structs too.
    """
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return lambda code: None if code is None or code < 0 else feature.int2str(code)
    if isinstance(feature, datasets.Value) and feature.dtype in ("float16", "float32"):
        narrow = np.dtype(feature.dtype).type
        return lambda number: None if number is None else float(str(narrow(number)))
    if isinstance(feature, dict):
        readers = {name: reader for name, inner in feature.items() if (reader := cell_reader(inner))}
        if readers:
            return lambda cell: cell and {**cell, **{name: read(cell[name]) for name, read in readers.items()}}
    if isinstance(feature, datasets.List | datasets.LargeList):
        read = cell_reader(feature.feature)
        if read:
            return lambda cell: cell and [read(item) for item in cell]
    return None
