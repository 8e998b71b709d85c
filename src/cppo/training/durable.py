"""Durable runs: complete checkpoints, finite steps, and a resume with the options that are given."""

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from cppo.checkpoints import (
    PLAIN,
    begin_manifest,
    check_processes,
    check_resumable,
    check_weights_written,
    newest_whole,
    write_manifest,
)
from cppo.errors import UserError, first_line, tell
from cppo.files import reading, writing
from cppo.policy.loading import check_adapter, load_weights
from cppo.trl_surface import run_folder, without_trls_warnings

OPTIMIZER_OPTIONS = ("weight_decay", "betas", "eps")
"""Values of a parameter group that come from the options, beside the learning rate."""


class DurableTrainer(Trainer):
    """A `transformers.Trainer` with durable runs; a mixin before one of TRL's trainers.

    A checkpoint gets its manifest last; older checkpoints are removed after that. A step with a gradient that is not
    finite is not applied. A resume at the last step trains no further.

    Attributes:
        rows: the digest of the training rows, for checkpoints, where a run sets it.
        code: the files of the user's own functions -> fingerprint, likewise.
    """

    model: Any  # never None: TRL builds it, of transformers or of PEFT
    optimizer: torch.optim.Optimizer  # asked for only in training
    rows: str | None = None
    code: Mapping[str, str] | None = None
    _nonfinite_in_row = 0
    _losses: tuple[torch.Tensor, ...] = ()

    @property
    def nonfinite_limit(self) -> int:
        """Number of steps in a row that are skipped for a non-finite gradient before the run ends."""
        return 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """`Trainer.train`, from a complete checkpoint. Raises UserError where there is none to resume from."""
        if resume_from_checkpoint:
            resume_from_checkpoint = str(self._whole_checkpoint(resume_from_checkpoint))
        with without_trls_warnings():
            return super().train(resume_from_checkpoint, *args, **options)

    def _whole_checkpoint(self, resume: str | bool) -> Path:
        if resume is True:
            found = newest_whole(Path(str(self.args.output_dir)), passed_over=tell)
            if found is None:
                raise UserError(f"resume_from_checkpoint: {self.args.output_dir} holds no complete checkpoint")
            return found
        folder = Path(str(resume))
        check_resumable(folder)
        self.check_launched_alike(folder)
        return folder

    def check_launched_alike(self, checkpoint: Path) -> None:
        """Refuse a checkpoint from another number of processes, or with weights in another layout. Raises UserError."""
        check_processes(checkpoint, self.accelerator.num_processes)
        how = "by DeepSpeed" if self.is_deepspeed_enabled else PLAIN
        if self.is_fsdp_enabled:
            whole = self.accelerator.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT
            how = "whole by FSDP" if whole else "sharded by FSDP"
        check_weights_written(checkpoint, how)

    # Checkpoints

    def save_progress(self, folder: Path) -> None:
        """Write the files of a resume that the Trainer does not write."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        kind = None if plugin is None else plugin.state_dict_type
        with ExitStack() as cleanup:
            cleanup.enter_context(writing(Path(output_dir or str(self.args.output_dir))))
            if plugin is not None and not _internal_call:
                # A checkpoint may be sharded; transformers would then write no model.
                plugin.set_state_dict_type("FULL_STATE_DICT")
                cleanup.callback(plugin.set_state_dict_type, kind)
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = run_folder(self, trial)
        folder = Path(run) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing(folder):
                if self.args.should_save:
                    begin_manifest(folder)
                self.accelerator.wait_for_everyone()
                self.save_progress(folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(folder, self.accelerator.num_processes, self.rows, self.code)
        except UserError as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"{error}; earlier checkpoints are kept; make room, then resume") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(run, limit, self.state.best_model_checkpoint)

    # Steps

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*args, **options)
        self._losses = (*self._losses, loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses = self._losses, ()
        if self.accelerator.scaler is not None:  # float16: the scaler skips such steps and lowers its scale
            return norm
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(value):
            self._nonfinite_in_row = 0
            return norm
        self._nonfinite_in_row += 1
        step, cause = self.state.global_step + 1, self._cause(losses)
        if self._nonfinite_in_row > self.nonfinite_limit:
            before = f" after {self.nonfinite_limit} skipped steps" if self.nonfinite_limit else ""
            raise UserError(
                f"step {step}: the gradient's norm is {value}{before}: {cause}. The step is not applied, so weights "
                "and checkpoints are those before it. Check this step's rewards and images, or lower learning_rate"
            )
        tell(f"step {step} is skipped: the gradient's norm is {value}: {cause}")
        model.zero_grad()
        return norm

    def _cause(self, losses: tuple[torch.Tensor, ...]) -> str:
        """Where a gradient stopped being finite, judged by the losses of all processes' micro-batches."""
        own = torch.stack(losses).float()
        by_rank = self.accelerator.gather(own[None]).tolist()
        for rank, values in enumerate(by_rank):
            for number, value in enumerate(values, start=1):
                if not math.isfinite(value):
                    where = f" of process {rank}" if len(by_rank) > 1 else ""
                    return f"the loss of micro-batch {number} of {len(values)}{where} is {value}"
        return "all losses are finite, so it comes from the backward pass"

    def _run_epoch(self, *args: Any, **place: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **place)

    # Resume

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        given = [dict(group) for group in self.optimizer.param_groups]
        base_lrs = list(getattr(self.lr_scheduler, "base_lrs", ()))
        checkpointed = checkpoint is not None and not self.is_deepspeed_enabled
        try:
            with reading(f"resume_from_checkpoint: the optimizer or scheduler in {checkpoint}"):
                super()._load_optimizer_and_scheduler(checkpoint)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"resume_from_checkpoint: the optimizer of {checkpoint} has other weights than this run trains: "
                "resume with the options that selected them"
            ) from error
        if checkpointed:
            self.state.compute_steps(self.args, self.state.max_steps)
            self._take_given(given, base_lrs)

    def _take_given(self, given: list[dict[str, Any]], base_lrs: list[Any]) -> None:
        """Replace the checkpoint's learning rate and optimizer constants by the options' values."""
        for group, own in zip(self.optimizer.param_groups, given, strict=True):
            group.update({name: own[name] for name in OPTIMIZER_OPTIONS if name in own})
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            groups = zip(self.optimizer.param_groups, given, strict=True)
            if any(group.get("initial_lr") != own.get("initial_lr") for group, own in groups):
                raise UserError(f"learning_rate cannot change on a resume with {self.args.lr_scheduler_type}")
            return
        scheduler.base_lrs = base_lrs
        for group, base, factor in zip(self.optimizer.param_groups, base_lrs, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = base
            group["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"resume_from_checkpoint: the random number generators' state in {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            if not self._load_weights(resume_from_checkpoint):
                with reading(f"resume_from_checkpoint: the weights in {resume_from_checkpoint}"):
                    super()._load_from_checkpoint(resume_from_checkpoint, model)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"resume_from_checkpoint: the weights in {resume_from_checkpoint} cannot be loaded: {first_line(error)}"
            ) from error
        if is_peft_model(self.model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_adapter(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        with reading(f"load_best_model_at_end: the weights in {best}"):
            if not self._load_weights(best):
                super()._load_best_model()

    def _load_weights(self, checkpoint: str) -> bool:
        """Load a full model's weights; False for adapters and sharded checkpoints, which keep the model's names."""
        if is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return load_weights(self.model, checkpoint)
