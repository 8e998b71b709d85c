"""`chart`: coloured bars of height 1 to 9 beside an axis with numbered ticks; read them, then compute.

Level 1: three bars; the sum or the difference of two of them, or the height of the tallest.
Level 2: four bars; the sum or difference of the tallest and the shortest, or the sum of all.
Level 3: four bars; two pairs are summed and compared. The reasoning opens with the comparison, which depends on the
image but is not read from it.

Train and test scenes are disjoint: a hash of the scene's facts (colours and heights in order) decides the split.
"""

import numpy as np
from PIL import Image, ImageDraw

from cppo.tasks.base import (
    IMAGE_SIDE,
    Sketch,
    TaskOptions,
    compare_pairs,
    draw_from_half,
    draw_wording,
    listed,
    pick,
    scene_split,
)
from cppo.tasks.drawing import COLOURS, numeral_points, tinted

TALLEST = 9
UNIT = 6
"""Pixels per unit of height."""
BASELINE = 60
"""Row of the horizontal axis; a bar of height h fills the rows BASELINE - UNIT * h to BASELINE - 1."""
AXIS = 7
"""Column of the vertical axis; bars are to its right."""

QUESTIONS = {1: ("sum", "difference", "tallest"), 2: ("range", "ends", "total"), 3: ("contest",)}
WORDINGS = {
    "sum": ("What is the sum of the {0} and the {1} bar?", "What do the {0} and the {1} bar add up to?"),
    "difference": (
        "What is the difference between the {0} and the {1} bar?",
        "By how much do the {0} and the {1} bar differ?",
    ),
    "tallest": ("How tall is the tallest bar?", "What height does the tallest bar reach?"),
    "range": (
        "What is the difference between the tallest and the shortest bar?",
        "By how much do the tallest and the shortest bar differ?",
    ),
    "ends": (
        "What is the sum of the tallest and the shortest bar?",
        "What do the tallest and the shortest bar add up to?",
    ),
    "total": ("What is the sum of all bars?", "What do all bars add up to?"),
    "contest": (
        "What is the difference between {0} plus {1} and {2} plus {3}?",
        "By how much do {0} plus {1} and {2} plus {3} differ?",
    ),
}
NAMING = "Which bars do you see?"

# The largest answer of the lower half, near the median of the unconditioned answers.
LOWER_HALF_ENDS = {"sum": 9, "difference": 2, "tallest": 5, "range": 5, "ends": 9, "total": 19, "contest": 4}


def sketch(options: TaskOptions, rng: np.random.Generator, split: str) -> Sketch:
    """One question about a new chart of the split; a pure function of its arguments."""
    wording, lower = draw_wording(rng, options.prior, split)
    kind = pick(rng, QUESTIONS[options.level])
    count = 3 if options.level == 1 else 4
    peak = draw_from_half(rng, range(2, TALLEST + 1), lower)
    while True:
        colours = [tuple(COLOURS)[place] for place in rng.permutation(len(COLOURS))[:count]]
        asked = rng.permutation(count).tolist()
        heights = (1 + rng.integers(peak if kind == "tallest" else TALLEST, size=count)).tolist()
        if kind == "tallest":
            heights[asked[0]] = peak
        reasoning, answer = _solve(kind, heights, [colours[bar] for bar in asked], asked)
        fits = answer is not None and (answer <= LOWER_HALF_ENDS[kind]) == lower
        if fits and scene_split((tuple(colours), tuple(heights))) == split:
            break
    picture = _draw_chart(rng, colours, heights)
    if options.ask == "name":
        bars = [f"{colour} {height}" for colour, height in zip(colours, heights, strict=True)]
        return Sketch(NAMING, picture, f"I see {listed(bars)}.", ", ".join(bars))
    question = WORDINGS[kind][wording].format(*(colours[bar] for bar in asked))
    return Sketch(question, picture, reasoning, str(answer))


def _solve(kind: str, heights: list[int], names: list[str], asked: list[int]) -> tuple[str, int | None]:
    """The marked reasoning and the answer; no answer if the compared pairs are equal.

    `names` are the colours of the bars in the order `asked`; other questions read all bars from left to right.
    """
    values = [heights[bar] for bar in asked]
    if kind == "contest":
        winner, reasoning, gap = compare_pairs([(values[0], values[1]), (values[2], values[3])])
        pair = " plus ".join(names[2 * winner :][:2])
        return f"{pair.capitalize()} is more. {reasoning}", gap or None
    if kind in ("sum", "difference"):
        a, b = values[:2]
        high, low, seen = max(a, b), min(a, b), listed((a, b))
        if kind == "sum":
            return f"I see {seen}. {a} + {b} = {a + b}.", a + b
        return f"I see {seen}. {high} - {low} = {high - low}.", high - low
    high, low, seen = max(heights), min(heights), listed(heights)
    if kind == "tallest":
        return f"I see {seen}. The tallest is {high}.", high
    if kind == "total":
        steps, total = [], heights[0]
        for height in heights[1:]:
            steps.append(f"{total} + {height} = {total + height}.")
            total += height
        return f"I see {seen}. {' '.join(steps)}", total
    found = f"I see {seen}. The tallest is {high}, the shortest is {low}."
    if kind == "ends":
        return f"{found} {high} + {low} = {high + low}.", high + low
    return f"{found} {high} - {low} = {high - low}.", high - low


def _draw_chart(rng: np.random.Generator, colours: list[str], heights: list[int]) -> Image.Image:
    """RGB, 64x64, on a light ground: axes, ticks numbered 0 to 9, bars with slightly varying width and place."""
    picture = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), tuple(rng.integers(230, 256, size=3).tolist()))
    draw = ImageDraw.Draw(picture)
    ink = (40, 40, 40)
    for value in range(TALLEST + 1):
        row = BASELINE - UNIT * value
        draw.line((AXIS - 2, row, AXIS, row), fill=ink)
        draw.point([(1 + x, row - 2 + y) for x, y in numeral_points(value)], fill=ink)
    draw.line((AXIS, BASELINE - UNIT * TALLEST, AXIS, BASELINE), fill=ink)
    draw.line((AXIS, BASELINE, IMAGE_SIDE - 1, BASELINE), fill=ink)
    pitch = (IMAGE_SIDE - AXIS - 1) // len(heights)
    for place, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        width = int(rng.integers(pitch - 6, pitch - 2))
        left = AXIS + 2 + place * pitch + int(rng.integers(pitch - width))
        top = BASELINE - UNIT * height
        draw.rectangle((left, top, left + width - 1, BASELINE - 1), fill=tinted(colour, rng))
    return picture
