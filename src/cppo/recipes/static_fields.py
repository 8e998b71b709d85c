"""The fields of configuration dataclasses: one way to write them, and one to read them without importing the class.

TRL's and transformers' configuration classes import torch. The command line has to find a misspelt option in the blink
of an eye, so it reads names, annotations, defaults and help texts from the syntax tree instead.
"""

import ast
import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

SCALAR_KINDS = frozenset({"bool", "int", "float", "str"})
UNSET = "(unset)"


@dataclass(frozen=True)
class OptionField:
    """One option: a field of a configuration dataclass, as its source states it.

    `kinds` holds what a value may be: "none", "bool", "int", "float", "str", "list", "dict". `item_kinds` says the same
    of a list's items. `choices` are the values of a `Literal` annotation. `interval` is what `Annotated` adds, a range
    in the usual notation: "(0, 1]". `default` is the default where it is a literal, else UNSET.
    """

    name: str
    kinds: frozenset[str]
    item_kinds: frozenset[str]
    choices: tuple[Any, ...]
    default: Any
    help: str
    interval: str | None


@dataclass(frozen=True)
class Unset:
    """What an option holds until its method is known, if it was not given; `default` applies if the method sets none.

    Parsers that pass every field, such as TRL's, pass it on, so that any other value counts as given.
    """

    default: Any

    def __str__(self) -> str:
        return f"the method's, else {self.default}"


def option(default: Any, help: str) -> Any:
    """A field of an options class: its default (a list or mapping is copied for each instance) and its help."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def method_option(default: Any, help: str) -> Any:
    """An option that a method may set: its field is `Unset` until `resolve` has seen the method."""
    unset = Unset(default)
    if isinstance(default, list | dict):  # transformers' parser takes the default of lists from a factory alone
        return field(default_factory=lambda: unset, metadata={"help": help})
    return field(default=unset, metadata={"help": help})


def plain_default(declared: Field) -> Any:
    """What a field of a dataclass holds where neither the user nor a method sets it; MISSING if it must be given."""
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return default.default if isinstance(default, Unset) else default


def resolve(options: Any, of_method: Mapping[str, Any]) -> None:
    """Replace every `Unset` field of a dataclass by a copy of what the method sets, or of its default."""
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, Unset):
            setattr(options, one.name, copy.copy(of_method.get(one.name, value.default)))


def dataclass_fields(module: str, class_name: str) -> dict[str, OptionField]:
    """The fields that `class_name` itself declares in `module` (not the inherited ones), in source order.

    Raises LookupError where the module's file or the class is not there.
    """
    for node in _module_tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                statement.target.id: _option_field(statement)
                for statement in node.body
                if isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and not statement.target.id.startswith("_")
                and "ClassVar" not in ast.unparse(statement.annotation)
            }
    raise LookupError(f"no class {class_name} in {module}")


@cache
def _module_tree(module: str) -> ast.Module:
    return ast.parse(_module_file(module).read_text(encoding="utf-8"))


def _module_file(module: str) -> Path:
    """The module's source file. Only the top package is looked up: `find_spec` of a submodule imports its parents."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"package {package} is not installed")
    path = Path(spec.submodule_search_locations[0], *rest)
    file = path.with_suffix(".py")
    if not file.is_file():
        raise LookupError(f"no file {file}")
    return file


def _option_field(statement: ast.AnnAssign) -> OptionField:
    kinds: set[str] = set()
    items: set[str] = set()
    choices: list[Any] = []
    annotation, interval = _without_interval(statement.annotation)
    _read_annotation(annotation, kinds, items, choices)
    default, metadata = _read_default(statement.value)
    return OptionField(
        name=statement.target.id,  # type: ignore[union-attr]
        kinds=frozenset(kinds),
        item_kinds=frozenset(items),
        choices=tuple(choices),
        default=default,
        help=" ".join(str(metadata.get("help", "")).replace("%%", "%").split()),
        interval=interval,
    )


def _without_interval(annotation: ast.expr) -> tuple[ast.expr, str | None]:
    """The type and the interval of `Annotated[type, "interval"]`; else the annotation itself and None."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).split(".")[-1] == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        kind, interval = annotation.slice.elts
        return kind, ast.literal_eval(interval)
    return annotation, None


def _read_annotation(node: ast.expr, kinds: set[str], items: set[str], choices: list[Any]) -> None:
    """Adds to `kinds`, `items` and `choices` what the annotation allows."""
    if isinstance(node, ast.BinOp):
        _read_annotation(node.left, kinds, items, choices)
        _read_annotation(node.right, kinds, items, choices)
    elif isinstance(node, ast.Constant) and node.value is None:
        kinds.add("none")
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        _read_annotation(ast.parse(node.value, mode="eval").body, kinds, items, choices)
    elif isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        match ast.unparse(node.value).split(".")[-1]:
            case "Optional" | "Union" as union:
                if union == "Optional":
                    kinds.add("none")
                for part in parts:
                    _read_annotation(part, kinds, items, choices)
            case "Literal":
                values = [ast.literal_eval(part) for part in parts]
                choices.extend(value for value in values if value is not None)
                kinds.update("none" if value is None else type(value).__name__ for value in values)
            case "list" | "List" | "tuple" | "Tuple" | "Sequence":
                kinds.add("list")
                for part in parts:
                    if not (isinstance(part, ast.Constant) and part.value is Ellipsis):
                        _read_annotation(part, items, set(), choices)
            case _:
                kinds.add("dict")
    else:
        name = ast.unparse(node).split(".")[-1]
        kinds.add(name if name in SCALAR_KINDS or name in {"list", "dict"} else "str")


def _read_default(node: ast.expr | None) -> tuple[Any, dict[str, Any]]:
    """The default and the entries of the metadata, where they are literals (else UNSET)."""
    if node is None:
        return UNSET, {}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("option", "method_option"):
        default, text = map(_literal, node.args)
        return default, {"help": text}
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "field"):
        return _literal(node), {}
    default = UNSET
    metadata: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg == "default":
            default = _literal(keyword.value)
        elif keyword.arg == "default_factory":
            factory = keyword.value
            if isinstance(factory, ast.Lambda):
                default = _literal(factory.body)
            else:
                default = {"list": [], "dict": {}}.get(ast.unparse(factory), UNSET)
        elif keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    metadata[key.value] = _literal(value)
    return default, metadata


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNSET
