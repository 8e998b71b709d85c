"""Colours, outlines and numerals that the drawn families share; everything is legible at 64x64 pixels."""

from functools import lru_cache

import numpy as np
from PIL import ImageDraw

COLOURS = {
    "red": (225, 50, 45),
    "green": (45, 175, 70),
    "blue": (60, 95, 235),
    "yellow": (235, 205, 40),
    "pink": (235, 110, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")

_NUMERALS = (
    "###/#.#/#.#/#.#/###",
    ".#./##./.#./.#./###",
    "###/..#/###/#../###",
    "###/..#/###/..#/###",
    "#.#/#.#/###/..#/..#",
    "###/#../###/..#/###",
    "###/#../###/#.#/###",
    "###/..#/..#/..#/..#",
    "###/#.#/###/#.#/###",
    "###/#.#/###/..#/###",
)


def tinted(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """The named colour with each channel changed by up to 15 grey levels."""
    red, green, blue = COLOURS[colour]
    shift = rng.integers(-15, 16, size=3).tolist()
    return red + shift[0], green + shift[1], blue + shift[2]


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, left: int, top: int, side: int, fill: tuple[int, int, int]
) -> None:
    """Draw one of `SHAPES` into the square of `side` pixels with its corner at (left, top)."""
    right, bottom = left + side - 1, top + side - 1
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        draw.polygon(((left, bottom), (right, bottom), (left + side // 2, top)), fill=fill)
    else:
        arm = side // 3
        draw.rectangle((left + arm, top, right - arm, bottom), fill=fill)
        draw.rectangle((left, top + arm, right, bottom - arm), fill=fill)


@lru_cache(maxsize=10)
def numeral_points(digit: int) -> tuple[tuple[int, int], ...]:
    """The (x, y) pixels of a 3x5 numeral, from its upper left corner."""
    rows = _NUMERALS[digit].split("/")
    return tuple((x, y) for y, row in enumerate(rows) for x, dot in enumerate(row) if dot == "#")
