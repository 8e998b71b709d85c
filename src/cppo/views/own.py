"""View families of the user's own: `module:function` or `file.py:function`, called as function(image, rng)."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image

from cppo.errors import UserError, choose_one
from cppo.imports import failure, is_own, load_function

TRIAL_SIZE = (48, 64, 3)
"""Rows, columns and colours of the trial image of a family."""
ViewFunction = Callable[[Image.Image, np.random.Generator], Image.Image]


def check_families(field: str, families: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The families as a tuple, in the given order; the user's own are imported.

    Raises UserError, which names `field`, where `families` is empty or not a list. It also refuses unknown and repeated
    names, and functions that cannot be imported.
    """
    choices = ", ".join(known)
    if isinstance(families, str) or not isinstance(families, Sequence):
        raise UserError(f"{field}: {families!r} is not a list; give a list of names out of {choices}")
    if not families:
        raise UserError(f"{field}: the list is empty; give at least one of {choices}")
    for name in families:
        if not isinstance(name, str):
            raise UserError(f"{field}: {name!r} is not a name; choose from {choices}, or write file.py:function")
        if is_own(name):
            load_own(name)
        elif name not in known:
            raise UserError(f"{field}: {name!r} is unknown; {choose_one(name, known)}, or give file.py:function")
    if len(set(families)) < len(families):
        raise UserError(f"{field}: {list(families)} names a family twice; name each once")
    return tuple(families)


def load_own(family: str) -> ViewFunction:
    """The function that `family` names. Its file or module runs once per process; two trial views are drawn.

    Raises UserError where it does not exist, cannot be imported, is not a function, or the trial fails.
    """
    return _tried(load_function(family, f"view {family!r}"), family)


@cache
def _tried(function: ViewFunction, family: str) -> ViewFunction:
    trial = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=TRIAL_SIZE, dtype=np.uint8))
    first, second = (_drawn(function, family, trial, np.random.default_rng(1)) for _ in range(2))
    if first.tobytes() != second.tobytes():
        raise UserError(
            f"view {family!r} draws two different views from the same generator state: take all randomness from rng"
        )
    return function


def own_view(family: str, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One draw: an RGB image of the size of `image`. The function gets a copy and may change it.

    Raises UserError where the function raises, or returns no image of that size.
    """
    return _drawn(load_own(family), family, image, rng)


def _drawn(function: ViewFunction, family: str, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    try:
        view = function(image.copy(), rng)
    except (Exception, SystemExit) as error:  # user code may raise anything, also `sys.exit`
        raise failure(error, f"view {family!r}") from error
    if not isinstance(view, Image.Image) or view.size != image.size:
        found = f"one of {view.size}" if isinstance(view, Image.Image) else type(view).__name__
        raise UserError(f"view {family!r} must return a PIL image of {image.size} pixels, not {found}")
    return view.convert("RGB")
