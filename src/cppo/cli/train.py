"""`cppo train`: reinforcement learning from a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cppo.assets import resolve_model
from cppo.cli.console import hint_where_to_go_on, percent, quiet_libraries, unless_quiet
from cppo.cli.fields import parse_recipe
from cppo.errors import UserError
from cppo.options import TrainOptions
from cppo.recipes import Recipe
from cppo.runs.lock import held

if TYPE_CHECKING:
    from cppo.runs.run import BestCheckpoint, RunResult

DEFAULT_RECIPE = "micro"
SMALL_BYTES = 100 * 2**20
NO_RECIPE = (
    "--model {model} needs a recipe: without --config a run uses the recipe micro, with a learning rate and "
    "lengths for a tiny model; give --config few-rows (tens of rows, one GPU or a CPU), lora-24gb (one GPU "
    "of 24 GB), cppo-3b or cppo-7b (8 GPUs), or let `cppo init --model {model}` write one"
)
DESCRIPTION = (
    "Trains a vision-language model with CPPO: GRPO plus a contrastive loss on the response tokens that depend on the "
    "image; or with another method (`cppo methods` lists them). Without arguments it trains the embedded micro model "
    "(recipe `micro`). Every other model needs a recipe: --config."
)


def run(argv: Sequence[str]) -> None:
    """Train, write the report, print the gain. Raises UserError for a user's mistake."""
    recipe = parse_recipe("train", argv, default_recipe=DEFAULT_RECIPE, description=DESCRIPTION)
    named = any(word.partition("=")[0] == "--config" for word in argv)
    with held(recipe), unless_quiet(recipe, "cppo train"):
        _run(recipe, named)


def _run(recipe: Recipe, named: bool) -> None:
    # They import numpy, which takes longer than finding a misspelt option.
    from cppo.runs.checks import check_options, check_recipe
    from cppo.runs.sources import load_sources

    checkpoint = check_recipe(recipe)
    if not (named or is_small(recipe.options.model)):
        raise UserError(NO_RECIPE.format(model=recipe.options.model))
    check_options(recipe)
    options = recipe.options
    assert isinstance(options, TrainOptions)
    sources = load_sources(recipe)
    quiet_libraries()

    if options.dry_run:
        from cppo.runs.dry_run import rehearse

        lines = rehearse(recipe, sources)
        if lines is not None:
            print("\n".join(lines))
        return

    from cppo.reports import tell_warnings, write_report
    from cppo.runs.run import run_training

    with hint_where_to_go_on(recipe.output_dir):
        result = run_training(recipe, sources, write_report, checkpoint)
    if not result.is_main_process:
        return
    tell_warnings(result.output_dir)
    report = write_report(result.output_dir)
    print(
        "\n".join(
            [
                *closing_lines(result),
                *best_lines(result.best),
                f"model      {result.output_dir}",
                f"report     {report}",
            ]
        )
    )


def is_small(model: str) -> bool:
    """Whether a model is a folder with few weights, such as a trained packaged micro model."""
    folder = Path(resolve_model(model))
    return folder.is_dir() and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < SMALL_BYTES


def closing_lines(result: "RunResult") -> list[str]:
    """The accuracies before and after, as text lines; none if the run measured none."""
    if result.before is None or result.after is None or result.gain is None:
        return []
    before, after, gain = result.before, result.after, result.gain
    lines = [
        f"held-out   {after.n:,} items, greedy, 95 % intervals",
        f"before     {percent(before.accuracy, before.accuracy_ci95)}",
        f"after      {percent(after.accuracy, after.accuracy_ci95)}   "
        f"{100 * gain.mean:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
    ]
    if result.blank is not None:
        lines.append(f"blank      {percent(result.blank.accuracy, result.blank.accuracy_ci95)}   (after, grey image)")
    lines.append(f"format     {before.format_rate:.1%} before, {after.format_rate:.1%} after".replace("%", " %"))
    return lines


def best_lines(best: "BestCheckpoint | None") -> list[str]:
    """The best checkpoint, as text lines; none if nothing chose one."""
    if best is None:
        return []
    used = "the model below" if best.is_the_model else "not the model below: use --load_best_model_at_end to keep it"
    return [f"best       {best.path}, {best.metric} {best.value:.4g} ({used})"]
