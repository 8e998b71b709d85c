"""A GRPOTrainer whose resumed run repeats the uninterrupted one exactly: data order, buffered rollouts, weights."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from cppo.errors import UserError, first_line
from cppo.files import reading
from cppo.probing import expect, failure
from cppo.training.dataset_checks import check_enough
from cppo.training.durable import DurableTrainer


class ResumableGRPOTrainer(DurableTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` with checkpoints that hold the place in the data and the rollouts still to be trained on."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        check_enough("train_dataset", len(sampler.data_source), self.args)
        self._train_sampler = sampler
        if failure(probe_sampler_order) is not None:
            return sampler
        # Same data, same arguments: only the order after a resume differs from TRL's.
        self._train_sampler = ResumableRepeatSampler(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )
        return self._train_sampler

    def save_progress(self, folder: Path) -> None:
        generate_every = self.args.steps_per_generation * self.num_iterations
        pending = self._buffered_inputs if self._step % generate_every else None
        epoch = math.floor(self.state.epoch or 0)
        RolloutState(self._step, epoch, pending).save(str(folder), self.accelerator.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = RolloutState.load(checkpoint, self.accelerator.process_index, self.accelerator.device)
        self._step, self._buffered_inputs = state.micro_step, state.buffered_inputs
        if not isinstance(self.train_dataset, IterableDataset):
            self._train_sampler.epoch = state.epoch


class ResumableRepeatSampler(RepeatSampler):
    """TRL's `RepeatSampler` whose order in epoch e depends on (seed, e) alone, as TRL's in an uninterrupted run.

    TRL's draws one permutation after another from one generator, so a run resumed in its second epoch would see the
    first epoch's order again. `epoch` counts the passes begun; set it before iterating to begin later.
    """

    epoch: int = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        self.epoch += 1
        return super().__iter__()


def probe_sampler_order() -> None:
    """Raise unless a sampler that is resumed in its second epoch gives the order of an uninterrupted one's."""
    given: dict[str, Any] = {"mini_repeat_count": 2, "batch_size": 2, "repeat_count": 2, "seed": 5}
    whole, resumed = RepeatSampler(range(6), **given), ResumableRepeatSampler(range(6), **given)
    epochs = [list(whole) for _ in range(2)]
    resumed.epoch = 1
    expect(list(resumed) == epochs[1] != epochs[0], "the order of a second epoch is not the one expected")


@dataclass(frozen=True)
class RolloutState:
    """What a checkpoint must hold beyond TRL's: the trainer's place in the data.

    Attributes:
        micro_step: micro-batches done, TRL's `_step`, which it restarts at 0.
        epoch: passes over the data begun before the current one.
        buffered_inputs: rollouts and views that are still to be trained on, one dictionary a micro-batch, or None
            where the next micro-batch generates anew.
    """

    micro_step: int
    epoch: int
    buffered_inputs: list[dict[str, Any]] | None

    def save(self, checkpoint: str, process_index: int) -> None:
        """Write to the checkpoint folder, one file a process; complete or not there at all."""
        path = _path(checkpoint, process_index)
        os.makedirs(checkpoint, exist_ok=True)
        torch.save(vars(self), path + ".part")
        os.replace(path + ".part", path)

    @classmethod
    def load(cls, checkpoint: str, process_index: int, device: torch.device) -> "RolloutState":
        """Read what `save` wrote, rollouts on `device`, views on the CPU.

        Raises:
            UserError: the file is not there or not readable.
        """
        path = _path(checkpoint, process_index)
        try:
            with reading(path):
                state = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: this checkpoint was not written by CPPOTrainer with as many processes as now; "
                "start anew from its weights with model=CHECKPOINT instead of resuming"
            ) from None
        except TypeError as error:
            raise UserError(f"{path} is no state of a run ({first_line(error)}): take an earlier checkpoint") from error
        if state.buffered_inputs is None:
            return state
        buffered = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            for batch in state.buffered_inputs
        ]
        return cls(state.micro_step, state.epoch, buffered)


def _path(checkpoint: str, process_index: int) -> str:
    return os.path.join(checkpoint, f"rollout_state_{process_index}.pt")
