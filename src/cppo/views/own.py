"""View families of the user's own: `module:function` or `file.py:function`, called as function(image, rng)."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from cppo.errors import UserError
from cppo.imports import check_import_path, failure, import_object, own_file

ViewFunction = Callable[[Image.Image, np.random.Generator], Image.Image]


def is_own(family: str) -> bool:
    """Whether a family's name is an import path."""
    return ":" in family


def load_own(family: str) -> ViewFunction:
    """The function that `family` names; its file or module is run once a process.

    Raises:
        UserError: it does not exist, cannot be imported, or is no function.
    """
    if not check_import_path(family, f"view {family!r}"):
        raise UserError(f"view {family!r}: write module:function or file.py:function")
    file = own_file(family)
    return _loaded(f"{file.resolve()}:{family.rpartition(':')[2]}" if file else family, family)


@cache
def _loaded(path: str, family: str) -> ViewFunction:
    function = import_object(path, f"view {family!r}")
    if not callable(function) or isinstance(function, type):
        raise UserError(f"view {family!r} is of type {type(function).__name__}, not a function")
    return function


def own_view(family: str, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One draw: an RGB image of the size of `image`, which is a copy for the function to do with as it likes.

    Raises:
        UserError: the function raises, or returns no image of that size.
    """
    try:
        view = load_own(family)(image.copy(), rng)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise failure(error, f"view {family!r}") from error
    if not isinstance(view, Image.Image) or view.size != image.size:
        found = f"one of {view.size}" if isinstance(view, Image.Image) else type(view).__name__
        raise UserError(f"view {family!r} must return a PIL image of {image.size} pixels, not {found}")
    return view.convert("RGB")


def own_files(families: list[str]) -> list[Path]:
    """The user's files in which families stand."""
    return [file for family in families if is_own(family) and (file := own_file(family))]
