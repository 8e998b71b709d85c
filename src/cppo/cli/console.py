"""What the commands show on a terminal, and how they read words from it."""

import argparse
import os
import warnings
from collections.abc import Callable

import yaml


def quiet_libraries() -> None:
    """Silence the libraries' notices and loading bars, which would bury our own lines. Imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every fork of a data worker
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def percent(fraction: float, interval: tuple[float, float] | None = None) -> str:
    """A fraction of 1 as text, e.g. "52.1 %  [49.0, 55.2]"."""
    text = f"{100 * fraction:5.1f} %"
    return text if interval is None else f"{text}  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def at_least(minimum: int) -> Callable[[str], int]:
    """The argparse type of whole numbers from `minimum` on."""

    def whole_number(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return whole_number


def fraction(text: str) -> float:
    """The argparse type of fractions of 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction in [0, 1], got {text!r}")
    return value


def columns_option(text: str) -> dict[str, str] | str:
    """The argparse type of `--columns`: a mapping in YAML, or the name of a layout."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict | str):
        raise argparse.ArgumentTypeError(f"expected a layout or a mapping such as {{prompt: question}}, got {text!r}")
    return value
