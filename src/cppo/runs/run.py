"""One training run from a recipe: its run directory, training, accuracy before and after."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cppo.checkpoints import check_processes
from cppo.errors import tell
from cppo.evaluation import BLANK, EvalResult, PairedDifference, paired_bootstrap
from cppo.files import replace_text
from cppo.recipes import Recipe, RunDirectory, code_fingerprints, dump_recipe, resolved_options, warn_of_changes
from cppo.reports.model_card import RunFacts
from cppo.rewards import number_tolerance
from cppo.runs.generation_slice import choose_slice
from cppo.runs.notices import warn_of_answers
from cppo.runs.prepare import build_trainer, may_probe, prepare_run, resolved_config
from cppo.runs.probes import HeldOutProbe, answer_all
from cppo.runs.recorder import RunRecorder
from cppo.runs.row_limit import left_out_summary
from cppo.runs.signals import StopOnSignal, train_until_stopped
from cppo.runs.sources import RunSources
from cppo.runs.start import show_start
from cppo.training import package_versions
from cppo.training.trainer import CPPOTrainer


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the best evaluation by `metric`, and whether its weights became the run's model."""

    path: Path
    metric: str
    value: float
    is_the_model: bool

    @classmethod
    def of(cls, trainer: CPPOTrainer) -> "BestCheckpoint | None":
        """None if the run did not ask for the best checkpoint, or saved none that it evaluated."""
        args, state = trainer.args, trainer.state
        # A resumed run's state names a best checkpoint even if the run no longer asks for one.
        if not (args.metric_for_best_model and state.best_model_checkpoint) or state.best_metric is None:
            return None
        metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        return cls(Path(state.best_model_checkpoint), metric, state.best_metric, args.load_best_model_at_end)


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run.

    `before`, `after`, `blank` (after, with grey images) and `gain` (paired, after minus before) are None if the recipe
    asks for no final evaluation, `best` if it asks for no best checkpoint. `is_main_process` is False on a distributed
    run's other ranks, which write nothing.
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
    """Train a recipe on its data and fill its run directory (see `RunDirectory`).

    Args:
        report: writes the report during training; the caller writes the finished run's.
        checkpoint: the run resumes from it.

    Raises:
        UserError: a refused value, too few rows, a model that cannot be used, a folder that cannot be written.
        Stopped: a signal of the batch system ended the run; its last step is saved as a checkpoint.
    """
    started = time.monotonic()
    files = RunDirectory(recipe.output_dir)
    prepared = prepare_run(recipe, sources)
    options, args, train, long = prepared.options, prepared.args, prepared.train, prepared.long
    resolved, rows, code = resolved_config(recipe, args), train.digest(), code_fingerprints(recipe)
    if checkpoint is not None:
        check_processes(checkpoint, args.world_size)
        warn_of_changes(recipe, resolved, checkpoint, rows, code)
        tell(f"the run resumes from {checkpoint}")
    show_start(recipe, args, len(train))
    choose_slice(recipe, prepared)
    trainer = build_trainer(prepared, sources)
    if checkpoint is not None:
        trainer.check_launched_alike(checkpoint)
    trainer.rows, trainer.code = rows, code
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
    # After the probe, so that a step's report shows its probe.
    trainer.add_callback(recorder)

    def answer(label: str, **how: Any) -> EvalResult | None:
        if sources.held_out is None:
            return None
        return answer_all(trainer, sources.held_out, label, **asked, **how)

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
        summary = run_summary(result, left_out_summary(train, long, sources.outside_bands), trainer.fallbacks)
        replace_text(files.summary, json.dumps(summary, indent=2) + "\n")
        trainer.run_facts = replace(facts, summary=summary)
        trainer.create_model_card()
    return result


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
