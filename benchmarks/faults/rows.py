"""Corrupt rows: `python benchmarks/faults/rows.py --each 20 --seed 0`.

Places `--each` faults of every kind among five times as many intact rows, in a .jsonl and in a Parquet file. Prints the
figures of docs/results/reliability.md: how many of the faults `cppo data check` finds, and how many intact rows it
refuses.

Measured with Python 3.11 and Pillow 13.0 in about ten seconds on two shared cores.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cppo.data import load_records

Row = dict[str, Any]
WHOLE_ROWS = 5


def picture(draw: random.Random, kind: str) -> bytes:
    """A picture of 96 x 64 random blocks, as a file."""
    blocks = np.random.default_rng(draw.getrandbits(32)).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(blocks).resize((96, 64), Image.Resampling.NEAREST).save(stream, kind, quality=90)
    return stream.getvalue()


def stored(folder: Path, draw: random.Random, content: bytes, ending: str) -> str:
    file = folder / f"{draw.getrandbits(64):x}.{ending}"
    file.write_bytes(content)
    return file.name


def row(folder: Path, draw: random.Random) -> Row:
    name = stored(folder, draw, picture(draw, "PNG"), "png")
    return {"prompt": f"What is {draw.random()}?", "images": [name], "answer": str(draw.randrange(100))}


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes, draw: random.Random) -> bytes:
    """The file with a changed byte in its first chunk of pixels, which its checksum covers."""
    place = content.index(b"IDAT") + 4 + draw.randrange(16)
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def with_image(change: Callable[[Path, random.Random], str]) -> Callable[[Row, Path, random.Random], Row]:
    return lambda own, folder, draw: {**own, "images": [change(folder, draw)]}


FAULTS: dict[str, Callable[[Row, Path, random.Random], Row]] = {
    "no prompt": lambda own, folder, draw: {**own, "prompt": None},
    "empty prompt": lambda own, folder, draw: {**own, "prompt": "  "},
    "no image file": with_image(lambda folder, draw: f"{draw.getrandbits(64):x}.png"),
    "image outside the folder": with_image(lambda folder, draw: "../outside.png"),
    "empty image file": with_image(lambda folder, draw: stored(folder, draw, b"", "png")),
    "text for an image": with_image(lambda folder, draw: stored(folder, draw, b"<html>404</html>", "jpg")),
    "half a PNG": with_image(lambda folder, draw: stored(folder, draw, half(picture(draw, "PNG")), "png")),
    "half a JPEG": with_image(lambda folder, draw: stored(folder, draw, half(picture(draw, "JPEG")), "jpg")),
    "a changed PNG": with_image(lambda folder, draw: stored(folder, draw, flipped(picture(draw, "PNG"), draw), "png")),
    "more marks than images": lambda own, folder, draw: {**own, "prompt": "<image><image> " + own["prompt"]},
}


def lay(folder: Path, kind: str, each: int, draw: random.Random) -> tuple[list[Row], set[int]]:
    """Rows in random order, and the numbers, from 1, of those with a fault of this kind."""
    faulty = [FAULTS[kind](row(folder, draw), folder, draw) for _ in range(each)]
    rows = [(one, True) for one in faulty] + [(row(folder, draw), False) for _ in range(WHOLE_ROWS * each)]
    draw.shuffle(rows)
    return [one for one, _ in rows], {number for number, (_, bad) in enumerate(rows, start=1) if bad}


def found(file: Path) -> set[int]:
    return {number for number, _ in load_records(str(file), max_bad_fraction=1.0).skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=20, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| fault | laid | found in .jsonl | found in Parquet | whole rows | taken for corrupt |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind in FAULTS:
        with tempfile.TemporaryDirectory() as name:
            folder, draw = Path(name), random.Random(f"{asked.seed}/{kind}")
            rows, laid = lay(folder, kind, asked.each, draw)
            lines, table = folder / "rows.jsonl", folder / "rows.parquet"
            lines.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
            pq.write_table(pa.Table.from_pylist(rows), table)
            seen = [found(lines), found(table)]
        counts = " | ".join(str(len(numbers & laid)) for numbers in seen)
        print(f"| {kind} | {len(laid)} | {counts} | {len(rows) - len(laid)} | {len((seen[0] | seen[1]) - laid)} |")


if __name__ == "__main__":
    main()
