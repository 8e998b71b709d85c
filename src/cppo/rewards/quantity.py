"""Numbers with an optional unit, read exactly: `1,000`, `1 1/2`, `50%`, `12 cm^2`, `3 million`, `€5`."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_NUMBER_CHARS = 60

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?(?:(?:(?P<whole>[0-9]+)\s?)?\\[dt]?frac\{{\s?(?P<a>{_DECIMAL})\s?\}}\{{\s?(?P<b>{_DECIMAL})\s?\}}"
    rf"|(?:(?P<mixed>[0-9]+)\s)?(?P<c>{_DECIMAL})\s?/\s?(?P<d>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL}))\s?(?P<percent>\\?%)?"
)
_CURRENCY = {"€": "euro", "£": "pound sterling", "¥": "yen", "\\$": "dollar"}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "²": 2, "³": 3}
_UNITS = {
    alias: name
    for name, aliases in {
        "nanometer": "nm nanometer nanometre",
        "millimeter": "mm millimeter millimetre",
        "centimeter": "cm centimeter centimetre",
        "decimeter": "dm decimeter decimetre",
        "meter": "m meter metre",
        "kilometer": "km kilometer kilometre",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard",
        "mile": "mi mile",
        "milligram": "mg milligram",
        "gram": "g gram",
        "kilogram": "kg kilogram",
        "ton": "ton tonne",
        "ounce": "oz ounce",
        "pound": "lb lbs pound",
        "milliliter": "ml milliliter millilitre",
        "liter": "l liter litre",
        "second": "s sec second",
        "millisecond": "ms millisecond",
        "minute": "min minute",
        "hour": "h hr hour",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "yr year",
        "degree": "° deg degree \\circ circ",
        "radian": "rad radian",
        "newton": "n newton",
        "joule": "j joule",
        "watt": "w watt",
        "volt": "v volt",
        "ampere": "ampere amp",
        "ohm": "ω ohm",
        "hertz": "hz hertz",
        "pascal": "pa pascal",
        "kelvin": "k kelvin",
        "mole": "mol mole",
        "dollar": "dollar usd",
        "euro": "euro eur",
        "unit": "unit",
    }.items()
    for alias in aliases.split()
}
_UNIT = re.compile(r"[a-zωµμ°²³^/{}\\ .0-9-]{1,40}")
_UNIT_PART = re.compile(r"(?P<name>\\?[a-zωµμ]+|°)\s?(?:\^?\s?\{?(?P<power>-?[1-9])\}?|(?P<raised>[²³]))?")
_NO_UNITS = {"or", "and", "to", "not", "by", "plus", "minus", "times", "over", "mod", "dozen", "half", "is", "percent"}


@dataclass(frozen=True)
class Quantity:
    """An exact value, whether it carries a percent sign, and its unit, e.g. "centimeter^2" (None: none is written)."""

    value: Fraction
    percent: bool = False
    unit: str | None = None


def read_quantity(plain: str) -> Quantity | None:
    """The quantity that a short casefolded text is, all of it; None for anything else."""
    if len(plain) > MAX_NUMBER_CHARS:
        return None
    currency = next((sign for sign in _CURRENCY if plain.startswith(sign)), "")
    rest = plain.removeprefix(currency).strip()
    match = _NUMBER.match(rest)
    if match is None:
        return None
    value = _value(match)
    tail = rest[match.end() :].strip()
    for word, scale in _SCALES.items():
        if tail == word or tail.startswith(f"{word} "):
            value, tail = value and value * scale, tail.removeprefix(word).strip()
    if value is None:
        return None
    if not tail:
        return Quantity(value, match["percent"] is not None, _CURRENCY.get(currency))
    unit = _read_unit(tail)
    if unit is None or currency or match["percent"]:
        return None
    return Quantity(value, unit=unit)


def same_quantity(given: Quantity, expected: Quantity, tolerance: float = 0.0) -> bool:
    """Whether two quantities are equal: their values, and their units where both have one.

    Units are not converted. A percent sign may be left out on one side: `50%` equals `0.5` and `50`.

    Args:
        tolerance: how far the given value may lie from the expected one, as a fraction of the latter.
    """
    if given.unit is not None and expected.unit is not None and given.unit != expected.unit:
        return False
    pairs = [(given.value, expected.value)]
    if given.percent != expected.percent:
        pairs.append((given.value / (100 if given.percent else 1), expected.value / (100 if expected.percent else 1)))
    return any(abs(a - b) <= Fraction(tolerance) * abs(b) for a, b in pairs)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["decimal"]:
        value = _decimal(match["decimal"])
    else:
        denominator = _decimal(match["b"] or match["d"])
        if denominator == 0:
            return None
        value = int(match["whole"] or match["mixed"] or 0) + _decimal(match["a"] or match["c"]) / denominator
    return -value if match["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _read_unit(text: str) -> str | None:
    """One name for all spellings of a unit: "cm^2", "cm²", "square centimeters"; None if it is no unit.

    Words of three letters and more are units of their own ("apples"), so that variables and functions are not.
    """
    if _UNIT.fullmatch(text) is None:
        return None
    parts = [_read_factor(part) for part in re.split(r"\s?/\s?|\sper\s", text)]
    return None if None in parts else "/".join(map(str, parts))


def _read_factor(text: str) -> str | None:
    words = text.removeprefix("^").replace("{\\circ}", "\\circ").strip().removesuffix(".").split()
    power = 1
    for edge in (0, -1):
        if len(words) > 1 and words[edge] in _POWERS:
            power = _POWERS[words.pop(edge)]
    if len(words) == 1 and (match := _UNIT_PART.fullmatch(words[0])):
        power = int(match["power"] or _POWERS.get(match["raised"], power))
        words = [match["name"]]
    names = [_unit_name(word) for word in words]
    if not names or len(names) > 3 or None in names:
        return None
    name = " ".join(map(str, names))
    return name if power == 1 else f"{name}^{power}"


def _unit_name(word: str) -> str | None:
    if word in _NO_UNITS:
        return None
    for spelling in (word, word.removesuffix("s")):
        if spelling in _UNITS:
            return _UNITS[spelling]
    return word.removesuffix("s") if len(word) >= 3 and word.isalpha() else None
