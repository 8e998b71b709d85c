"""Three generation batches through the real trainer, with measured memory and time."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from cppo.data import RecordSource, to_dataset
from cppo.errors import UserError
from cppo.policy import unwrapped
from cppo.runs.prepare import PreparedRun, build_trainer
from cppo.runs.sources import RunSources
from cppo.training.trainer import CPPOTrainer

POLL_SECONDS = 0.005
_OUT_OF_MEMORY = {
    "rollout": "out of memory during generation: lower per_device_train_batch_size with steps_per_generation, "
    "max_completion_length, or max_pixels",
    "update": "out of memory in the update: lower per_device_train_batch_size (and raise "
    "gradient_accumulation_steps), set perception_memory = sequential, or lower max_pixels",
}


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one process for the whole run.

    Attributes:
        libraries: in use before the model was loaded (0 on a GPU).
        weights: of the policy, and of the reference model if there is one.
        gradients: one number for each trained weight.
        optimizer: its state after a step.
    """

    libraries: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def kept(self) -> int:
        """Bytes without the gradients, which come and go with the updates."""
        return self.libraries + self.weights + self.optimizer


@dataclass(frozen=True)
class BatchNeeds:
    """Needs of one generation batch beside `MemoryParts`; rollouts and updates alternate.

    Attributes:
        rollout: peak bytes of generation and rewards.
        update: peak bytes of scoring, views and the backward pass.
        step_seconds: of an optimizer step, with its share of the rollouts.
    """

    rollout: int
    update: int
    step_seconds: float

    def peak(self, memory: MemoryParts) -> int:
        """Peak bytes at any time."""
        return memory.kept + max(self.rollout, memory.gradients + self.update)


class PeakMemory:
    """Peak since the last `reset`, in bytes: PyTorch's allocations on a GPU, or the process's resident memory on a CPU.

    On a CPU a thread reads resident memory every few milliseconds: it can miss a shorter peak, and counts freed memory
    that the allocator keeps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._process = psutil.Process()
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU's."""
        return self._device is not None

    def __enter__(self) -> "PeakMemory":
        self.reset()
        if self._device is None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def reset(self) -> None:
        """Begin again from the memory now in use."""
        self._peak = 0
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> int:
        """The peak since the last reset."""
        if self._device is not None:
            return torch.cuda.max_memory_allocated(self._device)
        return max(self._peak, self._process.memory_info().rss)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)


class _StepClock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


class Rehearsal(CPPOTrainer):
    """The trainer for three generation batches: a warm-up, one with the model's answers, and the worst case.

    In the worst case every response has full length and every second one is rewarded: an untrained model may earn
    nothing, and then no rollout would be scored under the views.
    """

    memory: PeakMemory

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.phase = "rollout"
        self.prompt_tokens = self.image_tokens = 0  # of the longest prompt, and of its images
        self.rollout_peaks: list[int] = []
        self.update_peaks: list[int] = []
        self.clock = _StepClock()
        self.add_callback(self.clock)

    @property
    def _at_worst(self) -> bool:
        return len(self.rollout_peaks) == 2

    def end_batch(self) -> None:
        """Note the needs of the updates on the batch that ends here."""
        self.update_peaks.append(self.memory.read())
        self.memory.reset()

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs).clone()
        if self._at_worst:
            self._rewards[:] = (torch.arange(len(self._rewards), device=self._rewards.device) % 2)[:, None]
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.rollout_peaks:
            self.end_batch()
        self.phase = "rollout"
        if self._at_worst:
            self._write_full_length()
        output = super()._generate_and_score_completions(inputs)
        self.prompt_tokens = int(output["prompt_mask"].sum(dim=1).max())
        of_images = torch.isin(output["prompt_ids"].cpu(), torch.tensor(self._placeholder_ids))
        self.image_tokens = int(of_images.sum(dim=1).max())
        self.rollout_peaks.append(self.memory.read())
        self.memory.reset()
        self.phase = "update"
        return output

    def _write_full_length(self) -> None:
        length = self.max_completion_length
        if self.use_vllm:
            generator = self.vllm_generation
            generator.generation_kwargs = {**(generator.generation_kwargs or {}), "min_tokens": length}
        else:
            self.generation_config.min_new_tokens = length
            self.generation_kwargs["min_new_tokens"] = length


@dataclass(frozen=True)
class Rehearsed:
    """A trainer after its three generation batches.

    Attributes:
        steps: optimizer steps of the whole run.
        on_gpu: whether memory is a GPU's.
        as_answered, at_worst: needs of the second and the third batch.
    """

    trainer: Rehearsal
    steps: int
    on_gpu: bool
    memory: MemoryParts
    as_answered: BatchNeeds
    at_worst: BatchNeeds


def train_briefly(prepared: PreparedRun, sources: RunSources, rows: RecordSource, steps_per_batch: int) -> Rehearsed:
    """Train three generation batches of `steps_per_batch` optimizer steps on `rows`.

    Raises UserError, which names the phase, if a batch does not fit into memory.
    """
    args = prepared.args
    memory = PeakMemory(args.device)
    with memory:
        libraries = 0 if memory.on_gpu else memory.read()
        trainer = build_trainer(prepared, sources, trainer_class=Rehearsal)
        assert isinstance(trainer, Rehearsal)
        trainer.memory = memory
        steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        trainer.train_dataset = to_dataset(rows, system_prompt=prepared.options.system_prompt)
        args.max_steps, args.data_stages = 3 * steps_per_batch, 1
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise UserError(_OUT_OF_MEMORY[trainer.phase]) from error
        trainer.end_batch()
    parts = memory_parts(trainer, libraries)
    as_answered, at_worst = (
        BatchNeeds(
            rollout=max(trainer.rollout_peaks[number] - parts.kept, 0),
            update=max(trainer.update_peaks[number] - parts.kept - parts.gradients, 0),
            step_seconds=sum(trainer.clock.seconds[number * steps_per_batch :][:steps_per_batch]) / steps_per_batch,
        )
        for number in (1, 2)
    )
    return Rehearsed(trainer, steps, memory.on_gpu, parts, as_answered, at_worst)


def memory_parts(trainer: CPPOTrainer, libraries: int) -> MemoryParts:
    """Lasting memory of this process after a step of `trainer`; `libraries` bytes were in use before the model."""
    assert trainer.optimizer is not None
    policy = unwrapped(trainer.model)
    return MemoryParts(
        libraries=libraries,
        weights=_bytes(policy.parameters()) + _bytes(trainer.ref_model.parameters() if trainer.ref_model else ()),
        gradients=_bytes(one for one in policy.parameters() if one.requires_grad),
        optimizer=_bytes(value for group in trainer.optimizer.state.values() for value in group.values()),
    )


def _bytes(tensors: Iterable[Any]) -> int:
    """Bytes of this process's part of the tensors among `tensors`."""
    mine = (one.to_local() if isinstance(one, DTensor) else one for one in tensors)
    return sum(one.numel() * one.element_size() for one in mine if isinstance(one, Tensor))
