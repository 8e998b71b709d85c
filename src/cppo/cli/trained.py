"""The settings that `eval`, `inspect` and `views` share: options, a named recipe's, or a run directory's."""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cppo.cli.parser import COUNT, add_pixel_bounds
from cppo.data import PixelBounds, RecordSource, load_records
from cppo.errors import UserError, tell
from cppo.options import cppo_fields
from cppo.recipes import RunDirectory, load_recipe, make_recipe
from cppo.rewards import RewardSpec, check_rewards, number_tolerance
from cppo.runs.checks import check_data
from cppo.views import ViewSampler, view_sampler

DEFAULT_MAX_NEW_TOKENS = 512
"""Limit of a response without a run directory's own."""
AS_TRAINED: dict[str, Any] = {
    "system_prompt": str,
    "prompt_suffix": str,
    "min_pixels": int,
    "max_pixels": int,
    "min_side": int,
    "columns": dict | str,
}
"""The options of a run that decide what a model sees, with their types."""


ANY_MODEL = "`micro`, a run, its checkpoint, a folder or a Hugging Face name"
"""Help of a `--model` that answers."""


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a model answers: length, system prompt, prompt suffix, image bounds, device and dtype."""
    parser.add_argument(
        "--max_new_tokens",
        type=COUNT,
        metavar="N",
        help=f"longest response (default: a run directory's own, else {DEFAULT_MAX_NEW_TOKENS})",
    )
    texts = {"system_prompt": "system message of prompts that have none", "prompt_suffix": "added to every prompt"}
    for name, what in texts.items():
        parser.add_argument(f"--{name}", metavar="TEXT", help=f"{what} (default: a run directory's own)")
    add_pixel_bounds(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, else bfloat16"
    )


def answer_settings(arguments: argparse.Namespace, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Values of these options (without --device and --dtype) and of --columns: as given, as trained, or default."""
    as_trained = {
        "max_new_tokens": trained.get("max_completion_length", DEFAULT_MAX_NEW_TOKENS),
        **{name: trained.get(name) for name in AS_TRAINED},
    }
    given = {name: getattr(arguments, name) for name in as_trained}
    return {name: value if given[name] is None else given[name] for name, value in as_trained.items()}


def asked_rows(
    arguments: argparse.Namespace, settings: Mapping[str, Any], extras: Sequence[str] = (), **reading: Any
) -> RecordSource:
    """The rows of --data and --limit, with these `answer_settings`.

    reading: further arguments of `load_records`; the split is "test" by default. Raises UserError as it does.
    """
    check_data(arguments.data)
    try:
        return load_records(
            arguments.data,
            limit=arguments.limit,
            columns=settings["columns"],
            max_bad_fraction=arguments.max_bad_fraction,
            pixels=PixelBounds.of(settings),
            prompt_suffix=settings["prompt_suffix"],
            extras=extras,
            **{"split": "test", **reading},
        )
    except UserError as error:
        if arguments.columns is not None or not settings["columns"]:
            raise
        raise UserError(
            f"{error} (read with the columns that {arguments.model} was trained with; --columns {{}} reads without)"
        ) from error


def answering_model(
    arguments: argparse.Namespace, settings: Mapping[str, Any], source: RecordSource | None, **texts: str | None
) -> tuple[Any, Any]:
    """The model of --model with its processor; a line reports a folder without a recipe of its own.

    Raises UserError for the model's own marks in rows, settings and `texts`.
    """
    from cppo.evaluation import check_marks, load_model

    model, processor = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    texts |= {name: settings[name] for name in ("system_prompt", "prompt_suffix")}
    check_marks(processor, [source], **texts)
    if arguments.config is None and Path(arguments.model).is_dir() and own_options(arguments.model) is None:
        tell("score and views: published; the model's own are not known (--config FILE gives them)")
    return model, processor


def recipe_views(arguments: argparse.Namespace) -> tuple[str | None, dict[str, Any], ViewSampler]:
    """The recipe of --config, else that of the run whose folder or checkpoint is --model; its options, and its views by
    --seed.

    Otherwise the options are the published ones. Raises UserError if the recipe's own views cannot be loaded.
    """
    config, model, options = arguments.config, arguments.model, None
    if config is not None:
        options = load_recipe("train", config).resolved
    elif model and (options := own_options(model)) is not None:
        config = str(RunDirectory.of_model(model).config)
    if options is None:
        options = {name: field.default for name, field in cppo_fields().items()}
    return config, options, view_sampler({**options, "seed": arguments.seed})


def own_options(model: str) -> dict[str, Any] | None:
    """Every option of the run whose folder or checkpoint this is; None for any other model."""
    run = RunDirectory.of_model(model)
    given = run.options()
    if not given:
        return None
    try:
        # A trainer in a script has its data in memory.
        return make_recipe("train", str(run.config), {"data": [], **given}).resolved
    except UserError:  # such as a recipe of `cppo sft`, which has no views
        return None


def trained_recipe(model: str) -> dict[str, Any]:
    """Options of a run that an evaluation of its folder or checkpoint reuses, so that it measures the trained task."""
    given = RunDirectory.of_model(model).options()
    wanted = {**AS_TRAINED, "max_completion_length": int}
    taken = {name: given[name] for name, kind in wanted.items() if isinstance(given.get(name), kind)}
    rewards = given.get("rewards")
    if isinstance(rewards, list) and all(isinstance(reward, str) for reward in rewards):
        specs: list[RewardSpec] = []
        for reward in rewards:
            with contextlib.suppress(UserError):  # a reward of missing files does not matter here
                specs += check_rewards([reward], None)
        taken["tolerance"] = number_tolerance(specs)
    own = own_options(model)
    if own is not None:
        try:
            taken["views"] = view_sampler({**own, "seed": 0})
        except UserError as error:  # the user's own view is no longer where the run found it
            taken["views_error"] = str(error)
    return taken
