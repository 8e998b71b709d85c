"""verl's options as command-line words, and as a file. Imports no torch and no verl."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cppo.errors import UserError
from cppo.recipes import read_mapping
from cppo.verl.counterparts import ADDED

_PLAIN = re.compile(r"[A-Za-z_./][\w./:@%+-]*")
"""Text that hydra reads literally, except the words below."""
_WORDS = {"true", "false", "null", "nan", "inf"}


def overrides(options: Mapping[str, Any]) -> list[str]:
    """verl's options by dotted name as words NAME=VALUE; a name that verl's files do not list gets `++`."""
    return [f"{'++' * name.startswith(ADDED)}{name}={_value(value)}" for name, value in options.items()]


def write_options(options: Mapping[str, Any], file: Path, remarks: list[str]) -> None:
    """The options as flat YAML, after remarks as comments. Raises UserError where the file cannot be written."""
    text = "".join(f"# {remark}\n" for remark in remarks)
    text += yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {file}: {error.strerror}") from error


def read_options(file: str) -> list[str]:
    """The words of such a file. Raises UserError for a file that is not a mapping, or that is a recipe."""
    options = read_mapping(Path(file), f"--config {file}")
    if options and not any("." in name for name in options):
        raise UserError(
            f"--config {file}: it holds no options of verl, such as trainer.nnodes; if it is a recipe, `cppo "
            f"verl-config --config {file} --out FILE.yaml` converts it"
        )
    return overrides(options)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_value(str(name))}:{_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if not isinstance(value, str) or (_PLAIN.fullmatch(text) and text.lower() not in _WORDS):
        return text
    # hydra reads a backslash as an escape only before a quote; `${` begins a reference.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\*)$", lambda found: found[1] * 2, escaped)
    return "'" + escaped.replace("${", r"\${") + "'"
