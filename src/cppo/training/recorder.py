"""Writes a run's metrics and example responses while it trains, and shows its progress on one line."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.recipes import RunDirectory
from cppo.views import image_data_uri

SAMPLE_TIMES = 10
"""How often in a run example responses are written."""
PROGRESS_LINES = 20
"""How many progress lines a run prints where there is no terminal to draw a bar on."""
RL_SHOWN = {"reward": "reward", "rewards/accuracy_reward/mean": "accuracy", "perception/cpl": "cpl"}
SFT_SHOWN = {"loss": "loss", "mean_token_accuracy": "token accuracy"}


class RunRecorder(TrainerCallback):
    """Appends to `metrics.jsonl` one JSON object a logged step, and to `samples.jsonl` examples from `samples()`.

    Only the main process writes. It takes the place of the Trainer's own progress and printing callbacks.
    """

    def __init__(self, files: RunDirectory, samples: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._files = files
        self._samples = samples
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", leave=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        append_json_lines(self._files.metrics, [{"step": state.global_step, **_numbers(logs)}])
        step, last = state.global_step, state.max_steps
        if any(name.startswith("eval_") for name in logs):
            if not args.disable_tqdm:
                shown = progress_text({name.removeprefix("eval_"): value for name, value in logs.items()})
                tqdm.write(f"step {step}/{last}  evaluation: {progress_line(shown)}", file=sys.stderr)
            return
        if is_milestone(step, last, SAMPLE_TIMES):
            append_json_lines(
                self._files.samples, [sample_record(sample) for sample in self._samples() if sample["step"] == step]
            )
        shown = progress_text(logs)
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif not args.disable_tqdm and is_milestone(step, last, PROGRESS_LINES):
            print(f"step {step}/{last}  {progress_line(shown)}", file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_text(logs: Mapping[str, Any]) -> dict[str, str]:
    """What the progress line shows of a step: an RL step's rewards, else the loss (which says little of an RL step)."""
    names = RL_SHOWN if "reward" in logs else SFT_SHOWN
    return {label: f"{logs[name]:.3f}" for name, label in names.items() if isinstance(logs.get(name), float)}


def progress_line(shown: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def is_milestone(step: int, last: int, times: int) -> bool:
    """Whether `step` is the first, the last, or one of about `times` evenly spaced steps up to `last`."""
    return step in (1, last) or step % max(1, last // times) == 0


def sample_record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """An example response of `CPPOTrainer.last_samples` as JSON values; images become small data URIs."""
    return {
        "step": sample["step"],
        "prompt": prompt_text(sample["prompt"]),
        "images": [image_data_uri(image) for image in sample["images"] or []],
        "answer": sample["answer"],
        "reward": _number(sample["reward"]),
        "completion_tokens": list(sample["completion_tokens"]),
        "perception": [bool(selected) for selected in sample["perception"]],
        "score": [_number(round(score, 5)) for score in sample["score"]],
    }


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt's last message: the question without system prompt and placeholders."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def append_json_lines(file: Any, records: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in logs.items() if value is None or isinstance(value, (int, float))}


def _number(value: float | None) -> float | None:
    """JSON knows no NaN or infinity."""
    return None if value is None or not math.isfinite(value) else value
