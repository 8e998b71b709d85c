"""Options of the views: families, strengths, and views that rollouts are made from.

The defaults are published values, CPPO's (arXiv 2601.00501) where it has one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import OptionField, in_interval, method_option, option, option_fields

PRESERVING_FAMILIES = ("color_jitter", "perspective", "rotation")
REMOVING_FAMILIES = ("noise_rectangles", "crop")
"""CPPO's own families."""
KNOWN_PRESERVING = (*PRESERVING_FAMILIES, "gaussian_blur", "diffusion_noise")
KNOWN_REMOVING = (*REMOVING_FAMILIES, "black_patches", "static")
"""The families of all methods; `static` removes the whole image."""
INSIDE_VIEWS = ("image_removed", "attention_masked", "values_replaced")
"""Removing views (I-) inside the model; the image itself stays unchanged."""
PIXEL_NOISE = "pixel_noise"
"""The removing view that adds noise to the processor's output."""
INPUT_VIEWS = (*INSIDE_VIEWS, PIXEL_NOISE)
"""Removing views that change the model's inputs instead of the picture."""
DIFFUSION_STEPS = 1000
"""Steps of the full diffusion, after which only noise is left."""


@dataclass(frozen=True)
class ViewStrengths:
    """The strength of every view. A pair is the [low, high] range of a uniform draw.

    The option `view_NAME` takes its default, range and help from the field NAME. A factor of 1 changes nothing. A
    distortion
    of 2/3 or more can fold the image over itself. Lists are accepted as pairs, because YAML has no tuples.

    Raises:
        UserError: a value is out of its range or not a number.
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
    perspective_probability: Annotated[float, "[0, 1]"] = option(0.5, "I+ perspective: probability of applying it.")
    rotation_degrees: Annotated[float, "[0, 180]"] = option(10.0, "I+ rotation: largest angle, in degrees.")
    diffusion_steps: Annotated[int, f"[0, {DIFFUSION_STEPS}]"] = option(
        200, f"Diffusion noise: number of noise steps, out of {DIFFUSION_STEPS:,}."
    )
    diffusion_decay: tuple[float, float] | None = option(
        None,
        "Diffusion noise: [steepness, midpoint] of the sigmoid that fades it out; the midpoint is a fraction of the "
        "run (NoisyRollout, DVRP). Default: no fading.",
    )
    noise_rectangles: int = option(50, "I- noise: number of rectangles.")
    noise_side: Annotated[tuple[float, float], "(0, 1]"] = option(
        (0.05, 0.15), "I- noise: range of a rectangle's sides, as fractions of the image's sides."
    )
    crop_side: Annotated[tuple[float, float], "(0, 1]"] = option(
        (0.6, 0.7), "I- crop: range of the fraction that the crop keeps of both sides."
    )
    pixel_noise: Annotated[float, "[0, inf)"] = option(
        2.0, "I- pixel noise: standard deviation of the Gaussian noise, in the processor's normalized pixels."
    )
    patch_side: Annotated[int, "[1, inf)"] = option(14, "I- black patches: side of a patch, in pixels.")
    patch_probability: Annotated[float, "[0, 1]"] = option(
        0.6, "I- black patches: probability that a patch turns black."
    )

    def __post_init__(self) -> None:
        for name, declared in strength_fields().items():
            if name != "diffusion_decay":
                object.__setattr__(self, name, _checked(declared, getattr(self, name)))
        if self.diffusion_decay is not None:
            object.__setattr__(self, "diffusion_decay", _steepness_and_midpoint(self.diffusion_decay))

    def at(self, progress: float) -> "ViewStrengths":
        """The strengths after a fraction `progress` of a run. `progress` counts the current batch, so it ends at 1.

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
    """The fields of `ViewStrengths` by name."""
    return option_fields(ViewStrengths)


def _strength(name: str) -> tuple[Any, str]:
    """Default and help of the option `view_NAME`, from `ViewStrengths`; its range is there too."""
    declared = strength_fields()[name]
    default = declared.default
    return list(default) if isinstance(default, tuple) else default, declared.help


@dataclass
class ViewOptions:
    """Options of the views."""

    preserving_views: list[str] = method_option(
        list(PRESERVING_FAMILIES),
        f"Families of information-preserving views (I+): {', '.join(KNOWN_PRESERVING)}, or file.py:function. One is "
        "drawn per image.",
    )
    removing_views: list[str] = method_option(
        list(REMOVING_FAMILIES),
        f"Families of information-removing views (I-): {', '.join(KNOWN_REMOVING)}, or file.py:function; one is drawn "
        f"per image. Or alone one view inside the model: {', '.join(INSIDE_VIEWS)}; or alone {PIXEL_NOISE}.",
    )
    view_draws: Literal["epoch", "rollout", "once"] = method_option(
        "epoch",
        "When new views are drawn. 'epoch': per prompt and epoch. 'rollout': per rollout (VPPO). 'once': per prompt, "
        "for the whole run (asynchronous CPPO).",
    )
    view_brightness: list[float] = method_option(*_strength("brightness"))
    view_contrast: list[float] = method_option(*_strength("contrast"))
    view_saturation: list[float] = method_option(*_strength("saturation"))
    view_perspective_distortion: float = method_option(*_strength("perspective_distortion"))
    view_perspective_probability: float = method_option(*_strength("perspective_probability"))
    view_rotation_degrees: float = method_option(*_strength("rotation_degrees"))
    view_diffusion_steps: int = method_option(*_strength("diffusion_steps"))
    view_diffusion_decay: list[float] | None = method_option(*_strength("diffusion_decay"))
    view_noise_rectangles: int = method_option(*_strength("noise_rectangles"))
    view_noise_side: list[float] = method_option(*_strength("noise_side"))
    view_crop_side: list[float] = method_option(*_strength("crop_side"))
    view_pixel_noise: float = method_option(*_strength("pixel_noise"))
    view_patch_side: int = method_option(*_strength("patch_side"))
    view_patch_probability: float = method_option(*_strength("patch_probability"))
    rollout_views: list[str] = method_option([], "Families of views that replace the image when rollouts are made.")
    rollout_view_mode: Literal["augment", "mix"] = method_option(
        "augment",
        "'augment': a share of the prompts shows the view in rollouts and updates. 'mix': a share of each group's "
        "rollouts is made from the view, and updates see the image (NoisyRollout).",
    )
    rollout_view_fraction: Annotated[float, "[0, 1]"] = method_option(
        0.5, "Share of prompts ('augment') or of a group's rollouts ('mix') that see a view."
    )


def input_views(options: Mapping[str, Any]) -> dict[str, str]:
    """The views of the model's inputs that the options name: kind -> family.

    Raises UserError where such a family is in another list than `removing_views`, or is not alone in it.
    """
    for name in ("preserving_views", "rollout_views"):
        if misplaced := [family for family in options[name] or () if family in INPUT_VIEWS]:
            raise UserError(
                f"{name}: {misplaced[0]} is a removing view {_where(misplaced[0])}: put it in removing_views"
            )
    families = list(options["removing_views"] or ())
    own = [family for family in families if family in INPUT_VIEWS]
    if own and len(families) > 1:
        raise UserError(f"removing_views: {own[0]} is a view {_where(own[0])} and must be the only family in the list")
    return {"removing": own[0]} if own else {}


def _where(family: str) -> str:
    return "inside the model" if family in INSIDE_VIEWS else "of the processor's output"


def pictured(families: Sequence[str]) -> Sequence[str]:
    """Families of I- that can be shown as pictures: `static` replaces a view of `INPUT_VIEWS`."""
    return ["static"] if len(families) == 1 and families[0] in INPUT_VIEWS else families


def view_strengths(options: Mapping[str, Any]) -> ViewStrengths:
    """The strengths that the options `view_*` give. Raises UserError for an invalid value."""
    return ViewStrengths(**{name: options[f"view_{name}"] for name in strength_fields()})


def check_views(options: Mapping[str, Any]) -> None:
    """Raise UserError where the views' options contradict each other or TRL's."""
    input_views(options)
    if options["rollout_views"]:
        _check_rollout_views(options)
    noised = {*options["rollout_views"], *options["preserving_views"]}
    if options["view_diffusion_decay"] is not None and "diffusion_noise" not in noised:
        raise UserError(
            "view_diffusion_decay fades out diffusion noise: add diffusion_noise to rollout_views or preserving_views, "
            "or set view_diffusion_decay = null"
        )
    view_strengths(options)


def _check_rollout_views(options: Mapping[str, Any]) -> None:
    if options["rollout_view_mode"] != "mix":
        return
    group_size = options.get("num_generations") or 1
    if group_size > 1 and not round(options["rollout_view_fraction"] * group_size):
        raise UserError(
            f"rollout_view_fraction = {options['rollout_view_fraction']:g} of num_generations = {group_size} is less "
            f"than one rollout: give at least {1 / group_size:g}"
        )
    if options.get("use_vllm") and options.get("vllm_mode") == "server":
        raise UserError(
            "rollout_view_mode = 'mix' gives the rollouts of a group different images, but with vllm_mode = 'server' "
            "TRL sends one image for all: choose 'colocate'"
        )
    if options.get("use_vllm") and options.get("vllm_importance_sampling_correction") is not False:
        raise UserError(
            "rollout_view_mode = 'mix' samples rollouts from another image than it scores: with vLLM set "
            "vllm_importance_sampling_correction = false"
        )


def _checked(declared: OptionField, value: Any) -> Any:
    interval = declared.interval or "[1, inf)"  # for a count
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
