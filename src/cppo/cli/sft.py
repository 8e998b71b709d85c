"""`cppo sft`: supervised fine-tuning on the reference responses of the data."""

import json
import time
from collections.abc import Sequence

from cppo.cli.console import hint_where_to_go_on, quiet_libraries, unless_quiet
from cppo.cli.fields import parse_recipe
from cppo.files import replace_text
from cppo.recipes import Recipe, RunDirectory, dump_recipe, warn_of_changes
from cppo.runs.lock import held

DESCRIPTION = "Supervised fine-tuning of a vision-language model on the `response` column, with TRL's SFTTrainer."


def run(argv: Sequence[str]) -> None:
    """Fine-tune and save the model in output_dir. Raises UserError for a user's mistake."""
    recipe = parse_recipe("sft", argv, default_recipe="sft", description=DESCRIPTION)
    with held(recipe), unless_quiet(recipe, "cppo sft"):
        _run(recipe)


def _run(recipe: Recipe) -> None:
    # They import numpy, which takes longer than finding a misspelt option.
    from cppo.runs.checks import check_recipe
    from cppo.runs.sources import check_responses, load_rows

    checkpoint = check_recipe(recipe)
    options = recipe.options
    data = load_rows(options, options.data, "train")
    check_responses(data)
    evaluation = None
    if options.eval_data is not None:
        evaluation = load_rows(options, options.eval_data, "test")
        check_responses(evaluation)
    quiet_libraries()

    from cppo.reports import tell_warnings, write_report
    from cppo.runs.notices import warn_of_unread
    from cppo.runs.precision import cpu_options
    from cppo.runs.recorder import RunRecorder
    from cppo.runs.row_limit import drop_long_rows, left_out_summary, warn_of_left_out
    from cppo.runs.sft import sft_trainer
    from cppo.runs.signals import StopOnSignal, train_until_stopped
    from cppo.runs.start import show_start

    files = RunDirectory(recipe.output_dir)
    data, long = drop_long_rows(data, options)
    warn_of_left_out(data, long, options)
    warn_of_unread(data)
    config = {**cpu_options(recipe.config), **recipe.config}
    if checkpoint is not None:
        warn_of_changes(recipe, config, checkpoint, data.digest(), {})
    arguments = {name: value for name, value in recipe.config.items() if name != "output_dir"}
    recorder = RunRecorder(files, samples=tuple, quiet=options.quiet, report=write_report)
    trainer = sft_trainer(
        options.model,
        data,
        recipe.output_dir,
        eval_data=evaluation,
        sft_args={"disable_tqdm": False, "logging_steps": 1, **arguments},
        callbacks=[recorder],
        options=options,
    )
    show_start(recipe, trainer.args, len(data))
    main = trainer.is_world_process_zero()
    if main:
        files.begin(checkpoint=checkpoint, overwrite=options.overwrite)
        replace_text(files.config, dump_recipe(recipe, config))
    started = time.monotonic()
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    with hint_where_to_go_on(recipe.output_dir), stop.listening():
        train_until_stopped(trainer, stop, recorder, checkpoint)
        trainer.save_model()
    if main:
        summary = {"seconds": round(time.monotonic() - started, 1), **left_out_summary(data, long)}
        replace_text(files.summary, json.dumps(summary) + "\n")
        tell_warnings(files.path)
        print(f"model      {recipe.output_dir}\nreport     {write_report(files.path)}")
