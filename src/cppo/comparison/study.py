"""A study: the checked file of methods, seeds and tasks, and its grid of cells. No torch."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cppo.comparison.options import StudyOptions
from cppo.errors import UserError, choose_one
from cppo.fields import option_fields
from cppo.options import Schema, schema
from cppo.recipes import Recipe, given_options, load_recipe, packaged_names, packaged_or_file, read_mapping
from cppo.views import CONDITION_NAMES

STUDIES_DIR = Path(__file__).parent / "studies"

FIXED: dict[str, Any] = {
    "final_eval_samples": 0,
    "probe_steps": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "resume_from_checkpoint": None,
    "overwrite": False,
    "dry_run": False,
}
"""Options with the same value in every cell, because the study itself evaluates and starts over."""
SET_BY_STUDY = frozenset({*FIXED, "seed", "output_dir", "method"})
SAME_FOR_ALL = frozenset(
    {
        "model",
        "data",
        "eval_data",
        "columns",
        "min_pixels",
        "max_pixels",
        "min_side",
        "images_per_row",
        "max_prompt_tokens",
        "system_prompt",
        "prompt_suffix",
        "max_steps",
        "num_train_epochs",
        "num_generations",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "generation_batch_size",
        "num_iterations",
        "max_completion_length",
        "shuffle_dataset",
        "data_seed",
    }
)
"""Start, data and rollout budget: a method that changed them would have an advantage."""
EVALUATED = (
    "eval_data",
    "columns",
    "min_pixels",
    "max_pixels",
    "min_side",
    "system_prompt",
    "prompt_suffix",
    "rewards",
    "max_completion_length",
)
"""The options of `cppo train` that an evaluation depends on, without the views' options."""
_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)


@dataclass(frozen=True)
class Variant:
    """A compared method, and the options in which it differs from that method's defaults."""

    label: str
    method: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the grid; its recipe has everything except the output folder."""

    task: str
    label: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """A checked study. `tasks` are options by name; `seeds` the seeds of each label."""

    name: str
    options: StudyOptions
    variants: tuple[Variant, ...]
    control: str
    tasks: Mapping[str, Mapping[str, Any]]
    seeds: Mapping[str, tuple[int, ...]]

    @property
    def output_dir(self) -> Path:
        return Path(self.options.output_dir or f"runs/{self.name}")

    @cached_property
    def cells(self) -> list[Cell]:
        """The grid, seed by seed, so that an unfinished study has equally many seeds of each method."""
        grid = [
            Cell(task, variant.label, seed, self.cell_recipe(task, variant, seed))
            for task in self.tasks
            for variant in self.variants
            for seed in self.seeds[variant.label]
        ]
        return sorted(grid, key=lambda cell: self.seeds[cell.label].index(cell.seed))

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Everything that the evaluations of each task's cells depend on: the same for every method."""
        found = {}
        for task in self.tasks:
            options = given_options(self._recipe(task, {}))
            views = {name for name in options if name.startswith("view_") or name.endswith("ing_views")}
            own = {name: getattr(self.options, name) for name in ("eval_items", "conditions", "detector_items")}
            found[task] = {**{name: options[name] for name in options if name in {*EVALUATED, *views}}, **own}
        return found

    def cell_recipe(self, task: str, variant: Variant, seed: int) -> Recipe:
        """The training options of `variant` on a task and a seed. Raises UserError for options that do not work."""
        recipe = self._recipe(task, {"method": variant.method, "seed": seed, **variant.options})
        data = recipe.options.data
        data = [_with_seed(one, seed) for one in data] if isinstance(data, list) else _with_seed(data, seed)
        return replace(recipe, options=replace(recipe.options, data=data))

    def _recipe(self, task: str, own: Mapping[str, Any]) -> Recipe:
        given = {**self.options.options, **self.tasks[task], **FIXED, **own}
        recipe = load_recipe("train", self.options.recipe, given)
        return replace(recipe, config={name: value for name, value in recipe.config.items() if name != "output_dir"})

    def evaluation_steps(self, recipe: Recipe) -> list[int]:
        """The steps after which a cell evaluates; step 0 is the start's, measured once for all."""
        last = recipe.config["max_steps"]
        every = self.options.evaluate_every or last
        return [*range(every, last, every), last]


def study_schema() -> Schema:
    """The options of a study file."""
    return Schema("compare", StudyOptions, option_fields(StudyOptions), {}, {})


def study_names() -> list[str]:
    """Names of the packaged studies."""
    return packaged_names(STUDIES_DIR)


def study_file(name_or_file: str) -> Path:
    """The file of a packaged study, or a user's own. Raises UserError for neither."""
    return packaged_or_file(STUDIES_DIR, "study", name_or_file)


def load_study(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read and check a study and every cell's options; `overrides` (checked values) replace the file's.

    Raises UserError, which names the place, for an unreadable file, a wrong option, value, method or label.
    """
    file, where = study_file(name_or_file), f"study {name_or_file}"
    given = {**read_mapping(file, where), **(overrides or {})}
    checked = study_schema().check(given, where=where)
    if not checked.get("methods"):
        raise UserError(f"{where}: no `methods` are given; write e.g. methods: [grpo, cppo]")
    options = StudyOptions(**checked)
    for place, values in (("options", options.options), *((f"tasks: {k}", v) for k, v in options.tasks.items())):
        if not isinstance(values, dict):
            raise UserError(f"{where}: {place}: expected a mapping of options, got {values!r}")
        _refuse(values, SET_BY_STUDY, f"{where}: {place}", "the study itself sets it")
    unknown = [name for name in options.conditions if name not in CONDITION_NAMES]
    if unknown or not options.conditions:
        raise UserError(
            f"{where}: conditions: {', '.join(unknown) or 'none'}: {choose_one(''.join(unknown[:1]), CONDITION_NAMES)}"
        )
    train = schema("train")
    base = train.check(options.options, where=f"{where}: options")
    tasks = {name: train.check(values, where=f"{where}: tasks: {name}") for name, values in options.tasks.items()} or {
        Path(options.recipe).stem: {}
    }
    variants = tuple(_variant(entry, f"{where}: methods") for entry in options.methods)
    labels = [variant.label for variant in variants]
    for name in (*labels, *tasks):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} names a folder: use letters, digits and . _ + - only")
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(f"{where}: methods: {twice[0]} is there twice; give one of them another `label`")
    control = options.control or labels[0]
    for label in (control, *options.seeds_of):
        if label not in labels:
            raise UserError(f"{where}: there is no method labelled {label!r}; the labels are {', '.join(labels)}")
    seeds = {
        label: _seeds(options.seeds_of.get(label, options.seeds), f"{where}: seeds of {label}") for label in labels
    }
    options = replace(options, options=base, tasks=tasks)
    study = Study(file.stem, options, variants, control, tasks, seeds)
    for task in tasks:
        _check_task(study.cell_recipe(task, variants[0], 0), f"{where}: tasks: {task}")
    return study


def _variant(entry: str | dict[str, Any], where: str) -> Variant:
    values = {"method": entry} if isinstance(entry, str) else dict(entry)
    method = values.pop("method", None)
    if not isinstance(method, str):
        has = f" (it has {', '.join(map(str, entry))})" if isinstance(entry, dict) else ""
        raise UserError(
            f"{where}: {entry!r}: give a method's name, or {{label: NAME, method: NAME, option: VALUE}}{has}"
        )
    label = values.pop("label", method)
    place = f"{where}: {label}"
    if not isinstance(label, str):
        raise UserError(f"{place}: a label is text")
    train = schema("train")
    train.check({"method": method}, where=place)
    _refuse(values, SET_BY_STUDY, place, "the study itself sets it")
    _refuse(values, SAME_FOR_ALL, place, "start, data and rollout budget are the same for all methods")
    return Variant(label, method, train.check(values, where=place))


def _refuse(values: Mapping[str, Any], names: frozenset[str], where: str, why: str) -> None:
    for name in values:
        if name in names:
            raise UserError(f"{where}: `{name}` cannot be set here: {why}")


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    seeds = list(range(given)) if type(given) is int else given
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{where}: {given!r}: give a number of seeds, or a list such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: {given!r}: a seed is there twice")
    return tuple(seeds)


def _check_task(recipe: Recipe, where: str) -> None:
    if recipe.options.eval_data is None:
        raise UserError(f"{where}: no `eval_data` is given; write e.g. eval_data: tasks:digits?n=1000")
    if "{seed}" in str(recipe.options.eval_data):
        raise UserError(f"{where}: eval_data: only `data` may have `{{seed}}`: all cells answer the same items")
    if recipe.config.get("max_steps", -1) < 1:
        raise UserError(f"{where}: max_steps: give a number of steps, the same for all methods")


def _with_seed(spec: str, seed: int) -> str:
    return spec.replace("{seed}", str(seed))


def settings(study: Study) -> dict[str, Any]:
    """The study as JSON values, for the record."""
    return {"name": study.name, **dataclasses.asdict(study.options), "control": study.control}
