"""Options as fields of dataclasses: how to declare them, and how to read a dataclass as options. Imports no torch."""

import copy
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Annotated, Any, Literal, Union

NO_DEFAULT = "(unset)"
"""The default of a required option, or of one that its library computes."""


@dataclass(frozen=True)
class OptionField:
    """One option: a field of a dataclass.

    `kinds` lists the types of a value: "none", "bool", "int", "float", "str", "list", "dict"; `item_kinds` those of a
    list's items. `choices` are the values of a `Literal` annotation. `interval` comes from `Annotated`, a range in the
    usual notation: "(0, 1]". `former` maps former names of choices to present ones: the `Literal` has both, and
    `Annotated` adds the mapping. `functions`: the choices are names of functions, which `Annotated` adds to `str` as a
    tuple, and functions of the user's own are also allowed (`cppo.imports`).
    """

    name: str
    kinds: frozenset[str]
    item_kinds: frozenset[str]
    choices: tuple[Any, ...]
    default: Any
    help: str
    interval: str | None
    former: Mapping[str, str] = field(default_factory=dict)
    functions: bool = False


@dataclass(frozen=True)
class Unset:
    """Placeholder of an option that was not given, until its method is known; `default` applies if the method sets
    none.

    Parsers that pass every field, such as TRL's, keep it, so any other value counts as given.
    """

    default: Any

    def __str__(self) -> str:
        return f"the method's, else {self.default}"


def option(default: Any, help: str) -> Any:
    """A field of an options class: its default (a list or mapping is copied per instance) and its help."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def method_option(default: Any, help: str) -> Any:
    """An option that a method may set: its field is `Unset` until `resolve` knows the method."""
    unset = Unset(default)
    if isinstance(default, list | dict):  # transformers' parser accepts list defaults only from a factory
        return field(default_factory=lambda: unset, metadata={"help": help})
    return field(default=unset, metadata={"help": help})


def plain_default(declared: Field) -> Any:
    """The value of a dataclass field that neither the user nor a method sets; MISSING if it is required."""
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return default.default if isinstance(default, Unset) else default


def resolve(options: Any, of_method: Mapping[str, Any]) -> None:
    """Replace every `Unset` field of a dataclass by a copy of the method's value, or of its default."""
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, Unset):
            setattr(options, one.name, copy.copy(of_method.get(one.name, value.default)))


def option_fields(options_class: type[Any]) -> dict[str, OptionField]:
    """The fields of a dataclass by name, in order, with inherited ones."""
    types_of = typing.get_type_hints(options_class, include_extras=True)
    return {
        one.name: option_field(one.name, types_of[one.name], plain_default(one), one.metadata.get("help", ""))
        for one in fields(options_class)
    }


def option_field(name: str, annotation: Any, default: Any, help: str) -> OptionField:
    """The option of a field's annotation, default and help."""
    added: Sequence[Any] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *added = typing.get_args(annotation)
    interval = next((one for one in added if isinstance(one, str)), None)
    former = next((one for one in added if isinstance(one, dict)), {})
    kinds: set[str] = set()
    items: set[str] = set()
    choices: list[Any] = []
    _read([annotation], kinds, items, choices)
    functions = next((one for one in added if isinstance(one, tuple)), ())
    choices.extend(functions)
    present = tuple(choice for choice in choices if choice not in former)
    default = NO_DEFAULT if default is MISSING else default
    kinds_of = frozenset(kinds), frozenset(items)
    return OptionField(name, *kinds_of, present, default, help, interval, former, bool(functions))


def _read(annotations: Iterable[Any], kinds: set[str], items: set[str], choices: list[Any]) -> None:
    """Adds the types that the annotations allow to `kinds`, `items` and `choices`."""
    for annotation in annotations:
        kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
        if kind is Literal:
            choices.extend(part for part in parts if part is not None)
            kinds.update("none" if part is None else type(part).__name__ for part in parts)
        elif kind in (Union, types.UnionType):
            _read(parts, kinds, items, choices)
        elif kind in (None, types.NoneType):
            kinds.add("none")
        elif kind in (list, tuple):
            kinds.add("list")
            _read(parts, items, set(), choices)
        else:
            kinds.add(kind.__name__)


def in_interval(number: float, interval: str) -> bool:
    """Whether `number` lies in an interval in the usual notation: "[0, 1)", "(0, inf)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number > low if interval[0] == "(" else number >= low
    below = number < high if interval[-1] == ")" else number <= high
    return above and below
