"""Convert a recipe of `cppo train` to verl's options, and list the differences. Imports no torch and no verl."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cppo.options import TrainOptions, check_combinations, check_group_sizes, schema
from cppo.recipes import Recipe
from cppo.verl.batches import Cluster, Values
from cppo.verl.counterparts import IN_THE_DATA, INSTEAD, LATER, SAME, without_meaning
from cppo.verl.rules import RULES


@dataclass(frozen=True)
class Translation:
    """A recipe in verl's terms.

    Attributes:
        data: arguments of the `cppo verl-data` calls that write the files.
        options: verl's, by dotted name.
        instead: one line per option that verl cannot follow fully: what verl does instead.
    """

    data: list[list[str]]
    options: Mapping[str, Any]
    instead: list[str]


def translate(recipe: Recipe, cluster: Cluster) -> Translation:
    """verl's options for the same training as a recipe of `cppo train`, as far as possible.

    Raises:
        UserError: the recipe's options contradict each other, verl cannot run a method or reward, or batches are not
            whole numbers of prompts.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    check_combinations(recipe.resolved)
    inherited = {name: field.default for name, field in schema("train").inherited.items()}
    values = Values({**dict.fromkeys(LATER), **inherited, **vars(options), **recipe.resolved})
    check_group_sizes(dict(values), cluster.recipe_gpus)
    found = {theirs: values[name] for name, places in SAME.items() for theirs in places.split()}
    for part in RULES:
        found |= part(values, cluster)
    data = _data_commands(values)
    for name, (as_verl, text) in INSTEAD.items():
        if values[name] not in as_verl:
            values.instead[name] = text
    given = {**recipe.config, **{name: value for name, value in vars(options).items() if value != _default(name)}}
    for name, reason in without_meaning().items():
        if name in given:
            values.instead[name] = f"it has no meaning there: {reason}"
    for name in sorted(set(given) - values.read - set(without_meaning())):
        values.instead[name] = "verl is not told of it: beside the other options nothing follows from it"
    return Translation(
        data,
        dict(sorted(found.items())),
        [f"{name} = {values[name]!r}: {text}" for name, text in values.instead.items()],
    )


def _default(name: str) -> Any:
    return schema("train").run[name].default


def _data_commands(values: Values) -> list[list[str]]:
    """The arguments of `cppo verl-data` that write the rows of `data` and `eval_data` into output_dir."""
    shared = [
        word for name in IN_THE_DATA if values[name] != _default(name) for word in (f"--{name}", _text(values[name]))
    ]
    bound, commands = values["images_per_row"], []
    for split, specs in (("train", values["data"]), ("test", values["eval_data"])):
        if specs:
            words = [*([specs] if isinstance(specs, str) else specs), "--split", split, *shared]
            words += ["--images_per_row", str(bound)] if bound is not None and split == "train" else []
            commands.append([*words, "--out", f"{values['output_dir']}/{split}.parquet"])
    return commands


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
