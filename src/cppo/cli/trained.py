"""What `eval`, `inspect` and `views` take from a recipe: from the one that is named, or a run directory's own."""

import contextlib
import dataclasses
from typing import Any

import yaml

from cppo.errors import UserError
from cppo.recipes import RunDirectory, load_recipe, schema
from cppo.rewards import check_rewards, number_tolerance
from cppo.training.option_rules import view_sampler
from cppo.views import ViewSampler

DEFAULT_MAX_NEW_TOKENS = 512
"""Of a response, where no run directory says."""


def own_recipe(model: str) -> str | None:
    """The recipe file of a run directory of `cppo train`; None for any other model."""
    config = RunDirectory(model).config
    if not config.is_file():
        return None
    try:
        load_recipe("train", str(config))
    except UserError:  # such as that of `cppo sft`, which has no views
        return None
    return str(config)


def recipe_options(config: str | None) -> dict[str, Any]:
    """Every option of a recipe for "train", the published ones without a recipe."""
    return schema("train").defaults if config is None else load_recipe("train", config).resolved


def recipe_sampler(config: str | None, seed: int) -> ViewSampler:
    """The sampler of a recipe's views, of the published ones without a recipe, with another seed."""
    return dataclasses.replace(view_sampler({**recipe_options(config), "seed": seed}), seed=seed)


def recipe_families(config: str | None) -> tuple[str, ...]:
    """A recipe's families: those of rollouts, then I+ and I-, unless its method scores no views at all."""
    options = recipe_options(config)
    of_rollouts = tuple(options["rollout_views"])
    if of_rollouts and options["perception_sink"] == "none":
        return of_rollouts
    return tuple(dict.fromkeys((*of_rollouts, *options["preserving_views"], *options["removing_views"])))


def trained_recipe(model: str) -> dict[str, Any]:
    """What of a run directory's recipe an evaluation takes over, so that the task it trained for is measured."""
    config = RunDirectory(model).config
    try:
        recipe = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    wanted = {"system_prompt": str, "max_completion_length": int, "min_pixels": int, "max_pixels": int}
    given = recipe if isinstance(recipe, dict) else {}
    taken = {name: given[name] for name, kind in wanted.items() if isinstance(given.get(name), kind)}
    rewards = given.get("rewards")
    if isinstance(rewards, list) and all(isinstance(reward, str) for reward in rewards):
        with contextlib.suppress(UserError):  # a reward of files that are no longer there does not matter here
            taken["tolerance"] = number_tolerance(check_rewards(rewards, None))
    own = own_recipe(model)
    if own is not None:
        taken["views"] = recipe_sampler(own, 0)
    return taken
