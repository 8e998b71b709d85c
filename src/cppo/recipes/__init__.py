"""Recipes: flat YAML, one per purpose, checked before torch is imported."""

from cppo.recipes.own_code import code_fingerprints, function_files, own_code
from cppo.recipes.recipe import (
    Recipe,
    accelerate_files,
    dump_recipe,
    given_options,
    load_recipe,
    make_recipe,
    packaged_names,
    packaged_or_file,
    read_mapping,
    recipe_file,
    recipe_names,
    recipe_summary,
    resolved_options,
)
from cppo.recipes.resumed import check_checkpoint, warn_of_changes
from cppo.recipes.run_dir import AUTO, RunDirectory

__all__ = [
    "AUTO",
    "Recipe",
    "RunDirectory",
    "accelerate_files",
    "check_checkpoint",
    "code_fingerprints",
    "dump_recipe",
    "function_files",
    "given_options",
    "load_recipe",
    "make_recipe",
    "own_code",
    "packaged_names",
    "packaged_or_file",
    "read_mapping",
    "recipe_file",
    "recipe_names",
    "recipe_summary",
    "resolved_options",
    "warn_of_changes",
]
