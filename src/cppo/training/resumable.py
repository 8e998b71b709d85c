"""A GRPOTrainer whose resumed run repeats the uninterrupted one exactly: data order, buffered rollouts, weights."""

import math
from typing import Any

from accelerate.utils import is_peft_model
from datasets import IterableDataset
from trl import GRPOTrainer

from cppo.training.rollout_state import RolloutState, load_weights
from cppo.training.sampler import ResumableRepeatSampler
from cppo.training.setup import check_enough


class ResumableGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with checkpoints that hold the place in the data and the rollouts still to be trained on."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        check_enough("train_dataset", len(sampler.data_source), self.args)
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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Written before TRL's files: a checkpoint whose trainer_state.json is there is complete.
        folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
        generate_every = self.args.steps_per_generation * self.num_iterations
        pending = self._buffered_inputs if self._step % generate_every else None
        epoch = math.floor(self.state.epoch or 0)
        RolloutState(self._step, epoch, pending).save(folder, self.accelerator.process_index)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = RolloutState.load(checkpoint, self.accelerator.process_index, self.accelerator.device)
        self._step, self._buffered_inputs = state.micro_step, state.buffered_inputs
        if not isinstance(self.train_dataset, IterableDataset):
            self._train_sampler.epoch = state.epoch

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_weights(self, checkpoint: str) -> bool:
        """Load a whole model's weights; False for adapters and sharded checkpoints, which keep the model's names."""
        if is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return load_weights(self.model, checkpoint)
