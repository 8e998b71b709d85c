"""One training run from a recipe: data, trainer, run directory, accuracy before and after."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from cppo.assets import resolve_model
from cppo.data import RecordSource, to_dataset
from cppo.errors import UserError, one_line, one_line_with_remedy, tell
from cppo.evaluation import (
    BLANK,
    EvalResult,
    LongRow,
    PairedDifference,
    check_marks,
    check_vision_model,
    load_processor,
    paired_bootstrap,
)
from cppo.files import replace_text
from cppo.options import TrainOptions
from cppo.recipes import Recipe, RunDirectory, dump_recipe, resolved_options, warn_of_changes
from cppo.reports.model_card import RunFacts
from cppo.rewards import DEFAULT_WEIGHTS, number_tolerance
from cppo.runs.adapters import adapter_arguments, name_base
from cppo.runs.loggers import check_loggers
from cppo.runs.notices import warn_of_answers, warn_of_no_images, warn_of_prompts, warn_of_shared_files
from cppo.runs.probes import HeldOutProbe, answer_all
from cppo.runs.recorder import RunRecorder
from cppo.runs.row_limit import drop_long_rows, left_out_summary, warn_of_left_out
from cppo.runs.signals import StopOnSignal, train_until_stopped
from cppo.runs.sources import RunSources
from cppo.training import package_versions
from cppo.training.config import CPPOConfig, check_enough
from cppo.training.trainer import CPPOTrainer

RUN_DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": False,  # else it follows the libraries' log level, which the command line turns down
}
"""What a run takes where its recipe says nothing; everything else keeps the defaults of `CPPOConfig`."""


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint whose evaluation was best by `metric`, and whether its weights became the run's model."""

    path: Path
    metric: str
    value: float
    is_the_model: bool

    @classmethod
    def of(cls, trainer: CPPOTrainer) -> "BestCheckpoint | None":
        """None where the run did not ask for the best, or saved nothing that it had evaluated."""
        args, state = trainer.args, trainer.state
        # A resumed run's state tells of a best checkpoint although the run may no longer ask for one.
        if not (args.metric_for_best_model and state.best_model_checkpoint) or state.best_metric is None:
            return None
        metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        return cls(Path(state.best_model_checkpoint), metric, state.best_metric, args.load_best_model_at_end)


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind.

    `before`, `after`, `blank` (after, with grey images) and `gain` (paired, after minus before) are None where the
    recipe asks for no final evaluation, `best` where it asks for no best checkpoint. `is_main_process` is False on a
    distributed run's other ranks, which write nothing.
    """

    output_dir: Path
    is_main_process: bool
    steps: int
    seconds: float
    before: EvalResult | None
    after: EvalResult | None
    blank: EvalResult | None
    gain: PairedDifference | None
    best: BestCheckpoint | None


def run_training(
    recipe: Recipe, sources: RunSources, report: Callable[..., object] | None = None, checkpoint: Path | None = None
) -> RunResult:
    """Train as `recipe` says on its data and fill its run directory (see `RunDirectory`).

    Args:
        report: writes the report while the run trains; that of the finished run is left to the caller.
        checkpoint: what the run goes on from.

    Raises:
        UserError: a refused value, too few rows, a model that cannot be used, a folder that cannot be written.
        Stopped: a signal of the batch system ended the run; its last step is saved as a checkpoint.
    """
    started = time.monotonic()
    files = RunDirectory(recipe.output_dir)
    prepared = prepare_run(recipe, sources)
    options, args, train, long = prepared.options, prepared.args, prepared.train, prepared.long
    resolved = resolved_config(recipe, args)
    if checkpoint is not None:
        tell(f"the run goes on from {checkpoint}")
        warn_of_changes(recipe, resolved, checkpoint)
    trainer = build_trainer(prepared, sources)
    main = trainer.is_world_process_zero()
    probes = sources.probes if may_probe(trainer, options) else None
    if main:
        files.begin(checkpoint=checkpoint, overwrite=options.overwrite)
        replace_text(files.config, dump_recipe(recipe, resolved, trainer.fallbacks))
    trainer.run_facts = facts = RunFacts(
        resolved_options(recipe, resolved),
        rows=len(train),
        skipped_rows=len(train.skipped),
        other_images_rows=len(train.other_images),
        long_rows=len(long),
    )
    recorder = RunRecorder(
        files,
        lambda: trainer.last_samples,
        quiet=options.quiet,
        versions=package_versions(),
        fallbacks=trainer.fallbacks,
        report=report,
        form_warning=lambda: trainer.form_watch.warning,
    )
    asked: dict[str, Any] = {
        "max_new_tokens": args.max_completion_length,
        "system_prompt": options.system_prompt,
        "tolerance": number_tolerance(sources.reward_specs),
    }
    if probes is not None:
        trainer.add_callback(HeldOutProbe(trainer, files, probes, every=options.probe_steps, asked=asked))
    # After the probe, so that a step's report shows the step's probe.
    trainer.add_callback(recorder)

    def answer(label: str, **how: Any) -> EvalResult | None:
        if sources.held_out is None:
            return None
        return answer_all(trainer, sources.held_out, label, show_bar=not options.quiet, **asked, **how)

    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    with stop.listening():
        before = answer("before")
        if before is not None and sources.held_out is not None:
            warn_of_answers(trainer.form_watch, options, sources.held_out, before)
        train_until_stopped(trainer, stop, recorder, checkpoint)
        trainer.save_model(recipe.output_dir)
        after = answer("after")
        blank = answer("blank image", condition=BLANK)
    result = RunResult(
        output_dir=files.path,
        is_main_process=main,
        steps=trainer.state.global_step,
        seconds=time.monotonic() - started,
        before=before,
        after=after,
        blank=blank,
        gain=paired_bootstrap(before.accuracies, after.accuracies, seed=args.seed) if before and after else None,
        best=BestCheckpoint.of(trainer),
    )
    if main:
        summary = run_summary(result, left_out_summary(train, long), trainer.fallbacks)
        replace_text(files.summary, json.dumps(summary, indent=2) + "\n")
        trainer.run_facts = replace(facts, summary=summary)
        trainer.create_model_card()
    return result


@dataclass(frozen=True)
class PreparedRun:
    """A run whose options and rows were checked: `train` without the rows in `long`, which have too many tokens."""

    options: TrainOptions
    args: CPPOConfig
    train: RecordSource
    long: list[LongRow]


def prepare_run(recipe: Recipe, sources: RunSources) -> PreparedRun:
    """Check configuration, kind of model and rows; warn of what is left out.

    Raises UserError for a refused value, a logger that is missing, too few rows, a model that sees no images.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    args = build_config(recipe)
    check_loggers(args)
    check_vision_model(options.model)
    train, long = drop_long_rows(sources.train, options)
    warn_of_left_out(train, long, options)
    held_out = [sources.evaluation, sources.held_out]
    texts = {"system_prompt": options.system_prompt, "prompt_suffix": options.prompt_suffix}
    check_marks(load_processor(options.model), [train, *held_out], **texts)
    check_enough(train.name, len(train), args)
    if args.uses_perception:
        warn_of_no_images(train)
    warn_of_shared_files(options)
    return PreparedRun(options, args, train, long)


def build_trainer(
    prepared: PreparedRun, sources: RunSources, trainer_class: type[CPPOTrainer] = CPPOTrainer
) -> CPPOTrainer:
    """The trainer of a run, its model loaded.

    Raises UserError for options that do not go together, and loggers that are not installed.
    """
    options = prepared.options
    datasets = {
        name: None if source is None else to_dataset(source, system_prompt=options.system_prompt)
        for name, source in (("train_dataset", prepared.train), ("eval_dataset", sources.evaluation))
    }
    adapter = adapter_arguments(options, prepared.args)
    try:
        trainer = trainer_class(
            model=resolve_model(options.model), reward_funcs=sources.rewards, args=prepared.args, **datasets, **adapter
        )
    except UserError:
        raise
    # How the libraries refuse them, and how a hub that does not answer is told.
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise UserError(f"the trainer cannot be built: {one_line(error)}") from error
    if options.use_peft:
        name_base(trainer.model, options.model)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    warn_of_prompts(trainer.form_watch, options, prepared.train)
    return trainer


def build_config(recipe: Recipe) -> CPPOConfig:
    """The trainer's configuration; UserError for a value that TRL or CPPO refuses."""
    try:
        return CPPOConfig(**{**_run_defaults(recipe), **recipe.config})
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"recipe {recipe.name} with the options given: {one_line_with_remedy(error)}") from error


def _run_defaults(recipe: Recipe) -> dict[str, Any]:
    assert isinstance(recipe.options, TrainOptions)
    weights = {} if recipe.options.rewards else {"reward_weights": list(DEFAULT_WEIGHTS)}
    return {**RUN_DEFAULTS, **weights}


def resolved_config(recipe: Recipe, args: CPPOConfig) -> dict[str, Any]:
    """What the recipe gave, the run's defaults, and every option of CPPO itself: enough to run it again."""
    inherited = {field.name for field in fields(GRPOConfig)}
    own = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in inherited}
    used = {name: getattr(args, name) for name in ("seed", "max_completion_length")}
    return {**_run_defaults(recipe), **used, **own, **recipe.config}


def run_summary(result: RunResult, left_out: dict[str, Any], fallbacks: Sequence[str]) -> dict[str, Any]:
    """The contents of `summary.json`; fractions of 1, seconds.

    left_out: the rows not trained on. fallbacks: `CPPOTrainer.fallbacks`.
    """
    evaluations = {"before": result.before, "after": result.after, "blank": result.blank}
    return {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        **left_out,
        **{name: found.to_dict() for name, found in evaluations.items() if found is not None},
        **({"gain": asdict(result.gain)} if result.gain else {}),
        "fallbacks": list(fallbacks),
        "versions": package_versions(),
    }


def may_probe(trainer: CPPOTrainer, options: TrainOptions) -> bool:
    """Whether one process can run the model alone.

    Raises UserError where it cannot, although probes or answers to held-out items were asked for.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return True
    for name in ("probe_steps", "final_eval_samples"):
        if getattr(options, name):
            raise UserError(f"{name} runs the whole model in each process, not with FSDP or DeepSpeed: set 0")
    return False
