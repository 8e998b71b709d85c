"""Signals of batch systems: a stopped run finishes its step and saves, so that it can resume."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.errors import Stopped, UserError, one_line, tell
from cppo.runs.recorder import RunRecorder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals of Slurm, Kubernetes and a closed terminal."""


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which any process got one of `STOP_SIGNALS`, with a checkpoint.

    Outside training, and before the first step, the run ends at once.

    Args:
        accelerator: the trainer's, through which the processes agree.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._training = False
        self._got = 0
        self.agreed = 0
        """The signal, of any process, that ended training; 0 without one."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the context; restore the former handlers afterwards."""
        before = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            raise Stopped(number)
        if not self._got:
            tell(f"{signal.Signals(number).name}: the run stops after this step and saves a checkpoint")
        self._got = self._got or number

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.agreed = self._got
        if self._accelerator.num_processes > 1:
            heard = torch.tensor([self._got], device=self._accelerator.device)
            self.agreed = int(self._accelerator.gather(heard).max())
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = False


def train_until_stopped(trainer: Trainer, stop: StopOnSignal, recorder: RunRecorder, checkpoint: Path | None) -> None:
    """Train to the end; write a last report if training breaks off.

    Args:
        stop: one of the trainer's callbacks, listening.
        recorder: another.
        checkpoint: the run resumes from it.

    Raises:
        Stopped: a signal ended training; its last step is saved.
        UserError: a library for an option is missing.
    """
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.agreed:
            raise Stopped(stop.agreed)
    except BaseException as error:
        recorder.stop(trainer.state)
        if isinstance(error, ImportError):  # only here do optimizers look for their libraries
            raise UserError(f"a library that an option needs is missing: {one_line(error)}") from error
        raise
