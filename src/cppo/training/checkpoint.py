"""Checkpoints of GRPO runs, with rollouts and the place in the data: a resume repeats the uninterrupted run exactly."""

import math
import os
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from trl import GRPOTrainer

from cppo.errors import UserError, first_line
from cppo.files import reading, replace_text
from cppo.probing import failure
from cppo.reports.model_card import CITATION, RunFacts, TrainedModel, base_name, changed_options, model_card
from cppo.training import package_versions
from cppo.training.baseline import PromptBaseline
from cppo.training.config import CPPOConfig, check_enough
from cppo.training.durable import DurableTrainer
from cppo.training.stages import StagedSampler, check_stages, staged_sampler
from cppo.trl_surface import RepeatSampler, micro_step, pass_over, probe_sampler_order, set_buffer, unfinished_rollouts


class ResumableGRPOTrainer(DurableTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` with checkpoints that also hold the data position and the rollouts still to be trained on.

    It saves a model card with every model.

    Attributes:
        run_facts: facts of a run from a recipe that the trainer does not know; the run sets them.
        baseline: the prompts' baselines, if any.
    """

    args: CPPOConfig
    processing_class: Any
    chat_template_kwargs: dict[str, Any]
    num_generations: int
    fallbacks: list[str]
    run_facts: RunFacts | None = None
    baseline: PromptBaseline | None = None
    _buffered_inputs: Any
    _train_sampler: RepeatSampler
    _stages: StagedSampler | None = None

    @property
    def _epoch(self) -> int:
        return math.floor(self.state.epoch or 0)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = cast(RepeatSampler, super()._get_train_sampler(dataset))
        rows, stages = len(self._train_sampler.data_source), self.args.data_stages
        check_enough("train_dataset", rows, self.args)
        self._stages = None
        if stages == 1:
            return self._train_sampler
        check_stages("train_dataset", rows, self.args, stages)
        self._stages = staged_sampler(self._train_sampler, self.args, stages)
        return self._stages

    def save_progress(self, folder: Path) -> None:
        baseline = None if self.baseline is None else self.baseline.state()
        state = RolloutState(micro_step(self), self._epoch, unfinished_rollouts(self), baseline)
        state.save(str(folder), self.accelerator.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = RolloutState.load(checkpoint, self.accelerator.process_index, self.accelerator.device)
        set_buffer(self, state.buffered_inputs, state.micro_step)
        if self.baseline is not None:
            if state.baseline is None:
                raise UserError(
                    f"resume_from_checkpoint: {checkpoint} has no baselines of prompts: resume with "
                    "advantage_baseline = 'group' as it was, or start a new run from its weights"
                )
            self.baseline.restore(state.baseline)
        if self._stages is not None:
            self._stages.passes = state.epoch
        elif not isinstance(self.train_dataset, IterableDataset) and failure(probe_sampler_order) is None:
            pass_over(self._train_sampler, state.epoch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # A checkpoint has no card, but PEFT writes one there, and TRL then asks for the card of the whole run.
        if not _internal_call or is_peft_model(self.model):
            self._write_card(output_dir or str(self.args.output_dir))

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        datasets = [] if dataset_name is None else [dataset_name]
        self._write_card(str(self.args.output_dir), model_name, datasets, [tags] if isinstance(tags, str) else tags)

    def _write_card(
        self, folder: str, name: str | None = None, datasets: Sequence[str] = (), tags: Sequence[str] | None = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        args, rows = self.args, self.train_dataset
        trained = TrainedModel(
            base=base_name(self.accelerator.unwrap_model(self.model).config.name_or_path or "unknown"),
            is_adapter=is_peft_model(self.model),
            steps=self.state.global_step,
            log_history=self.state.log_history,
            train_rows=len(rows) if isinstance(rows, Sized) else None,
            method=args.method,
            loss_type=args.loss_type,
            max_completion_length=args.max_completion_length,
            changed_options=changed_options(args),
            citation=CITATION if args.perception_sink == "contrast" else None,
            versions=package_versions(),
            fallbacks=self.fallbacks,
        )
        name = name or (args.hub_model_id or str(Path(folder).resolve())).split("/")[-1]
        replace_text(Path(folder, "README.md"), model_card(trained, self.run_facts, name, datasets, tags or []))


@dataclass(frozen=True)
class RolloutState:
    """The state of a checkpoint that TRL does not save: the trainer's position in the data.

    Attributes:
        micro_step: micro-batches done; TRL's `_step`, which TRL restarts at 0.
        epoch: passes over the data begun before the current one.
        buffered_inputs: rollouts and views still to be trained on, one dictionary per micro-batch, or None where the
            next micro-batch generates new ones.
        baseline: of the prompts (`PromptBaseline.state`), if any.
    """

    micro_step: int
    epoch: int
    buffered_inputs: list[dict[str, Any]] | None
    baseline: dict[str, Any] | None = None

    def save(self, checkpoint: str, process_index: int) -> None:
        """Write one file per process to the checkpoint folder; each is complete or absent."""
        path = _path(checkpoint, process_index)
        os.makedirs(checkpoint, exist_ok=True)
        torch.save(vars(self), path + ".part")
        os.replace(path + ".part", path)

    @classmethod
    def load(cls, checkpoint: str, process_index: int, device: torch.device) -> "RolloutState":
        """Read what `save` wrote, rollouts on `device`, views on the CPU.

        Raises:
            UserError: the file is missing or cannot be read.
        """
        path = _path(checkpoint, process_index)
        try:
            with reading(path):
                state = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: this checkpoint is not from a CPPOTrainer with the current number of processes; "
                "start a new run from its weights with model=CHECKPOINT instead of resuming"
            ) from None
        except TypeError as error:
            raise UserError(
                f"{path} is not the state of a run ({first_line(error)}): use an earlier checkpoint"
            ) from error
        if state.buffered_inputs is None:
            return state
        buffered = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            for batch in state.buffered_inputs
        ]
        return replace(state, buffered_inputs=buffered)


def _path(checkpoint: str, process_index: int) -> str:
    return os.path.join(checkpoint, f"rollout_state_{process_index}.pt")
