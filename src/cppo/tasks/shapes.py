"""`shapes`: coloured shapes in the places of a grid; count, compare or locate some of them.

Level 1: four places (2x2), questions about colours.
Level 2: nine places (3x3), questions about colours or about shapes.
Level 3: nine places, questions about colour and shape together, among shapes that share one of the two.

The reasoning lists the contents of each place in reading order (the perception) and derives counts and places. Answers
are uniform over their range: counts 0 to 4 (level 1) or 0 to 5, places and "nowhere". Train and test scenes are
disjoint: a hash of the scene's facts (the colour and shape in each place) decides the split.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from cppo.tasks.base import IMAGE_SIDE, Sketch, TaskOptions, draw_from_half, draw_wording, listed, pick, scene_split
from cppo.tasks.drawing import COLOURS, SHAPES, draw_shape, tinted

Cell = tuple[str, str] | None
"""Colour and shape in a place, or nothing."""

EMPTY = "empty"
NOWHERE = "nowhere"
KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
PLACES = {
    4: ("top left", "top right", "bottom left", "bottom right"),
    9: (
        "top left",
        "top middle",
        "top right",
        "middle left",
        "centre",
        "middle right",
        "bottom left",
        "bottom middle",
        "bottom right",
    ),
}
WORDINGS = {
    "count": ("How many {first} are there?", "Count the {first}."),
    "compare": ("How many more {first} than {second} are there?", "By how much do the {first} outnumber the {second}?"),
    "locate": ("Where is the {one}?", "Find the {one}. Where is it?"),
}
NAMINGS = {
    "colour": "Which colours do you see?",
    "shape": "Which shapes do you see?",
    "both": "Which coloured shapes do you see?",
}


def sketch(options: TaskOptions, rng: np.random.Generator, split: str) -> Sketch:
    """One question about a new scene of the split; a pure function of its arguments."""
    wording, lower = draw_wording(rng, options.prior, split)
    places = 4 if options.level == 1 else 9
    aspect = {1: "colour", 2: pick(rng, ("colour", "shape")), 3: "both"}[options.level]
    task = pick(rng, tuple(WORDINGS))
    answer = draw_from_half(rng, _answers(task, places), lower)
    first, second = _draw_targets(rng, aspect)
    while True:
        cells = _draw_cells(rng, task, answer, aspect, first, second, places)
        if scene_split(cells) == split:
            break
    picture = _draw_scene(rng, cells)
    seen = [describe(cell, aspect) for cell in cells]
    if options.ask == "name":
        return Sketch(NAMINGS[aspect], picture, f"I see {listed(seen)}.", ", ".join(seen))
    question = WORDINGS[task][wording].format(
        first=_plural(first, aspect), second=_plural(second, aspect), one=_singular(first, aspect)
    )
    if task == "locate":
        conclusion = f"{first.capitalize()}: {answer}."
    else:
        conclusion = f"{first.capitalize()}: {seen.count(first)}."
    if task == "compare":
        more, fewer = seen.count(first), seen.count(second)
        conclusion += f" {second.capitalize()}: {fewer}. {more} - {fewer} = {answer}."
    return Sketch(question, picture, f"I see {listed(seen)}. {conclusion}", str(answer))


def describe(cell: Cell, aspect: str) -> str:
    """A place's text in the reasoning: its colour, its shape, or both."""
    if cell is None:
        return EMPTY
    return {"colour": cell[0], "shape": cell[1], "both": " ".join(cell)}[aspect]


def _answers(task: str, places: int) -> Sequence[int | str]:
    if task == "locate":
        return (*PLACES[places], NOWHERE)
    return range(5 if places == 4 else 6)


def _draw_targets(rng: np.random.Generator, aspect: str) -> tuple[str, str]:
    """Two different descriptions under this aspect; the first is compared with the second."""
    names = list(dict.fromkeys(describe(kind, aspect) for kind in KINDS))
    first = pick(rng, names)
    return first, pick(rng, [name for name in names if name != first])


def _draw_cells(
    rng: np.random.Generator, task: str, answer: int | str, aspect: str, first: str, second: str, places: int
) -> tuple[Cell, ...]:
    """A scene with `answer` as the right one: the targets in random places among other shapes and empty places."""
    if isinstance(answer, str):
        spot = None if answer == NOWHERE else PLACES[places].index(answer)
        wanted = [first if place == spot else None for place in range(places)]
    else:
        fewer = int(rng.integers(min(2, (places - answer) // 2) + 1)) if task == "compare" else 0
        counts = {first: answer + fewer, second: fewer}
        wanted = [name for name, count in counts.items() for _ in range(count)]
        wanted += [None] * (places - len(wanted))
        wanted = [wanted[place] for place in rng.permutation(places)]
    avoided = (first, second) if task == "compare" else (first,)
    others = [kind for kind in KINDS if describe(kind, aspect) not in avoided]
    if aspect == "both":
        near = [kind for kind in others if set(kind) & set(first.split())]
        others = near + others
    empty_share = 0.25
    cells: list[Cell] = []
    for name in wanted:
        if name is not None:
            cells.append(pick(rng, [kind for kind in KINDS if describe(kind, aspect) == name]))
        else:
            cells.append(None if rng.random() < empty_share else pick(rng, others))
    return tuple(cells)


def _draw_scene(rng: np.random.Generator, cells: tuple[Cell, ...]) -> Image.Image:
    """RGB, 64x64, on a dark ground; size (half to four fifths of a place) and position vary within a place."""
    columns = math.isqrt(len(cells))
    pitch = IMAGE_SIDE // columns
    picture = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), tuple(rng.integers(0, 46, size=3).tolist()))
    draw = ImageDraw.Draw(picture)
    for place, cell in enumerate(cells):
        if cell is None:
            continue
        row, column = divmod(place, columns)
        side = int(rng.integers(pitch * 5 // 9, pitch * 4 // 5 + 1))
        left, top = (1 + rng.integers(pitch - side - 1, size=2)).tolist()
        colour, shape = cell
        draw_shape(draw, shape, column * pitch + left, row * pitch + top, side, tinted(colour, rng))
    return picture


def _singular(name: str, aspect: str) -> str:
    return f"{name} shape" if aspect == "colour" else name


def _plural(name: str, aspect: str) -> str:
    noun = _singular(name, aspect)
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"
