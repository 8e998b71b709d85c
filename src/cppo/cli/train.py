"""`cppo train`: reinforcement learning from a recipe."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cppo.cli.checks import check_recipe
from cppo.cli.console import percent, quiet_libraries
from cppo.cli.fields import parse_recipe
from cppo.recipes import RunDirectory, schema
from cppo.training.option_rules import check_combinations
from cppo.training.sources import load_sources

if TYPE_CHECKING:
    from cppo.training.run import RunResult

DESCRIPTION = (
    "Trains a vision-language model with CPPO: GRPO plus a contrastive loss on the response tokens that depend on the "
    "image. Without arguments it trains the embedded micro model (recipe `micro`)."
)


def run(argv: Sequence[str]) -> None:
    """Train, write the report, print what was gained. Raises UserError for a user's mistake."""
    recipe = parse_recipe("train", argv, default_recipe="micro", description=DESCRIPTION)
    check_recipe(recipe)
    check_combinations({**schema("train").defaults, **recipe.config})
    sources = load_sources(recipe)
    quiet_libraries()

    from cppo.reports import write_report
    from cppo.training.run import run_training

    try:
        result = run_training(recipe, sources)
    except KeyboardInterrupt:
        checkpoints = RunDirectory(recipe.output_dir).checkpoints()
        if checkpoints:
            hint = "the same command with --resume_from_checkpoint true goes on from there"
            print(f"cppo: {checkpoints[-1]} is complete; {hint}", file=sys.stderr)
        raise
    if not result.is_main_process:
        return
    report = write_report(result.output_dir)
    print("\n".join([*closing_lines(result), f"model      {result.output_dir}", f"report     {report}"]))


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
