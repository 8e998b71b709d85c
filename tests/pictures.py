"""Small pictures by number, as pixels, as encoded bytes and in rows of data."""

import io
import json

import numpy as np
from PIL import Image


def picture(seed, size=(8, 6)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed, size=(8, 6)):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def same(found, *seeds):
    """The images found are the pictures of these numbers."""
    assert [image.tobytes() for image in found] == [picture(seed).tobytes() for seed in seeds]


def write_rows(file, columns):
    """Write a file of rows about the pictures 0, 1, ..., one for each mapping of further columns. Returns its path."""
    rows = []
    for number, further in enumerate(columns):
        picture(number, (56, 56)).save(file.parent / f"{number}.png")
        rows.append({"prompt": f"What is in picture {number}?", "images": [f"{number}.png"], **further})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
