"""Checks before torch is imported: model folders, data, output folder."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cppo.assets import adapter_base, resolve_model
from cppo.checkpoints import written_by_verl
from cppo.data import PixelBounds, check_columns, parse_spec
from cppo.errors import UserError, first_line
from cppo.options import TrainOptions, check_combinations, check_group_sizes, schema
from cppo.parsing import parse_json
from cppo.recipes import AUTO, Recipe, RunDirectory, check_checkpoint
from cppo.rewards import check_rewards
from cppo.runs.loggers import check_installed
from cppo.runs.sources import load_rows
from cppo.views import view_sampler

OPTIONAL_PACKAGES = {
    "deepspeed": "deepspeed",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "use_vllm": "vllm",
    "use_liger_kernel": "liger-kernel",
}
"""Options that need a separately installed package."""
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Launchers' variables for the number of processes, in accelerate's order."""
HUB_SECONDS = 10.0
"""Time limit for the hub to say whether it has a model."""


def check_recipe(recipe: Recipe) -> Path | None:
    """Check the files and the checkpoint that a recipe names, and whether its output folder is free.

    Returns the checkpoint from which the run resumes, or None. Raises UserError.
    """
    check_inputs(recipe)
    options = recipe.options
    files = RunDirectory(recipe.output_dir)
    checkpoint = files.find_checkpoint(options.resume_from_checkpoint)
    if checkpoint is not None:
        check_checkpoint(recipe, checkpoint)
    files.check_usable(
        checkpoint=checkpoint,
        auto=options.resume_from_checkpoint == AUTO,
        overwrite=options.overwrite,
        model=resolve_model(options.model),
        write=not (isinstance(options, TrainOptions) and options.dry_run),
    )
    return checkpoint


def check_inputs(recipe: Recipe) -> None:
    """Check the model and the data that a recipe names. Raises UserError."""
    options = recipe.options
    check_whole_model(options.model)
    check_packages({**vars(options), **recipe.config})
    _check_mappings(recipe)
    check_data(options.data)
    check_columns(options.columns)
    if options.eval_data is not None:
        check_data(options.eval_data)
    elif isinstance(options, TrainOptions) and options.final_eval_samples:
        raise UserError("final_eval_samples needs `eval_data`: give held-out data, or 0 items")
    elif isinstance(options, TrainOptions) and options.probe_steps:
        raise UserError("probe_steps needs `eval_data`: give held-out data, or 0")
    elif recipe.config.get("eval_strategy", "no") != "no":
        raise UserError("eval_strategy needs `eval_data`: give held-out data, or `no`")
    if recipe.config.get("max_steps") == 0:
        raise UserError("max_steps: 0 trains nothing; give at least 1, or -1 for the epochs of `num_train_epochs`")
    PixelBounds.of(vars(options))
    check_installed(recipe.config.get("report_to"))


def launched_processes() -> int:
    """Number of processes that a launcher has started; 1 without a launcher."""
    return max(int(os.environ.get(name, "1")) for name in WORLD_SIZES)


def check_options(recipe: Recipe) -> None:
    """Check that the options of a recipe for `cppo train` go together, and that its rewards exist. Raises UserError."""
    assert isinstance(recipe.options, TrainOptions)
    check_combinations(recipe.resolved)
    view_sampler(recipe.resolved)
    inherited = {name: field.default for name, field in schema("train").inherited.items()}
    options = recipe.options
    check_group_sizes(
        {**inherited, **recipe.config}, launched_processes(), lambda: len(load_rows(options, options.data, "train"))
    )
    check_rewards(recipe.rewards, recipe.config.get("reward_weights"))


def check_data(specs: str | list[str]) -> None:
    """Check every SPEC's syntax, options and file. Raises UserError."""
    for spec in [specs] if isinstance(specs, str) else specs:
        parse_spec(spec)


def check_model(name: str) -> None:
    """Check that a model can be used; it is a folder, a hub name, or an adapter of one.

    A folder must have a config.json with a vision tower; the hub must know a name. Raises UserError.
    """
    folder = Path(resolve_model(name))
    if not folder.exists():
        if str(folder) == name and _is_hub_name(name):
            return _check_hub_model(name)
        raise UserError(f"model: there is no folder {folder}")
    base = adapter_base(name)
    if base is not None:
        try:
            return check_model(base)
        except UserError as error:
            raise UserError(f"model: {name} is an adapter of {base}: {str(error).removeprefix('model: ')}") from error
    file = folder / "config.json"
    if not file.is_file():
        checkpoints, of_verl = RunDirectory(folder).checkpoints(), written_by_verl(folder)
        hint = f"; its latest checkpoint is {checkpoints[-1]}" if checkpoints else f"; {of_verl}" if of_verl else ""
        raise UserError(
            f"model: {name} is not a model folder (it has neither config.json nor adapter_config.json){hint}"
        )
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model: {file} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "vision_config" not in config:
        raise UserError(
            f"model: {name} has no vision tower (no `vision_config` in config.json); choose a vision-language model"
        )


def check_whole_model(name: str) -> None:
    """As `check_model`, and refuse an adapter. Raises UserError."""
    check_model(name)
    if adapter_base(name) is not None:
        raise UserError(
            f"model: {name} is an adapter: `cppo export --model {name} --out DIR` makes a model of it; or "
            "resume its run with --resume_from_checkpoint"
        )


def _check_hub_model(name: str) -> None:
    """Check that a Hugging Face name is on this machine or can be fetched. The libraries would try six times.

    Raises UserError if the hub is unreachable, or has no such model for this user.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except EntryNotFoundError:
        return  # loading reports what is missing
    except RepositoryNotFoundError as error:
        raise UserError(f"model: {name} is no folder here, and the hub has no such model that you may read") from error
    except (OSError, ValueError, HTTPError) as error:
        reason, folder = first_line(error), Path(name).parent
        if folder != Path() and folder.is_dir():
            there = ", ".join(sorted(one.name for one in folder.iterdir() if one.is_dir())[:8]) or "no folder"
            raise UserError(f"model: there is no folder {name}; {folder} has {there}") from error
        raise UserError(
            f"model: {name} is neither a folder nor in this machine's cache, and the hub did not answer: {reason}"
        ) from error


def _check_mappings(recipe: Recipe) -> None:
    """Check that TRL's options for mappings have one, or a file with one. Raises UserError."""
    for name, field in schema(recipe.command).inherited.items():
        value = recipe.config.get(name)
        if "dict" in field.kinds and isinstance(value, str) and not Path(value).is_file():
            raise UserError(f"{name}: expected a mapping such as {{key: value}}, or a file with it; got {value!r}")


def check_packages(options: Mapping[str, Any]) -> None:
    """Check that the packages for the options are installed. Raises UserError."""
    for name, package in OPTIONAL_PACKAGES.items():
        if options.get(name) and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{name} needs the package {package}; pip install {package}")


def _is_hub_name(name: str) -> bool:
    """`owner/name` or `name`: at most one slash, and nothing that only a path has."""
    owner, slash, rest = name.partition("/")
    return bool(owner) and owner[0] not in ".~" and "/" not in rest and bool(rest) == bool(slash)
