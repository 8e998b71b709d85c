"""JSON and YAML whose nesting no one bounded: too deep a text is an error of its format, not of the interpreter."""

import json
from typing import Any

import yaml

TOO_DEEP = "it is nested too deeply"


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`. Raises ValueError for text that is no JSON or too deep."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_yaml(text: str) -> Any:
    """`yaml.safe_load`. Raises yaml.YAMLError for text that is no YAML or too deep, or a date that is none."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
