"""The outer form of an answer: lists, tuples and sets, sizes, unfinished arithmetic, and an expression's unit.

All texts are in one spelling (`spelled`).
"""

import itertools
import re
from dataclasses import dataclass

from cppo.rewards.quantity import read_quantity, split_currency
from cppo.rewards.units import MAX_UNIT_CHARS, Unit, is_measurement, read_unit

MAX_PARTS = 12
"""Longer lists are compared in order only."""

_PIECE = re.compile(
    r"(?P<separator>(?<![0-9]),|,(?![0-9]{3}(?![0-9]))|;|\band\b)|\\[{}]|\\[a-zA-Z]+|[()\[\]{}]|.", re.DOTALL
)
_OPENING, _CLOSING = {"(", "[", "{", "\\{", "\\langle"}, {")", "]", "}", "\\}", "\\rangle"}
_SIZE = re.compile(r"\s*(?:\\times|(?<![a-zA-Z\\])[xX](?![a-zA-Z])|\bby\b)\s*")
_ARITHMETIC = re.compile(r"(?:[0-9.,()\[\]{}\s^+*/!|-]|\\times|\\cdot|\\div|\\frac|[xX](?=\s?[0-9]))+")
_OPERATION = re.compile(
    r"(?<=[0-9)}\]!])\s*(?:\+|-|\*|/|\\times|\\cdot|\\div|[xX])\s*(?=[0-9.({\[\\])|(?<=[0-9)])\s?(?=\()"
)
_SCIENTIFIC = re.compile(r"(?:\\times|\\cdot|[xX*])\s?10\s?\^\s?\{?\s?-?[0-9]+\s?\}?")
_EXPONENT = re.compile(r"\^\s?(?:\{[^{}]*+\}|-?[0-9a-zA-Z])")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_NAMED = re.compile(r"[a-zA-Z](?:_\{?\w\}?)?\s?=(?![=<>])")
_UNIT_STARTS = re.compile(r"(?<=[0-9\s})\]])(?=[^\W\d_]|°|\\?\$|[€£¥₹¢])")


@dataclass(frozen=True)
class Parts:
    """Elements of a list, or within brackets; `brackets` are empty for a bare list."""

    elements: tuple[str, ...]
    brackets: tuple[str, str] = ("", "")

    @property
    def ordered(self) -> bool:
        """Tuples and intervals are ordered, sets and bare lists are not."""
        return self.brackets[0] not in ("", "\\{")


def read_parts(text: str) -> Parts | None:
    """The elements of a list of at least two, bare or in brackets; None for anything else."""
    pieces = [(match[0], match["separator"]) for match in _PIECE.finditer(text)]
    depths = list(itertools.accumulate((piece in _OPENING) - (piece in _CLOSING) for piece, _ in pieces))
    if not depths or depths[-1] != 0 or min(depths) < 0:
        return None
    brackets = ("", "")
    if pieces[0][0] in _OPENING - {"{"} and depths.index(0) == len(pieces) - 1:
        brackets = (pieces[0][0], pieces[-1][0])
        pieces, depths = pieces[1:-1], [depth - 1 for depth in depths[1:-1]]
    elements = [""]
    for (piece, separator), depth in zip(pieces, depths, strict=True):
        if separator and depth == 0:
            elements.append("")
        else:
            elements[-1] += piece
    elements = [element.strip() for element in elements]
    if re.search(r"[,;]\s*and\b", text):  # "1, 2, and 3"
        elements = [element for element in elements if element]
    return Parts(tuple(elements), brackets) if len(elements) > 1 and all(elements) else None


def read_size(text: str) -> tuple[str, ...] | None:
    r"""The sides of a size, `2 \times 3`, `2x3` or `2 cm by 3 cm`; None for anything else, such as `2 \times 10^3`."""
    sides = tuple(_SIZE.split(_SCIENTIFIC.sub(lambda match: match[0].replace("times", "cdot").replace("x", "*"), text)))
    numbers = all(side[:1].isdecimal() and read_quantity(side) for side in sides)
    return sides if len(sides) > 1 and numbers else None


def is_undone(text: str) -> bool:
    r"""Whether a text is unfinished arithmetic: `3+4`, `2(3)`, `3\times4 cm`; not `1/2`, `2^3` or `6\times 10^4`."""
    last = split_unit(text.rpartition("=")[2].strip())[0]
    plain = _EXPONENT.sub("", _SCIENTIFIC.sub("", last))
    if _ARITHMETIC.fullmatch(plain) is None:
        return False
    return any(match[0].strip() != "/" for match in _OPERATION.finditer(plain))


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""An expression and its unit: `9\pi cm^2` gives `9\pi` and square centimetres.

    A number such as `2\sqrt{3}` may have any unit. With variables, a unit must have at least two letters and follow a
    space, as in `2x+3 cm`.
    """
    sign, currency, rest = split_currency(text)
    if currency:
        return sign + rest, read_unit(currency)
    for match in _UNIT_STARTS.finditer(text):
        head, tail = text[: match.start()].rstrip(), text[match.start() :].strip()
        if len(tail) > MAX_UNIT_CHARS or not re.search("[0-9]|\\\\", head):
            continue
        unit = read_unit(tail)
        if unit is None:
            continue
        bare = _COMMAND.sub("", _NAMED.sub("", head))
        is_number = not re.search("[a-zA-Z]", bare)
        if is_number or (text[match.start() - 1] == " " and is_measurement(unit)):
            return head, unit
    return text, None
