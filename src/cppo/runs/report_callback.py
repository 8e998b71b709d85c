"""The step lines and the growing report of `cppo train`, for a trainer in a script."""

from dataclasses import fields
from typing import Any

import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from cppo.files import replace_text
from cppo.policy import unwrapped
from cppo.progress import say
from cppo.recipes import RunDirectory
from cppo.reports import tell_warnings, write_report
from cppo.reports.model_card import base_name, changed_options
from cppo.runs.recorder import RunRecorder
from cppo.training import package_versions
from cppo.training.trainer import CPPOTrainer

HEADER = "# Options of a CPPOTrainer in a script\n"


class ReportCallback(RunRecorder):
    """Prints short step lines, and writes `report.html` in `output_dir` while a trainer trains.

        trainer = CPPOTrainer("micro", ["accuracy", "format"], args, dataset)
        trainer.add_callback(ReportCallback(trainer))
        trainer.train()

    It replaces the Trainer's own printing. `cppo report` reads the folder too.

    Args:
        trainer: its steps are recorded.
        quiet: no bar and no samples on a terminal, only plain lines.
    """

    def __init__(self, trainer: CPPOTrainer, *, quiet: bool = False) -> None:
        self._of = trainer
        super().__init__(
            RunDirectory(str(trainer.args.output_dir)),
            lambda: trainer.last_samples,
            quiet=quiet,
            versions=package_versions(),
            fallbacks=trainer.fallbacks,
            report=write_report,
            form_warning=lambda: trainer.form_watch.warning,
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._files.path.mkdir(parents=True, exist_ok=True)
            self._files.forget(after=state.global_step)
            replace_text(self._files.config, HEADER + yaml.safe_dump(self._options(), sort_keys=False))
        super().on_train_begin(args, state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_end(args, state, control)
        if state.is_world_process_zero:
            self._write_report(state, refresh=None)
            tell_warnings(self._files.path)
            say(f"report     {self._files.report}")

    def _options(self) -> dict[str, Any]:
        """Options in the report: CPPO's own, and TRL's that are not the defaults."""
        args = self._of.args
        inherited = {field.name for field in fields(GRPOConfig)}
        own = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in inherited}
        plain = {name: value for name, value in own.items() if isinstance(value, bool | int | float | str | list)}
        length = {"max_completion_length": args.max_completion_length}
        return {
            "model": base_name(str(unwrapped(self._of.model).config.name_or_path)),
            **changed_options(args),
            **length,
            **plain,
        }
