"""Small pictures by number, as pixels and as encoded bytes."""

import io

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
