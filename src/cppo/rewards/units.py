"""Units of measurement by pint's names: `cm^2` is "square centimetres", `MHz` is not `mHz`, `kJ mol^{-1}` is `kJ/mol`.

pint looks up single words and never reads an expression, so hostile text costs a table look-up.
"""

import functools
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pint

Unit = tuple[tuple[str, int], ...]
"""Factors with their powers, sorted: `m/s` is (("meter", 1), ("second", -1)). Any word may be a factor: "apple"."""

MAX_UNIT_CHARS = 60

_METRIC = {
    "meter", "gram", "second", "liter", "newton", "joule", "watt", "volt", "ampere", "kelvin", "coulomb", "tesla",
    "hertz", "pascal", "ohm", "mole", "electron_volt", "calorie", "byte", "bit", "watt_hour",
}  # fmt: skip
_OTHER = {
    "minute", "hour", "day", "year", "inch", "foot", "yard", "mile", "pound", "ounce", "degree", "radian",
    "decibel", "bar", "metric_ton", "mile_per_hour", "kilometer_per_hour", "cubic_centimeter", "hectare",
}  # fmt: skip
"""Units of up to three letters; pint knows more, such as `ab` for attobarns."""
_PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "micro": "μu", "nano": "n", "mega": "M", "giga": "G", "deci": "d"}
_LETTERS = set("mgshlLNJWVKACTΩ")
"""Letters that are units by themselves; other letters are variables."""
_STERLING = "pound sterling"
_OWN = {
    "$": "dollar", "\\$": "dollar", "usd": "dollar", "us$": "dollar", "us\\$": "dollar",
    "€": "euro", "eur": "euro", "£": _STERLING, "gbp": _STERLING, "lb": "lb", "lbs": "lb",
    "¥": "yen", "jpy": "yen", "₹": "rupee", "¢": "cent", "°": "degree", "°C": "degree_Celsius",
    "°F": "degree_Fahrenheit", "hz": "hertz", "people": "person", "deg": "degree", "sec": "second", "secs": "second",
    "hrs": "hour", "mins": "minute", "in": "inch", "kmh": "kilometer_per_hour",
}  # fmt: skip
CURRENCIES = ("US\\$", "US$", "\\$", "$", "€", "£", "¥", "₹")
_NO_UNITS = {
    "or", "and", "to", "not", "by", "plus", "minus", "times", "over", "mod", "dozen", "half", "is", "are",
    "percent", "pi", "per", "sin", "cos", "tan", "log", "exp", "if", "when", "where", "than", "more", "less",
    "about", "each", "one", "two", "nor", "with", "from", "for", "of", "the",
}  # fmt: skip
_FILLERS = {
    "old", "long", "tall", "wide", "high", "deep", "away", "apart",
}  # fmt: skip
_UNSPACED = re.compile(r"(?<![^\W\d_])(?:[kM]?N(?=[ms](?![^\W\d_]))|kg(?=m(?![^\W\d_])))")
"""The first factor of "Nm", "Ns" and "kgm". A small n is nano."""
_TEMPERATURE = re.compile(r"(?:°\s?|\bdeg(?:ree)?s?\s)(?:(C)(?:elsius)?|(F)(?:ahrenheit)?)\b", re.IGNORECASE)
_FRACTION = re.compile(r"\\frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_PRODUCT = re.compile(r"\s*(?:\\cdot|\\times|[·*])\s*|\s+")
_FACTOR = re.compile(r"(?P<name>(?:US)?\\?\$|[€£¥₹¢]|°[CF]?|[^\W\d_]+)\s?(?:\^?\s?\{?\s?(?P<power>[+-]?[1-9])\s?\}?)?")
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3, "cubed": 3}


def read_unit(text: str) -> Unit | None:
    """A text in one spelling (`spelled`) as a unit; None if it is none.

    A word of at least three letters that is no unit of measurement is a unit of its own ("apples").
    """
    text = _UNSPACED.sub(r"\g<0> ", text.strip())
    text = _TEMPERATURE.sub(lambda match: f"°{(match[1] or match[2]).upper()}", text)
    if not text or len(text) > MAX_UNIT_CHARS:
        return None
    powers: dict[str, int] = {}
    for place, part in enumerate(re.split(r"\s?/\s?|\sper\s", _FRACTION.sub(r"\1/\2", text).replace("{}", ""))):
        factors = part.strip().removeprefix("(").removesuffix(")") if place else part.strip()
        words = [word for word in _PRODUCT.split(factors) if word]
        words = [word for word in words if word.casefold() not in _FILLERS] or words
        if not words or len(words) > 4:
            return None
        raised = 1
        for number, word in enumerate(words):
            if word.casefold() in _POWERS:
                raised = _POWERS[word.casefold()]
                if number == len(words) - 1 and number:  # "meters squared"
                    powers[next(reversed(powers))] *= raised
                    raised = 1
                continue
            match = _FACTOR.fullmatch(word)
            name = match and _unit_name(match["name"])
            if not match or not name:
                return None
            power = int(match["power"] or 1) * raised * (-1 if place else 1)
            powers[name] = powers.get(name, 0) + power
            raised = 1
    return tuple(sorted(powers.items())) if powers else None


def same_unit(one: Unit | None, other: Unit | None) -> bool:
    """Whether two units have the same size: `mL` and `cm^3`, not `m` and `cm`. A missing unit fits any.

    Pounds are money beside `£`, else a mass; `lb` is a mass.
    """
    if one is None or other is None or one == other:
        return True
    names = {name for unit in (one, other) for name, _ in unit}
    if _STERLING in names:
        money, other_money = (
            sorted((_STERLING if name == "pound" else name, power) for name, power in unit) for unit in (one, other)
        )
        return money == other_money
    if names & {"degree_Celsius", "degree_Fahrenheit"} or not all(_known(name) for name in names):
        return False
    from pint.util import UnitsContainer

    (size, root), (other_size, other_root) = (
        _registry().get_root_units(UnitsContainer(dict(unit))) for unit in (one, other)
    )
    return root == other_root and math.isclose(float(str(size)), float(str(other_size)), rel_tol=1e-12)


def is_measurement(unit: Unit) -> bool:
    """Whether every factor is a unit of measurement of several letters, which variables do not spell by chance."""
    return all(_known(name) and len(name) > 1 for name, _ in unit)


@functools.lru_cache(maxsize=4096)
def _unit_name(word: str) -> str | None:
    folded = word.casefold()
    if folded in _NO_UNITS:
        return None
    for spelling in (word, folded):
        if spelling in _OWN:
            return _OWN[spelling]
    if len(word) == 1 and word not in _LETTERS:
        return None
    for spelling in dict.fromkeys((word, re.sub("^K", "k", word), folded)):
        for prefix, unit, _ in _registry().parse_unit_name(spelling):
            by_symbol = unit in _METRIC and spelling[0] in _PREFIXES.get(prefix, "")
            by_word = len(word) > 3 and (not prefix or spelling.startswith(prefix))
            if by_symbol or by_word or (not prefix and unit in _METRIC | _OTHER):
                return prefix + unit
    return folded.removesuffix("s") if len(word) >= 3 and word.isascii() and word.isalpha() else None


@functools.lru_cache(maxsize=4096)
def _known(name: str) -> bool:
    return bool(_registry().parse_unit_name(name))


@functools.lru_cache(maxsize=1)
def _registry() -> "pint.UnitRegistry[float]":
    """pint's own table of units; its import takes half a second, so it waits for the first unit."""
    import pint

    return pint.UnitRegistry()
