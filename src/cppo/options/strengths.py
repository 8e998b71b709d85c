"""How strong the views are and which families of them exist. Defaults: published, CPPO's (arXiv 2601.00501) first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

from cppo.errors import UserError
from cppo.fields import OptionField, in_interval, option, option_fields

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

    The option `view_NAME` of a configuration has the default, the range and the help of the field NAME. Factors of 1
    change nothing. From a distortion of 2/3 on corners can fold the image over.

    Raises:
        UserError: a value is out of its range or not a number. Lists serve as pairs, for YAML has no tuples.
    """

    brightness: Annotated[tuple[float, float], "[0, inf)"] = option(
        (0.2, 1.3), "I+ colour jitter: range of the brightness factor."
    )
    contrast: Annotated[tuple[float, float], "[0, inf)"] = option(
        (0.2, 1.8), "I+ colour jitter: range of the contrast factor."
    )
    saturation: Annotated[tuple[float, float], "[0, inf)"] = option(
        (0.2, 1.8), "I+ colour jitter: range of the saturation factor."
    )
    perspective_distortion: Annotated[float, "[0, 0.6666)"] = option(
        0.2, "I+ perspective: how far corners move, as a fraction of half the side."
    )
    perspective_probability: Annotated[float, "[0, 1]"] = option(0.5, "I+ perspective: probability that it is applied.")
    rotation_degrees: Annotated[float, "[0, 180]"] = option(10.0, "I+ rotation: largest angle, in degrees.")
    diffusion_steps: Annotated[int, f"[0, {DIFFUSION_STEPS}]"] = option(
        200, f"Diffusion noise: how far it goes, of {DIFFUSION_STEPS:,} steps."
    )
    diffusion_decay: tuple[float, float] | None = option(
        None,
        "Diffusion noise: [steepness, midpoint] of the sigmoid by which it fades out, the midpoint as a fraction of "
        "the run (NoisyRollout, DVRP); without it the noise stays.",
    )
    noise_rectangles: int = option(50, "I- noise: number of rectangles.")
    noise_side: Annotated[tuple[float, float], "(0, 1]"] = option(
        (0.05, 0.15), "I- noise: range of a rectangle's sides, as fractions of the image's."
    )
    crop_side: Annotated[tuple[float, float], "(0, 1]"] = option(
        (0.6, 0.7), "I- crop: range of the one fraction that the crop keeps of both sides."
    )
    patch_side: Annotated[int, "[1, inf)"] = option(14, "I- black patches: their side, in pixels.")
    patch_probability: Annotated[float, "[0, 1]"] = option(
        0.6, "I- black patches: probability that a patch is blacked."
    )

    def __post_init__(self) -> None:
        for name, declared in strength_fields().items():
            if name != "diffusion_decay":
                object.__setattr__(self, name, _checked(declared, getattr(self, name)))
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


@cache
def strength_fields() -> Mapping[str, OptionField]:
    """The strengths by name, as they are declared."""
    return option_fields(ViewStrengths)


def _checked(declared: OptionField, value: Any) -> Any:
    interval = declared.interval or "[1, inf)"  # of a count
    bounds = f"of at least {interval[1:].partition(',')[0]}" if interval.endswith(" inf)") else f"in {interval}"
    if "list" in declared.kinds:
        if not _is_pair(value) or value[0] > value[1] or not all(in_interval(part, interval) for part in value):
            raise _bad(declared.name, value, f"give [low, high], two numbers {bounds}, low <= high")
        return float(value[0]), float(value[1])
    whole = declared.kinds == {"int"}
    if not _is_number(value) or (whole and not isinstance(value, int)) or not in_interval(value, interval):
        raise _bad(declared.name, value, f"give a {'whole ' * whole}number {bounds}")
    return value


def _steepness_and_midpoint(value: Any) -> tuple[float, float]:
    if not _is_pair(value):
        raise _bad("diffusion_decay", value, "give two numbers, [steepness, midpoint]")
    steepness, midpoint = float(value[0]), float(value[1])
    if not (0 <= steepness <= 500 and 0 <= midpoint <= 1):
        raise _bad("diffusion_decay", value, "give a steepness in [0, 500] and a midpoint in [0, 1]")
    return steepness, midpoint


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(part) for part in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bad(name: str, value: Any, remedy: str) -> UserError:
    return UserError(f"view_{name} = {value!r}: {remedy}")
