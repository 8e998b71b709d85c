"""`digits`: arithmetic over a 2x2 grid of real handwritten digits (scikit-learn's, 1,797 of 8x8 pixels).

Level 1: the sum or the difference of one line (row, column or diagonal) of two digits.
Level 2: the sum of a line, then plus, minus or times a third digit, read in the middle of the reasoning.
Level 3: two parallel lines are summed and compared. The reasoning opens with the comparison, which depends on the image
but is not read from it.

The splits use different handwritten images: every fifth of each label is a test image.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from cppo.tasks.base import IMAGE_SIDE, Sketch, TaskOptions, compare_pairs, draw_wording, listed, pick

CELLS = ("top left", "top right", "bottom left", "bottom right")
LINES = {
    "top row": (0, 1),
    "bottom row": (2, 3),
    "left column": (0, 2),
    "right column": (1, 3),
    "falling diagonal": (0, 3),
    "rising diagonal": (2, 1),
}
PARALLELS = (("top row", "bottom row"), ("left column", "right column"))

TOTALS = {
    "sum": ("What is the sum of the {line}?", "What do the digits of the {line} add up to?"),
    "difference": ("What is the difference in the {line}?", "By how much do the digits of the {line} differ?"),
}
CHAINS = {
    "+": ("What is the sum of the {line} plus the {cell} digit?", "Add up the {line}, then add the {cell} digit."),
    "-": (
        "What is the sum of the {line} minus the {cell} digit?",
        "Add up the {line}, then subtract the {cell} digit.",
    ),
    "*": (
        "What is the sum of the {line} times the {cell} digit?",
        "Add up the {line}, then multiply by the {cell} digit.",
    ),
}
CONTEST = (
    "What is the difference between the sums of the {first} and the {second}?",
    "By how much do the sums of the {first} and the {second} differ?",
)
NAMING = "Which digits do you see?"

# The largest answer of the lower half, near the median of the unconditioned answers.
LOWER_HALF_ENDS = {"sum": 8, "difference": 2, "+": 13, "-": 4, "*": 36, "contest": 4}


@lru_cache(maxsize=1)
def handwritten_digits() -> dict[str, tuple[np.ndarray, ...]]:
    """Per split, one [n, 8, 8] uint8 array of grey levels for each label 0..9; never written to."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    by_label = [images[bunch.target == label] for label in range(10)]
    return {
        "test": tuple(group[4::5] for group in by_label),
        "train": tuple(np.delete(group, np.s_[4::5], axis=0) for group in by_label),
    }


def sketch(options: TaskOptions, rng: np.random.Generator, split: str) -> Sketch:
    """One question about a new grid; a pure function of its arguments."""
    wording, lower = draw_wording(rng, options.prior, split)
    question, kind, roles = _draw_question(rng, options.level, wording)
    while True:
        digits = [int(digit) for digit in rng.integers(10, size=4)]
        reasoning, answer = _solve(kind, roles, digits)
        if answer is not None and (answer <= LOWER_HALF_ENDS[kind]) == lower:
            break
    picture = _draw_grid(rng, digits, split)
    if options.ask == "name":
        return Sketch(NAMING, picture, f"I see {listed(digits)}.", ", ".join(map(str, digits)))
    return Sketch(question, picture, reasoning, str(answer))


def _draw_question(rng: np.random.Generator, level: int, wording: int) -> tuple[str, str, tuple]:
    """The question, its kind, and its cells (or the two lines' names)."""
    if level == 3:
        first, second = pick(rng, PARALLELS)
        return CONTEST[wording].format(first=first, second=second), "contest", (first, second)
    line = pick(rng, tuple(LINES))
    cells = LINES[line]
    if level == 1:
        kind = pick(rng, tuple(TOTALS))
        return TOTALS[kind][wording].format(line=line), kind, cells
    kind = pick(rng, tuple(CHAINS))
    cell = pick(rng, [place for place in range(4) if place not in cells])
    return CHAINS[kind][wording].format(line=line, cell=CELLS[cell]), kind, (*cells, cell)


def _solve(kind: str, roles: tuple, digits: list[int]) -> tuple[str, int | None]:
    """The marked reasoning and the answer; no answer if the compared lines are equal."""
    if kind == "contest":
        winner, reasoning, gap = compare_pairs([(digits[a], digits[b]) for a, b in (LINES[line] for line in roles)])
        return f"The {roles[winner].split()[0]} one is larger. {reasoning}", gap or None
    a, b, *rest = (digits[cell] for cell in roles)
    if kind == "difference":
        answer = abs(a - b)
        return f"I see [{a}] and [{b}]. {max(a, b)} - {min(a, b)} = {answer}.", answer
    reasoning = f"I see [{a}] and [{b}]. {a} + {b} = {a + b}."
    if kind == "sum":
        return reasoning, a + b
    (c,) = rest
    answer = {"+": a + b + c, "-": a + b - c, "*": (a + b) * c}[kind]
    return f"{reasoning} I see [{c}]. {a + b} {kind} {c} = {answer}.", answer


def _draw_grid(rng: np.random.Generator, digits: list[int], split: str) -> Image.Image:
    """RGB, 64x64: each digit in light ink of its own colour, 24 to 30 pixels large, on one dark ground."""
    groups = handwritten_digits()[split]
    picture = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), tuple(rng.integers(0, 61, size=3).tolist()))
    cell_side = IMAGE_SIDE // 2
    for place, digit in enumerate(digits):
        side = int(rng.integers(24, 31))
        ink = Image.fromarray(pick(rng, groups[digit])).resize((side, side), Image.Resampling.BICUBIC)
        row, column = divmod(place, 2)
        left, top = rng.integers(cell_side - side + 1, size=2).tolist()
        colour = tuple(rng.integers(150, 256, size=3).tolist())
        picture.paste(colour, (column * cell_side + left, row * cell_side + top), ink)
    return picture
