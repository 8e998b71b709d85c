"""Write a run's metrics, example responses and report during training, and show its progress."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.data import question_text
from cppo.errors import UserError
from cppo.files import replace_text, writing
from cppo.recipes import RunDirectory
from cppo.runs.progress import Milestones, TrainProgress
from cppo.views import image_data_uri

SAMPLE_TIMES = 10
"""Number of times in a run that example responses are written."""
REPORT_SECONDS = 10
"""Seconds between two reports, unless writing one takes more than a fiftieth of this."""
REPORT_SHARE = 50


class RunRecorder(TrainerCallback):
    """Keeps a run's files up to date: `metrics.jsonl`, `samples.jsonl`, `progress.json` and the report.

    `metrics.jsonl` gets one JSON object a logged step, `samples.jsonl` examples from `samples()`. Only the main process
    writes. It replaces the Trainer's own progress and printing callbacks.

    Args:
        quiet: no bar and no samples on a terminal.
        versions, fallbacks: of the packages and `CPPOTrainer.fallbacks`, for the report of an unfinished run.
        form_warning: the run's warning about the form of its responses, if any, for the report.
        report: writes it, as `cppo.reports.write_report`.
        now: seconds of a clock.
    """

    def __init__(
        self,
        files: RunDirectory,
        samples: Callable[[], Sequence[Mapping[str, Any]]],
        *,
        quiet: bool = False,
        versions: Mapping[str, str] | None = None,
        fallbacks: Sequence[str] = (),
        report: Callable[..., object] | None = None,
        form_warning: Callable[[], str | None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._samples = samples
        self._progress = TrainProgress(quiet=quiet)
        self._versions = dict(versions or {})
        self._fallbacks = fallbacks
        self._report = report
        self._form_warning = form_warning
        self._now = now
        self._began, self._from_step, self._report_due = 0.0, 0, 0.0
        self._writes = False
        self._sample_steps = Milestones(SAMPLE_TIMES)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._writes = state.is_world_process_zero
        self._began, self._from_step = self._now(), state.global_step
        if self._writes and not args.disable_tqdm:
            self._progress.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.advance(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not self._writes or not logs or "train_runtime" in logs:
            return
        append_json_lines(self._files.metrics, [{"step": state.global_step, **_numbers(logs)}])
        step, last = state.global_step, state.max_steps
        if any(name.startswith("eval_") for name in logs):
            if not args.disable_tqdm:
                self._progress.show_evaluation(step, last, logs)
            return
        if not args.disable_tqdm:
            self._progress.show(step, last, logs)
        if self._sample_steps.reached(step, last):
            samples = [sample_record(sample) for sample in self._samples() if sample["step"] == step]
            append_json_lines(self._files.samples, samples)
            self._progress.samples(samples)
        if self._now() >= self._report_due:
            self._write_report(state, refresh=REPORT_SECONDS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.end()
        if self._writes:
            self._write_report(state, refresh=REPORT_SECONDS)

    def stop(self, state: TrainerState) -> None:
        """Write a final report when training breaks off."""
        self._progress.end()
        if self._writes:
            with suppress(UserError):  # the run may have ended because nothing can be written
                self._write_report(state, refresh=None)

    def _write_report(self, state: TrainerState, *, refresh: int | None) -> None:
        began = self._now()
        content = {
            "step": state.global_step,
            "last_step": state.max_steps,
            "from_step": self._from_step,
            "seconds": round(began - self._began, 1),
            "versions": self._versions,
            **({"form_warning": warning} if (warning := self._form_warning()) else {}),
            "fallbacks": list(self._fallbacks),
        }
        replace_text(self._files.progress, json.dumps(content, indent=2) + "\n")
        if self._report is not None:
            self._report(self._files.path, refresh=refresh)
        ended = self._now()
        self._report_due = ended + max(REPORT_SECONDS, REPORT_SHARE * (ended - began))


def sample_record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """An example response of `CPPOTrainer.last_samples` as JSON values; images become small data URIs."""
    return {
        "step": sample["step"],
        "prompt": question_text(sample["prompt"]),
        "images": [image_data_uri(image) for image in sample["images"] or []],
        "answer": sample["answer"],
        "reward": _number(sample["reward"]),
        "completion_tokens": list(sample["completion_tokens"]),
        "perception": [bool(selected) for selected in sample["perception"]],
        "score": [_number(round(score, 5)) for score in sample["score"]],
    }


def append_json_lines(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records to a file, one JSON object a line. Raises UserError if the file cannot be written."""
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in logs.items() if value is None or isinstance(value, (int, float))}


def _number(value: float | None) -> float | None:
    """The value for JSON, which has no NaN or infinity."""
    return None if value is None or not math.isfinite(value) else value
