"""Convert a user's input (command-line words, YAML values) to an option's value, or report what is wrong."""

import math
from functools import cache
from typing import Any

import yaml

from cppo.errors import UserError, choose_one, tell
from cppo.fields import OptionField, in_interval
from cppo.parsing import parse_yaml

_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_NONE = {"none", "null", "~"}
_WORDS = {
    "none": "none",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping such as {key: value}",
}


def value_from_words(field: OptionField, words: list[str], *, where: str) -> Any:
    """The value of an option from command-line words, e.g. `["0.9", "0.1"]` for a list of numbers.

    Args:
        where: the option's name in messages, e.g. `--top_fraction`.

    Raises:
        UserError: the words do not fit the option.
    """
    if len(words) == 1:
        return check_value(field, words[0], where=where)
    if "list" not in field.kinds:
        raise UserError(f"{where} takes one value, got {len(words)}: {' '.join(words)}")
    return check_value(field, list(words), where=where)


def check_value(field: OptionField, value: Any, *, where: str) -> Any:
    """`value` in the option's type; text is read as YAML where the option is not text.

    Raises UserError for a wrong type, or a value outside the choices or the range.
    """
    value = present_value(field, value)
    if isinstance(field.default, str) and isinstance(value, str) and value == field.default:
        return value  # e.g. the text `none`, which elsewhere means no value
    fitted = _fit(field.kinds, field.item_kinds, value)
    if fitted is _NO_FIT and value is False and "no" in field.choices:
        fitted = "no"  # YAML 1.1 reads the bare word `no` as a boolean
    if fitted is _NO_FIT:
        items = value if isinstance(value, (list, tuple)) else [value]
        names_functions = (field.functions or "str" in field.item_kinds) and any(map(callable, items))
        hint = "; name a function as text: file.py:function" if names_functions else ""
        raise UserError(f"{where}: expected {_describe(field)}, got {value!r}{hint}")
    for item in fitted if isinstance(fitted, list) else [fitted]:
        own = field.functions and ":" in item  # whether it exists is checked at the start of a run
        if field.choices and item is not None and item not in field.choices and not own:
            or_own = ", or give file.py:function" if field.functions else ""
            raise UserError(f"{where}: {item!r} is unknown; {choose_one(item, field.choices)}{or_own}")
        if field.interval and _is_number(item) and not in_interval(item, field.interval):
            raise UserError(f"{where}: {item!r} is outside {field.interval}")
    return fitted


def present_value(field: OptionField, value: Any) -> Any:
    """`value`, or its present name if `value` is a former one; reported once per process."""
    if not isinstance(value, str) or value not in field.former:
        return value
    tell_present_name(field.name, value, field.former[value])
    return field.former[value]


@cache
def tell_present_name(option: str, former: str, present: str) -> None:
    """Report that a choice has a new name."""
    tell(f"warning: {option}: {former!r} is called {present!r} now")


_NO_FIT = object()


def _fit(kinds: frozenset[str], item_kinds: frozenset[str], value: Any) -> Any:
    if isinstance(value, str):
        return _fit_text(kinds, item_kinds, value)
    if value is None:
        return None if "none" in kinds else _NO_FIT
    if isinstance(value, bool):
        return value if "bool" in kinds else _NO_FIT
    if isinstance(value, int):
        return value if kinds & {"int", "float"} else _NO_FIT
    if isinstance(value, float):
        return value if "float" in kinds and not math.isnan(value) else _NO_FIT
    if isinstance(value, (list, tuple)) and "list" in kinds:
        items = [_fit(item_kinds or frozenset({"str"}), frozenset(), item) for item in value]
        return _NO_FIT if any(item is _NO_FIT for item in items) else items
    if isinstance(value, dict) and "dict" in kinds:
        return value
    return _NO_FIT


def _fit_text(kinds: frozenset[str], item_kinds: frozenset[str], text: str) -> Any:
    word = text.strip().lower()
    if "none" in kinds and word in _NONE:
        return None
    if "bool" in kinds and word in _TRUE | _FALSE:
        return word in _TRUE
    for convert in (int, float) if "float" in kinds else (int,) if "int" in kinds else ():
        try:
            number = convert(word)
        except ValueError:
            continue
        if not math.isnan(number):
            return number
    if kinds & {"list", "dict"}:
        structure = _yaml_structure(text)
        if structure is not None:
            return _fit(kinds - {"str"}, item_kinds, structure)
        if "str" not in kinds and "list" in kinds:
            return _fit(kinds, item_kinds, [text])
    return text if "str" in kinds else _NO_FIT


def _yaml_structure(text: str) -> list | dict | None:
    if text.strip()[:1] not in {"[", "{"}:
        return None
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, (list, dict)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _describe(field: OptionField) -> str:
    if field.choices:
        return f"one of {', '.join(map(str, field.choices))}"
    kinds = field.kinds - ({"int"} if "float" in field.kinds else set())
    words = [_WORDS[kind] for kind in _WORDS if kind in kinds and kind != "none"]
    items = [_WORDS[kind].removeprefix("a ") for kind in _WORDS if kind in field.item_kinds]
    text = " or ".join(words)
    if items and "list" in kinds:
        text = text.replace("a list", f"a list (each item: {' or '.join(items)})")
    return text + (" (or none)" if "none" in field.kinds else "")
