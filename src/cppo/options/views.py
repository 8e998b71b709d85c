"""The views: their families and strengths, and those that rollouts are made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option
from cppo.options.strengths import (
    KNOWN_PRESERVING,
    KNOWN_REMOVING,
    PRESERVING_FAMILIES,
    REMOVING_FAMILIES,
    ViewStrengths,
    strength_fields,
)


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
        f"Families of information-removing views (I-): {', '.join(KNOWN_REMOVING)}, or file.py:function; one is drawn "
        "for each image.",
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


def view_strengths(options: Mapping[str, Any]) -> ViewStrengths:
    """The strengths that the options `view_*` give. Raises UserError for one that is not valid."""
    return ViewStrengths(**{name: options[f"view_{name}"] for name in strength_fields()})


def check_views(options: Mapping[str, Any]) -> None:
    """Hold the views' options against each other and against TRL's. Raises UserError."""
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
