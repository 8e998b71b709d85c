"""The argument parser of all commands, its argument types, and shared options."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import yaml

from cppo.errors import UserError, choose_one, did_you_mean
from cppo.fields import in_interval, option_fields
from cppo.options import RunOptions
from cppo.parsing import parse_yaml


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` for mistakes and accepts no abbreviated options.

    Args:
        named_otherwise: names that are no options, with the option to write instead.
    """

    def __init__(self, *, named_otherwise: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self._named_otherwise = named_otherwise or {}

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"{value!r} is unknown; {choose_one(value, action.choices)}")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`; a leftover argument is an error that names the nearest option.

        `--max-steps` counts as `--max_steps`.
        """
        namespace, rest = self.parse_known_args([self._with_underscores(word) for word in argv])
        if rest:
            raise UserError(self._unknown(rest[0]))
        return namespace

    def _with_underscores(self, word: str) -> str:
        name, equals, value = word.partition("=")
        spelled = "--" + name[2:].replace("-", "_")
        known = name.startswith("--") and name not in self._option_string_actions
        return spelled + equals + value if known and spelled in self._option_string_actions else word

    def _unknown(self, word: str) -> str:
        if not word.startswith("--"):
            return f"unexpected argument `{word}` (see `{self.prog} --help`)"
        name = "--" + word[2:].partition("=")[0].replace("-", "_")
        near = did_you_mean(name, self._option_string_actions)
        hint = f"; {near}" if near else f" (see `{self.prog} --help`)"
        if name[2:] in self._named_otherwise:
            hint = f"; here it is {self._named_otherwise[name[2:]]}"
        return f"unknown option `{word.partition('=')[0]}`{hint}"


class HelpFormatter(argparse.HelpFormatter):
    """Wider than argparse's own: names and help on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def number_in(interval: str, *, whole: bool = False) -> Callable[[str], float]:
    """The argparse type of numbers in an interval such as "(0, 1]"; with `whole`, of digits only."""

    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not in_interval(value, interval) or (whole and not text.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected a {'whole ' * whole}number in {interval}, got {text!r}")
        return value

    return convert


COUNT = number_in("[1, inf)", whole=True)
"""The argparse type of numbers of items."""
SEED = number_in("[0, inf)", whole=True)
"""The argparse type of seeds."""


def check_output_file(option: str, name: str | None) -> None:
    """Check that the file of an option can be written, without making it: other processes may check and write it too.

    Raises UserError.
    """
    if name is None:
        return
    file = Path(name)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UserError(f"{option}: cannot write {name}: {'it is a' if file.is_dir() else 'there is no such'} folder")
    try:
        with file.open("ab") if file.exists() else TemporaryFile(dir=file.absolute().parent):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write {name}: {error.strerror}") from error


def check_two_files(options: str, one: str | None, other: str | None) -> None:
    """Raise UserError where two options, "--json and --out" in words, name one file."""
    if one and other and Path(one).resolve() == Path(other).resolve():
        raise UserError(f"{options} both name {one}; give two files")


def add_data_options(parser: argparse.ArgumentParser, *, required: bool = True, note: str = "") -> None:
    """Add --data, --columns and --max_bad_fraction, for `cppo.data.load_records`."""
    what = "tasks:NAME[?option=value&...], a file, a folder or hub:ORG/NAME[:SPLIT]"
    parser.add_argument("--data", required=required, nargs="+", metavar="SPEC", help=f"{note}{what}")
    parser.add_argument(
        "--columns",
        type=columns_option,
        metavar="{..}",
        help="your column names {prompt: question, ...}, or a layout (default: a run directory's own)",
    )
    parser.add_argument(
        "--max_bad_fraction",
        type=number_in("[0, 1]"),
        default=0.01,
        metavar="X",
        help="allowed fraction of bad rows, which are skipped",
    )


def add_pixel_bounds(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cppo.data.PixelBounds`, with a training run's minima."""
    trained = option_fields(RunOptions)
    scaled = {
        "min_pixels": "images of fewer pixels up",
        "max_pixels": "larger ones down",
        "min_side": "images with a shorter side up, the side",
    }
    for name, what in scaled.items():
        least = str(trained[name].interval).strip("[").partition(",")[0]
        kind = number_in(f"[{least}, inf)", whole=True)
        text = f"scale {what} to N >= {least}, as a training run does"
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)


def columns_option(text: str) -> dict[str, str | None] | str:
    """The argparse type of `--columns`: a mapping in YAML, or the name of a layout."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict | str):
        raise argparse.ArgumentTypeError(f"expected a layout or a mapping such as {{prompt: question}}, got {text!r}")
    return value
