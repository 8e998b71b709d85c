"""The views: which families of them exist, how strong they are, and those that rollouts are made from.

Defaults: published, CPPO's (arXiv 2601.00501) first.
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
"""CPPO's own."""
KNOWN_PRESERVING = (*PRESERVING_FAMILIES, "gaussian_blur", "diffusion_noise")
KNOWN_REMOVING = (*REMOVING_FAMILIES, "black_patches", "static")
"""With those of other methods, and `static`, which leaves nothing of the image."""
INSIDE_VIEWS = ("image_removed", "attention_masked", "values_replaced")
"""I- inside the model, of the image as it is."""
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


def _strength(name: str) -> tuple[Any, str]:
    """The default and the help of the option `view_NAME`: those of `ViewStrengths`, where its range stands too."""
    declared = strength_fields()[name]
    default = declared.default
    return list(default) if isinstance(default, tuple) else default, declared.help


@dataclass
class ViewOptions:
    """Options of the views."""

    preserving_views: list[str] = method_option(
        list(PRESERVING_FAMILIES),
        f"Families of information-preserving views (I+): {', '.join(KNOWN_PRESERVING)}, or file.py:function; one is "
        "drawn for each image.",
    )
    removing_views: list[str] = method_option(
        list(REMOVING_FAMILIES),
        f"Families of information-removing views (I-): {', '.join(KNOWN_REMOVING)}, or file.py:function, one drawn for "
        f"each image; or one inside the model: {', '.join(INSIDE_VIEWS)}.",
    )
    view_draws: Literal["epoch", "rollout", "once"] = method_option(
        "epoch",
        "When views are drawn anew: for each prompt and 'epoch', for each 'rollout' (VPPO), or 'once', so that a "
        "prompt has the same for the whole run (asynchronous CPPO).",
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
    view_patch_side: int = method_option(*_strength("patch_side"))
    view_patch_probability: float = method_option(*_strength("patch_probability"))
    rollout_views: list[str] = method_option([], "Families of views that rollouts are made from instead of the image.")
    rollout_view_mode: Literal["augment", "mix"] = method_option(
        "augment",
        "'augment': a share of the prompts shows the view in rollouts and update; 'mix': a share of each group's "
        "rollouts is made from it, and the update sees the image (NoisyRollout).",
    )
    rollout_view_fraction: Annotated[float, "[0, 1]"] = method_option(
        0.5, "The share of prompts ('augment') or of a group's rollouts ('mix') that see a view."
    )


def inside_views(options: Mapping[str, Any]) -> dict[str, str]:
    """The views inside the model that the options name, by kind.

    Raises UserError where one is to be a view of the image, or shares its list.
    """
    for name in ("preserving_views", "rollout_views"):
        if misplaced := [family for family in options[name] or () if family in INSIDE_VIEWS]:
            raise UserError(f"{name}: {misplaced[0]} is a view inside the model that removes: put it in removing_views")
    families = list(options["removing_views"] or ())
    inside = [family for family in families if family in INSIDE_VIEWS]
    if inside and len(families) > 1:
        raise UserError(f"removing_views: {inside[0]} is a view inside the model, which stands alone in its list")
    return {"removing": inside[0]} if inside else {}


def pictured(families: Sequence[str]) -> Sequence[str]:
    """Families of I- for what shows pictures: `static` stands for a view inside the model, which has none."""
    return ["static"] if len(families) == 1 and families[0] in INSIDE_VIEWS else families


def view_strengths(options: Mapping[str, Any]) -> ViewStrengths:
    """The strengths that the options `view_*` give. Raises UserError for one that is not valid."""
    return ViewStrengths(**{name: options[f"view_{name}"] for name in strength_fields()})


def check_views(options: Mapping[str, Any]) -> None:
    """Hold the views' options against each other and against TRL's. Raises UserError."""
    inside_views(options)
    if options["rollout_views"]:
        _check_rollout_views(options)
    noised = {*options["rollout_views"], *options["preserving_views"]}
    if options["view_diffusion_decay"] is not None and "diffusion_noise" not in noised:
        raise UserError(
            "view_diffusion_decay fades out diffusion noise: add diffusion_noise to rollout_views or preserving_views"
        )
    view_strengths(options)


def _check_rollout_views(options: Mapping[str, Any]) -> None:
    if options["rollout_view_mode"] != "mix":
        return
    group_size = options.get("num_generations") or 1
    if group_size > 1 and not round(options["rollout_view_fraction"] * group_size):
        raise UserError(
            f"rollout_view_fraction = {options['rollout_view_fraction']:g} of num_generations = {group_size} is no "
            f"rollout at all: give at least {1 / group_size:g}"
        )
    if options.get("use_vllm") and options.get("vllm_mode") == "server":
        raise UserError(
            "rollout_view_mode = 'mix' gives the rollouts of a group different images, but with vllm_mode = "
            "'server' TRL sends one for all: choose 'colocate'"
        )
    if options.get("use_vllm") and options.get("vllm_importance_sampling_correction") is not False:
        raise UserError(
            "rollout_view_mode = 'mix' scores rollouts under another image than they were sampled from: with vLLM "
            "set vllm_importance_sampling_correction = false"
        )


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
