"""Before training: check a recipe's configuration and rows, and build the trainer with its model."""

from dataclasses import dataclass, fields
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from cppo.assets import resolve_model
from cppo.data import RecordSource, to_dataset
from cppo.errors import UserError, one_line, one_line_with_remedy
from cppo.evaluation import LongRow, check_marks, check_vision_model, load_processor
from cppo.options import TrainOptions
from cppo.progress import Progress
from cppo.recipes import Recipe
from cppo.runs.adapters import adapter_arguments, name_base
from cppo.runs.loggers import check_loggers
from cppo.runs.notices import warn_of_no_images, warn_of_prompts, warn_of_shared_files, warn_of_unread
from cppo.runs.precision import cpu_options, say_cpu_precision
from cppo.runs.row_limit import drop_long_rows, warn_of_left_out
from cppo.runs.sources import RunSources
from cppo.training.config import CPPOConfig, check_enough
from cppo.training.stages import check_stages
from cppo.training.trainer import CPPOTrainer

RUN_DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": False,  # else it follows the libraries' log level, which the command line lowers
}
"""A run's defaults, if its recipe sets nothing; other options keep the defaults of `CPPOConfig`."""


@dataclass(frozen=True)
class PreparedRun:
    """A run with checked options and rows: `train` excludes the rows in `long`, which have too many tokens."""

    options: TrainOptions
    args: CPPOConfig
    train: RecordSource
    long: list[LongRow]


def prepare_run(recipe: Recipe, sources: RunSources) -> PreparedRun:
    """Check configuration, kind of model and rows; warn of rows that are left out.

    Raises UserError for a refused value, a missing logger, too few rows, a model that sees no images.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    args = build_config(recipe)
    say_cpu_precision(recipe.config)
    check_loggers(args)
    check_vision_model(options.model)
    train, long = drop_long_rows(sources.train, options)
    warn_of_left_out(train, long, options)
    held_out = [sources.evaluation, sources.held_out]
    texts = {"system_prompt": options.system_prompt, "prompt_suffix": options.prompt_suffix}
    check_marks(load_processor(options.model), [train, *held_out], **texts)
    check_enough(train.name, len(train), args, by_rollouts=bool(recipe.config.get("generation_batch_size")))
    check_stages(train.name, len(train), args, args.data_stages)
    if args.uses_perception:
        warn_of_no_images(train)
    warn_of_shared_files(options)
    warn_of_unread(train)
    return PreparedRun(options, args, train, long)


def build_trainer(
    prepared: PreparedRun, sources: RunSources, trainer_class: type[CPPOTrainer] = CPPOTrainer
) -> CPPOTrainer:
    """The trainer of a run, with its model loaded.

    Raises UserError for options that do not go together.
    """
    options = prepared.options
    datasets = {
        name: None if source is None else to_dataset(source, system_prompt=options.system_prompt)
        for name, source in (("train_dataset", prepared.train), ("eval_dataset", sources.evaluation))
    }
    adapter = adapter_arguments(options, prepared.args)
    try:
        with Progress(desc=f"load {options.model}"):
            trainer = trainer_class(
                model=resolve_model(options.model),
                reward_funcs=sources.rewards,
                args=prepared.args,
                **datasets,
                **adapter,
            )
    except UserError:
        raise
    # The libraries' errors for such options, and for a hub that does not answer.
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise UserError(f"the trainer cannot be built: {one_line(error)}") from error
    if options.use_peft:
        name_base(trainer.model, options.model)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    warn_of_prompts(trainer.form_watch, options, prepared.train)
    return trainer


def build_config(recipe: Recipe) -> CPPOConfig:
    """The trainer's configuration. Raises UserError for a value that TRL or CPPO refuses."""
    try:
        return CPPOConfig(**{**_run_defaults(recipe), **recipe.config})
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"recipe {recipe.name} with the options given: {one_line_with_remedy(error)}") from error


def _run_defaults(recipe: Recipe) -> dict[str, Any]:
    weights = recipe.reward_weights
    given = {"reward_weights": weights} if set(weights) != {1.0} else {}
    return {**RUN_DEFAULTS, **cpu_options(recipe.config), **given}


def resolved_config(recipe: Recipe, args: CPPOConfig) -> dict[str, Any]:
    """The recipe's options, the run's defaults, and every option of CPPO: enough to repeat the run."""
    inherited = {field.name for field in fields(GRPOConfig)}
    own = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in inherited}
    used = {name: getattr(args, name) for name in ("seed", "max_completion_length")}
    return {**_run_defaults(recipe), **used, **own, **recipe.config}


def may_probe(trainer: CPPOTrainer, options: TrainOptions) -> bool:
    """Whether held-out items can be answered during training.

    Raises UserError if they cannot, although the recipe asks for probes or answers to them.
    """
    fsdp1 = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    if not (fsdp1 or trainer.is_deepspeed_enabled):
        return True
    for name in ("probe_steps", "final_eval_samples"):
        if getattr(options, name):
            how = "FSDP1: set fsdp_version to 2" if fsdp1 else "DeepSpeed, which we could not test: use FSDP2"
            raise UserError(f"{name} does not go with {how}, or set {name} = 0")
    return False
