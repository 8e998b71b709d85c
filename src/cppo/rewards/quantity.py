"""Numbers with an optional unit, read exactly: `1,000`, `1 1/2`, `50%`, `12 cm^2`, `3 million`, `€5`, `6e23`."""

import re
from dataclasses import dataclass
from fractions import Fraction

from cppo.rewards.units import CURRENCIES, Unit, read_unit, same_unit

MAX_NUMBER_CHARS = 60

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_POWER_OF_TEN = r"10\s?\^\s?\{?\s?(?P<%s>[+-]?[0-9]{1,3})\s?\}?(?![0-9])"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?(?:(?:(?P<whole>[0-9]+)\s?)?"
    rf"\\frac(?:\s?\{{\s?(?P<a>{_DECIMAL})\s?\}}\s?\{{\s?(?P<b>{_DECIMAL})\s?\}}|\s?(?P<a1>[0-9])\s?(?P<b1>[0-9]))"
    rf"|(?:(?P<mixed>[0-9]+)\s)?(?P<c>{_DECIMAL})\s?/\s?(?P<d>{_DECIMAL})"
    rf"|{_POWER_OF_TEN % 'power'}"
    rf"|(?P<decimal>{_DECIMAL})(?:\s?(?:\\times|\\cdot|[xX*])\s?{_POWER_OF_TEN % 'ten'})?)\s?(?P<percent>\\?%)?"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}


@dataclass(frozen=True)
class Quantity:
    """An exact value, whether it carries a percent sign, and its unit (None: none is written)."""

    value: Fraction
    percent: bool = False
    unit: Unit | None = None


def read_quantity(plain: str) -> Quantity | None:
    """A short text in one spelling as a quantity; None if any part of it is something else."""
    if len(plain) > MAX_NUMBER_CHARS:
        return None
    sign, currency, rest = split_currency(plain)
    match = _NUMBER.match(rest)
    if match is None or (sign and match["sign"]):
        return None
    value = _value(match)
    tail = rest[match.end() :].strip()
    for word, scale in _SCALES.items():
        if tail.casefold() == word or tail.casefold().startswith(f"{word} "):
            value, tail = value and value * scale, tail[len(word) :].strip()
    if value is None:
        return None
    value = -value if sign else value
    if not tail:
        return Quantity(value, match["percent"] is not None, read_unit(currency))
    unit = read_unit(tail)
    if unit is None or match["percent"] or (currency and read_unit(currency) != unit):
        return None
    return Quantity(value, unit=unit)


def split_currency(plain: str) -> tuple[str, str, str]:
    """Minus sign, currency sign and the rest of "-$5"; the first two are empty without a currency."""
    sign = "-" if plain.startswith("-") else ""
    unsigned = plain.removeprefix("-").lstrip()
    currency = next((mark for mark in CURRENCIES if unsigned.startswith(mark)), "")
    return (sign, currency, unsigned.removeprefix(currency).strip()) if currency else ("", "", plain)


def same_quantity(given: Quantity, expected: Quantity, tolerance: float = 0.0) -> bool:
    """Whether two quantities are equal: their values, and their units if both have one.

    Numbers are not converted to other units. One side may lack the percent sign: `50%` equals `0.5` and `50`.

    Args:
        tolerance: allowed error of the given value, as a fraction of the expected value.
    """
    if not same_unit(given.unit, expected.unit):
        return False
    pairs = [(given.value, expected.value)]
    if given.percent != expected.percent:
        pairs.append((given.value / (100 if given.percent else 1), expected.value / (100 if expected.percent else 1)))
    return any(abs(a - b) <= Fraction(tolerance) * abs(b) for a, b in pairs)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["power"]:
        value = Fraction(10) ** int(match["power"])
    elif match["decimal"]:
        value = _decimal(match["decimal"]) * Fraction(10) ** int(match["ten"] or 0)
    else:
        denominator = _decimal(match["b"] or match["b1"] or match["d"])
        if denominator == 0:
            return None
        above = _decimal(match["a"] or match["a1"] or match["c"])
        value = int(match["whole"] or match["mixed"] or 0) + above / denominator
    return -value if match["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
