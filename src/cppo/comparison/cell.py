"""One process of a study: `python -m cppo.comparison.cell FOLDER` does the work in FOLDER/request.json.

It writes the result last, so a folder with a result is finished.
"""

import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback

import cppo
from cppo.comparison.finished import RESULT
from cppo.comparison.jobs import MODEL, REQUEST, write_json
from cppo.comparison.measure import Measurement
from cppo.data import PixelBounds, load_records
from cppo.errors import UserError, tell_mistake
from cppo.methods import DEFAULT_METHOD
from cppo.options import TrainOptions, schema
from cppo.parsing import parse_json
from cppo.recipes import Recipe, RunDirectory, dump_recipe
from cppo.reports.run_data import RunData, read_run
from cppo.reports.signs import run_warnings
from cppo.rewards import check_rewards, chosen_rewards, number_tolerance
from cppo.runs.prepare import build_trainer, prepare_run, resolved_config
from cppo.runs.recorder import RunRecorder
from cppo.runs.sources import load_sources
from cppo.training import VERSIONS_OF
from cppo.training.telemetry import peak_memory_mib
from cppo.training.trainer import CPPOTrainer
from cppo.views import view_sampler

LOGGED = ("reward", "rewards/", "perception/", "entropy", "kl", "completions/mean_length", "grad_norm", "time/")
"""Prefixes of the logged metrics in results."""


class PromptRecorder(CPPOTrainer):
    """A trainer that records which prompts it saw, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts_seen = hashlib.sha256()

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        for row in inputs:
            self.prompts_seen.update(f"{row['sample_id']}\n".encode())
        return super()._generate_and_score_completions(inputs)


class StepMeter(TrainerCallback):
    """Times each step without evaluations, and evaluates after the requested steps.

    Attributes:
        seconds, cpu_seconds: of each step; processor seconds exclude waiting for other processes.
        evaluations: results of `measure`, by step.
        evaluation_seconds: time of the evaluations.
        peak_mib: of the steps before the first evaluation, with model and libraries.
    """

    def __init__(self, steps: list[int], measure: Callable[[], dict[str, Any]]) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.evaluation_seconds = 0.0
        self.peak_mib = 0.0
        self._steps, self._measure = set(steps), measure
        self._since = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = _clocks()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = _clocks()
        self.seconds.append(round(now[0] - self._since[0], 4))
        self.cpu_seconds.append(round(now[1] - self._since[1], 4))
        if not self.evaluations:
            # On a GPU the second one, its own.
            self.peak_mib = list(peak_memory_mib(args.device).values())[-1]
        if state.global_step in self._steps:
            self.evaluate(state.global_step)
        self._since = _clocks()

    def evaluate(self, step: int) -> None:
        """Evaluate a step now."""
        began = time.monotonic()
        self.evaluations.append({"step": step, **self._measure()})
        self.evaluation_seconds += time.monotonic() - began


def run_folder(folder: Path) -> None:
    """Do the work of the folder's request and write the result. Raises UserError for an impossible request."""
    began = time.monotonic()
    request = parse_json((folder / REQUEST).read_text(encoding="utf-8"))
    values = request["recipe"]
    config = {**values["config"], "output_dir": str(folder)}
    recipe = Recipe(values["name"], "train", TrainOptions(**values["options"]), config)
    sources = load_sources(recipe)
    prepared = prepare_run(recipe, sources)
    trainer = build_trainer(prepared, sources, PromptRecorder)
    assert isinstance(trainer, PromptRecorder)
    model = trainer.accelerator.unwrap_model(trainer.model)
    evaluation = request["identity"].get("evaluation")
    measurement = measurement_of(evaluation, prepared.options) if evaluation else None
    meter = StepMeter(
        request["steps"], lambda: measurement.take(model, trainer.processing_class) if measurement else {}
    )
    options = resolved_config(recipe, prepared.args)
    if request["kind"] == "start":
        meter.evaluate(0)
    else:
        files = RunDirectory(folder)
        files.config.write_text(dump_recipe(recipe, options), encoding="utf-8")
        trainer.add_callback(RunRecorder(files, samples=tuple))
        trainer.add_callback(meter)
        trainer.train()
    if request.get("keep_model"):
        trainer.save_model(str(folder / MODEL))
    run = read_run(folder) if request["kind"] == "cell" else None
    result = {
        **{name: request[name] for name in ("kind", "task", "label", "seed") if name in request},
        "method": recipe.config["method"],
        "identity": request["identity"],
        "options": {name: value for name, value in {**values["options"], **options}.items() if name != "output_dir"},
        "evaluations": meter.evaluations,
        "training": training_means(run, request["steps"]) if run else {},
        "warnings": run_warnings(run) if run else [],
        "prompts": trainer.prompts_seen.hexdigest()[:16],
        "step_seconds": meter.seconds,
        "step_cpu_seconds": meter.cpu_seconds,
        "peak_mib": round(meter.peak_mib, 1),
        "seconds": round(time.monotonic() - began, 1),
        "evaluation_seconds": round(meter.evaluation_seconds, 1),
        "threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in VERSIONS_OF},
        "code": code_digest(),
    }
    write_json(folder / RESULT, result)


def training_means(run: RunData, steps: Sequence[int]) -> dict[str, list[float | None]]:
    """Means of the logged metrics over the steps from the previous one of `steps` (at first 0) up to each."""
    names = sorted({name for row in run.metrics for name in row if name.startswith(LOGGED)})
    means: dict[str, list[float | None]] = {}
    for name in names:
        points = run.series(name)
        means[name] = []
        for first, last in zip([0, *steps], steps, strict=False):
            values = [value for step, value in points if first < step <= last]
            means[name].append(float(f"{fmean(values):.5g}") if values else None)
    return means


def measurement_of(evaluation: Mapping[str, Any], options: TrainOptions) -> Measurement:
    """The evaluation of a request."""
    views = {**schema("train").defaults, **evaluation, "seed": 0}
    records = load_records(
        evaluation["eval_data"],
        split="test",
        limit=evaluation["eval_items"],
        columns=evaluation.get("columns"),
        max_bad_fraction=options.max_bad_fraction,
        pixels=PixelBounds.of(evaluation),
        prompt_suffix=evaluation.get("prompt_suffix"),
    )
    return Measurement(
        records=records,
        conditions=evaluation["conditions"],
        detector_items=evaluation["detector_items"],
        sampler=view_sampler(views),
        top_fraction=views["perception_top_fraction"],
        max_new_tokens=evaluation["max_completion_length"],
        system_prompt=evaluation.get("system_prompt"),
        # The task's rewards, not the method's own: all methods are judged by the same ones.
        tolerance=number_tolerance(check_rewards(chosen_rewards(evaluation.get("rewards"), DEFAULT_METHOD)[0], None)),
    )


def code_digest() -> str:
    """Identifies the code: a hash of the package's source."""
    digest = hashlib.sha256()
    root = Path(cppo.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def end_with_parent() -> None:
    """End this process when its parent closes its standard input or ends."""

    def wait() -> None:
        while os.read(0, 1):  # not through sys.stdin: its lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def main() -> int:
    """Returns the exit status: 0, or 2 after a user's mistake."""
    end_with_parent()
    try:
        run_folder(Path(sys.argv[1]))
    except UserError as error:
        tell_mistake(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
