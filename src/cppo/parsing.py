"""JSON and YAML of any depth: too deep a text is an error of its format, not of the interpreter."""

import json
from typing import Any

import yaml

TOO_DEEP = "it is nested too deeply"


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`. Raises ValueError for invalid or too deep JSON."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_yaml(text: str) -> Any:
    """`yaml.safe_load`. Raises yaml.YAMLError for invalid or too deep YAML, or an invalid date."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
