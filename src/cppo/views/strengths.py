"""How strong the views are and which families of them exist. Defaults: published, CPPO's (arXiv 2601.00501) first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.views.own import is_own, load_own

PRESERVING_FAMILIES = ("color_jitter", "perspective", "rotation")
REMOVING_FAMILIES = ("noise_rectangles", "crop")
"""CPPO's own."""
KNOWN_PRESERVING = (*PRESERVING_FAMILIES, "gaussian_blur", "diffusion_noise")
KNOWN_REMOVING = (*REMOVING_FAMILIES, "black_patches", "static")
"""With those of other methods, and `static`, which leaves nothing of the image."""
DIFFUSION_STEPS = 1000
"""Steps of the whole diffusion, after which an image is noise alone."""


@dataclass(frozen=True)
class ViewStrengths:
    """The strength of every view; a pair is the [low, high] range that a value is drawn from uniformly.

    Attributes:
        brightness, contrast, saturation: factors of the colour jitter, each at least 0; 1 changes nothing.
        perspective_distortion: how far each corner may move inwards, as a fraction of half the side; at
            least 0 and below 2/3, from where on the corners can fold the image over.
        perspective_probability: chance in [0, 1] that the perspective view moves anything at all.
        rotation_degrees: largest angle, in degrees, in [0, 180]; both directions.
        diffusion_steps: how far the diffusion noise goes, of 1,000 steps; 0 changes nothing.
        diffusion_decay: steepness (at least 0) and midpoint (a fraction of the run, in [0, 1]) of the sigmoid by which
            the noise fades out over a run; None keeps it.
        noise_rectangles: number of noise rectangles, at least 1.
        noise_side: sides of a noise rectangle, as fractions of the image's sides, in (0, 1].
        crop_side: sides of the crop, one fraction of both the image's sides, in (0, 1].
        patch_side: side of the square patches that are blacked, in pixels, at least 1.
        patch_probability: chance in [0, 1] that a patch is blacked.

    Raises:
        UserError: a value is out of its range or not a number. Lists serve as pairs, for YAML has no tuples.
    """

    brightness: tuple[float, float] = (0.2, 1.3)
    contrast: tuple[float, float] = (0.2, 1.8)
    saturation: tuple[float, float] = (0.2, 1.8)
    perspective_distortion: float = 0.2
    perspective_probability: float = 0.5
    rotation_degrees: float = 10.0
    diffusion_steps: int = 200
    diffusion_decay: tuple[float, float] | None = None
    noise_rectangles: int = 50
    noise_side: tuple[float, float] = (0.05, 0.15)
    crop_side: tuple[float, float] = (0.6, 0.7)
    patch_side: int = 14
    patch_probability: float = 0.6

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            object.__setattr__(self, name, _pair(name, getattr(self, name), positive=False, top=math.inf))
        for name in ("noise_side", "crop_side"):
            object.__setattr__(self, name, _pair(name, getattr(self, name), positive=True, top=1.0))
        distortion = self.perspective_distortion
        if not _is_number(distortion) or not 0 <= distortion < 2 / 3:
            raise _bad("perspective_distortion", distortion, "give a number in [0, 2/3)")
        for name in ("perspective_probability", "patch_probability"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise _bad(name, getattr(self, name), "give a number in [0, 1]")
        if not _is_number(self.rotation_degrees) or not 0 <= self.rotation_degrees <= 180:
            raise _bad("rotation_degrees", self.rotation_degrees, "give degrees in [0, 180]")
        for name in ("noise_rectangles", "patch_side"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "give a whole number of at least 1")
        if not _is_whole(self.diffusion_steps) or not 0 <= self.diffusion_steps <= DIFFUSION_STEPS:
            raise _bad("diffusion_steps", self.diffusion_steps, f"give a whole number from 0 to {DIFFUSION_STEPS}")
        if self.diffusion_decay is not None:
            object.__setattr__(self, "diffusion_decay", _steepness_and_midpoint(self.diffusion_decay))

    def at(self, progress: float) -> "ViewStrengths":
        """The strengths after a fraction `progress` of a run; it counts the batch that begins, so it ends at 1.

        With a decay, floor(steps (1 - sigmoid(steepness (progress - midpoint)))) diffusion steps are left
        (NoisyRollout, arXiv 2504.13055; DVRP, 2601.06801).
        """
        if self.diffusion_decay is None:
            return self
        steepness, midpoint = self.diffusion_decay
        left = math.floor(self.diffusion_steps / (1 + math.exp(steepness * (progress - midpoint))))
        return replace(self, diffusion_steps=left)


def check_families(field: str, families: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The families as a tuple, in the given order; those of the user's own are imported.

    Raises UserError, which names `field`, where `families` is empty, no list, or has an unknown or repeated name, or
    one of the user's own cannot be imported.
    """
    choices = ", ".join(known)
    if isinstance(families, str) or not isinstance(families, Sequence):
        raise UserError(f"{field}: {families!r} is not a list; give a list of names out of {choices}")
    if not families:
        raise UserError(f"{field}: the list is empty; give at least one of {choices}")
    for name in families:
        if not isinstance(name, str):
            raise UserError(f"{field}: {name!r} is no name; choose from {choices}, or write file.py:function")
        if is_own(name):
            load_own(name)
        elif name not in known:
            raise UserError(f"{field}: {name!r} is unknown; {choose_one(name, known)}, or give file.py:function")
    if len(set(families)) < len(families):
        raise UserError(f"{field}: a family is listed twice in {list(families)}; name each once")
    return tuple(families)


def _pair(name: str, value: Any, *, positive: bool, top: float) -> tuple[float, float]:
    bounds = f"{'0 <' if positive else '0 <='} low <= high" + (f" <= {top:g}" if top < math.inf else "")
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(part) for part in value):
        raise _bad(name, value, f"give two numbers [low, high] with {bounds}")
    low, high = float(value[0]), float(value[1])
    if low < 0 or (positive and low == 0) or low > high or high > top:
        raise _bad(name, value, f"give [low, high] with {bounds}")
    return low, high


def _steepness_and_midpoint(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(part) for part in value):
        raise _bad("diffusion_decay", value, "give two numbers, [steepness, midpoint]")
    steepness, midpoint = float(value[0]), float(value[1])
    if not (0 <= steepness <= 500 and 0 <= midpoint <= 1):
        raise _bad("diffusion_decay", value, "give a steepness in [0, 500] and a midpoint in [0, 1]")
    return steepness, midpoint


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(name: str, value: Any, remedy: str) -> UserError:
    return UserError(f"view_{name} = {value!r}: {remedy}")
