"""Which options of `CPPOConfig` go together. Imports no torch: the command line checks them before it starts."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cppo.errors import UserError
from cppo.views import ViewSampler, ViewStrengths


def check_combinations(options: Mapping[str, Any]) -> None:
    """Hold options against each other, each of which is valid alone.

    Args:
        options: every field of CPPO's own with its value, and those of TRL's that are known.

    Raises:
        UserError: two do not fit; the message names the field to change.
    """
    normalization, scorer = options["perception_normalization"], options["scorer"]
    if options["perception_gate"] == "correct" and not options["perception_gate_reward"]:
        raise UserError(
            "perception_gate = 'correct' needs perception_gate_reward, the name of the reward function that decides"
        )
    if options["perception_memory"] == "sequential" and scorer != "shared":
        raise UserError(f"perception_memory = 'sequential' needs scorer = 'shared', but scorer = {scorer!r}")
    bound = options["perception_rollouts_per_group"]
    if bound is not None and normalization != "rollout":
        raise UserError(
            f"perception_rollouts_per_group = {bound} needs perception_normalization = 'rollout': "
            f"{normalization!r} divides by the selected tokens of all rollouts"
        )
    # Without steps_per_generation TRL takes as many as it accumulates.
    steps, accumulation = options.get("steps_per_generation"), options.get("gradient_accumulation_steps") or 1
    if normalization == "token" and steps is not None and steps % accumulation:
        raise UserError(
            f"perception_normalization = 'token' needs the rollouts of a whole step at once, but steps_per_generation "
            f"= {steps} is not a multiple of gradient_accumulation_steps = {accumulation}"
        )
    view_sampler(options)


def view_sampler(options: Mapping[str, Any]) -> ViewSampler:
    """The sampler of views that the options describe.

    Raises:
        UserError: a family or a strength is not valid.
    """
    strengths = {part.name: options[f"view_{part.name}"] for part in fields(ViewStrengths)}
    families = options["preserving_views"], options["removing_views"]
    try:
        return ViewSampler(options.get("seed", 42), *families, ViewStrengths(**strengths))
    except UserError as error:
        # cppo.views has shorter names for these options; the message must name the one to change.
        message = re.sub("^view strength ", "view_", str(error))
        raise UserError(re.sub("^(preserving|removing)_families", r"\1_views", message)) from None
