"""The files of a user's own functions that a recipe names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cppo.files import content_fingerprint
from cppo.imports import own_files
from cppo.options import cppo_fields
from cppo.recipes.recipe import Recipe, given_options
from cppo.rewards import check_rewards

VIEW_LISTS = ("preserving_views", "removing_views", "rollout_views")


def function_files(options: Mapping[str, Any]) -> list[Path]:
    """The files of the user's own views, score, selector and sink."""
    functions = [name for name, field in cppo_fields().items() if field.functions and name in options]
    views = [one for name in VIEW_LISTS for one in options.get(name, ())]
    return own_files([*views, *(options[name] for name in functions)])


def own_code(recipe: Recipe) -> list[Path]:
    """The files of the user's own rewards, views, score, selector and sink."""
    rewards = [spec.file for spec in check_rewards(recipe.rewards, None) if spec.file]
    return [*rewards, *function_files(given_options(recipe))]


def code_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Name of each file of `own_code` -> fingerprint of its contents."""
    return {str(file): content_fingerprint(file) for file in own_code(recipe)}
