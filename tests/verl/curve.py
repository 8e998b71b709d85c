"""python tests/verl/curve.py FOLDER [MODE ...]: trains the micro VLM inside verl on the CPU and keeps its learning
curve.

Writes MODE.json and MODE.svg for sync, colocate_async and separate_async, or the named ones: the mean reward of each of
20 steps, and the rise from steps 1 to 5 to steps 16 to 20. A mode takes a quarter of an hour on two cores.

A prompt's mean over its rollouts is one observation, because they share its difficulty. The standard error of a mean is
the standard deviation of these observations over the square root of their number; variances of a difference add up. It
covers the draw of prompts and rollouts, not other seeds of the training.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpu_bed.launch import MODES, Run, launch

from cppo.data import load_records
from cppo.reports.charts import Series, line_chart
from cppo.verl.data import write_parquet

STEPS, WINDOW = 20, 5
PROMPTS, ROLLOUTS, MINI_BATCH = 64, 8, 16
SPEC = "tasks:digits?noise=200"
TRAINING = {
    "data.train_batch_size": PROMPTS,
    "actor_rollout_ref.actor.ppo_mini_batch_size": MINI_BATCH,
    "actor_rollout_ref.actor.optim.lr": 1e-4,
    "actor_rollout_ref.rollout.n": ROLLOUTS,
    "trainer.total_training_steps": STEPS,
    "trainer.v1.separate_async.parameter_sync_step": PROMPTS // MINI_BATCH,  # verl asks for this number
}
MOST_SECONDS = 3600
LIBRARIES = ("verl", "torch", "transformers", "ray")
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #5d6b7c; } .grid { stroke: #e1e5ea; } .hit { fill: none; }
.line { fill: none; stroke: #0072b2; stroke-width: 2; } .mark { fill: #0072b2; } .band { fill: #0072b2; opacity: .15; }
</style><rect width="100%" height="100%" fill="#fff"/>"""


def prompt_means(rollouts: Sequence[dict[str, Any]]) -> list[float]:
    """The mean reward of each prompt of a step."""
    groups: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout["uid"].partition("_")[0]].append(rollout["score"])
    return [statistics.fmean(group) for group in groups.values()]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent observations and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def gain(steps: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """The rise of the mean reward from the first `WINDOW` steps to the last, with its standard error."""
    first, last = (
        mean_and_error([mean for step in part for mean in prompt_means(step)])
        for part in (steps[:WINDOW], steps[-WINDOW:])
    )
    error = math.hypot(first[1], last[1])
    return {
        "first": first[0],
        "last": last[0],
        "gain": last[0] - first[0],
        "standard_error": error,
        "gain_in_standard_errors": (last[0] - first[0]) / error,
    }


def summary(run: Run, mode: str, seconds: float) -> dict[str, Any]:
    """The results of a run to keep."""
    steps = []
    for metrics, rollouts in zip(run.metrics, run.rollouts, strict=True):
        mean, error = mean_and_error(prompt_means(rollouts))
        kept = {name: value for name, value in metrics.items() if name.startswith("perception/")}
        steps.append(
            {
                "step": int(metrics["training/global_step"]),
                "reward": mean,
                "standard_error": error,
                "largest_difference_of_probabilities": metrics["training/rollout_probs_diff_max"],
                "staleness": float(metrics["training/off_policy/trajectory_staleness/mean"]),
                **kept,
            }
        )
    return {
        "command": f"python tests/verl/curve.py docs/results/verl {mode}",
        "data": SPEC,
        "seed": 0,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "seconds": round(seconds),
        "options": {**TRAINING, "trainer.v1.trainer_mode": mode},
        "steps_1_5_and_16_20": gain(run.rollouts),
        "steps": steps,
    }


def figure(kept: dict[str, Any], mode: str) -> str:
    """The curve as an SVG file, with two standard errors on either side."""
    points = [(step["step"], step["reward"]) for step in kept["steps"]]
    band = [
        (step["step"], step["reward"] - 2 * step["standard_error"], step["reward"] + 2 * step["standard_error"])
        for step in kept["steps"]
    ]
    title = f"CPPO inside verl, {mode}: mean reward of a step's rollouts"
    chart = str(line_chart([Series(mode, points, band)], title=title, x_title="step", y_title="reward", smooth=False))
    head, body = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{STYLE}{body}\n'


def write_data(folder: Path, rows: int) -> dict[str, Any]:
    """Write `rows` prompts in verl's layout; returns verl's options that name them."""
    options = {}
    for name, split, count in (("train_files", "train", rows), ("val_files", "test", 8)):
        file = folder / f"{split}.parquet"
        write_parquet(load_records(SPEC, split=split, limit=count), file, "digits")
        options[f"data.{name}"] = file
    return options


def main() -> None:
    """Train, and write the files."""
    parser = argparse.ArgumentParser(description="Trains inside verl on the CPU and keeps the curves.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("modes", nargs="*", default=list(MODES), choices=MODES)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for mode in arguments.modes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = write_data(folder, STEPS * PROMPTS)
            run = launch(folder / "run", mode, {**data, **TRAINING}, seconds=MOST_SECONDS)
            if run.status:
                raise SystemExit(run.log)
        kept = summary(run, mode, run.seconds)
        (arguments.folder / f"{mode}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        (arguments.folder / f"{mode}.svg").write_text(figure(kept, mode), encoding="utf-8")
        print(mode, kept["steps_1_5_and_16_20"])


if __name__ == "__main__":
    main()
