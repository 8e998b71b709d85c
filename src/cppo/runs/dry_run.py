"""`cppo train --dry_run`: the whole run set up, three generation batches trained, the plan told, nothing kept.

Memory and time are measured, not modelled: the longest prompts go through the real trainer on this machine.
"""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from cppo.data import RecordSource, to_dataset
from cppo.errors import UserError
from cppo.evaluation import load_processor, prompt_lengths
from cppo.policy import unwrapped
from cppo.recipes import Recipe, TrainOptions
from cppo.runs.loggers import check_loggers
from cppo.runs.peak_memory import PeakMemory
from cppo.runs.run import PreparedRun, build_config, build_trainer, prepare_run
from cppo.runs.sources import RunSources
from cppo.training.trainer import CPPOTrainer

PROBED_ROWS = 256
"""Rows whose prompts are counted, evenly spread over the data."""

_OUT_OF_MEMORY = {
    "rollout": "out of memory while it generated responses: lower per_device_train_batch_size with "
    "steps_per_generation, max_completion_length, or max_pixels",
    "update": "out of memory in the update: lower per_device_train_batch_size (and raise "
    "gradient_accumulation_steps), set perception_memory = sequential, or lower max_pixels",
}


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one process that stay for the whole run.

    Attributes:
        libraries: in use before the model was loaded (0 on a GPU).
        weights: of the policy, and of the reference model where there is one.
        gradients: one number for each trained weight.
        optimizer: its state after a step.
    """

    libraries: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class BatchNeeds:
    """What one generation batch needed beside `MemoryParts`; rollouts and updates follow one another.

    Attributes:
        rollout: bytes, the most that generation and rewards took.
        update: bytes, the most that scoring, views and the backward pass took.
        step_seconds: of an optimizer step, its share of the rollouts included.
    """

    rollout: int
    update: int
    step_seconds: float

    def peak(self, memory: MemoryParts) -> int:
        """Bytes at the most at any time."""
        kept = memory.libraries + memory.weights + memory.optimizer
        return kept + max(self.rollout, memory.gradients + self.update)


@dataclass(frozen=True)
class Plan:
    """What a run would do, and what its first steps needed.

    Attributes:
        rows: trained on; `skipped_rows` were bad, `long_rows` too long.
        held_out_rows: of the final evaluation.
        prompts, generations: of a generation batch of all processes: prompts, and rollouts of each.
        steps: optimizer steps of the run; `generation_steps` of them share a generation batch.
        epochs: passes over the rows.
        prompt_tokens: mean and largest of `probed_rows` rows, images included.
        response_tokens: the longest response.
        trained_weights, all_weights: numbers, of the policy.
        dtype, device: of the policy's weights.
        processes: that train together.
        loss_type: of the policy loss, as TRL names it.
        rewards: names and weights.
        memory: what stays.
        as_answered: of the longest of the probed prompts, as the model answers them now.
        at_worst: of the same with every response of full length and every second one rewarded.
    """

    rows: int
    skipped_rows: int
    long_rows: int
    held_out_rows: int
    prompts: int
    generations: int
    steps: int
    generation_steps: int
    epochs: float
    probed_rows: int
    prompt_tokens: tuple[float, int]
    response_tokens: int
    trained_weights: int
    all_weights: int
    dtype: str
    device: str
    processes: int
    loss_type: str
    rewards: dict[str, float]
    memory: MemoryParts
    as_answered: BatchNeeds
    at_worst: BatchNeeds


class _StepClock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


class _Rehearsal(CPPOTrainer):
    """The trainer for three generation batches: one to warm up, one as the model answers, and the worst there can be.

    In the worst every response has full length and every second one is rewarded: an untrained model may earn nothing,
    and then no rollout would be scored under the views.
    """

    memory: PeakMemory

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.phase = "rollout"
        self.rollout_peaks: list[int] = []
        self.update_peaks: list[int] = []

    @property
    def _at_worst(self) -> bool:
        return len(self.rollout_peaks) == 2

    def end_batch(self) -> None:
        """Note what the updates on the batch that ends here needed."""
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


def rehearse(recipe: Recipe, sources: RunSources) -> Plan | None:
    """Check a recipe with its data and model by training three generation batches; None but on the main process.

    Nothing is written but a temporary folder that is removed, and no logger is called.

    Raises:
        UserError: as `cppo.runs.run.run_training`; or a batch does not fit into memory, naming the phase.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "eval_strategy": "no"}
        check_loggers(build_config(recipe))
        prepared = prepare_run(replace(recipe, config={**recipe.config, **quiet}), sources)
        return _train_briefly(prepared, sources)


def _train_briefly(prepared: PreparedRun, sources: RunSources) -> Plan | None:
    args, options, train = prepared.args, prepared.options, prepared.train
    generations, response_tokens = args.num_generations, args.max_completion_length
    batch_size, micro_batches = args.generation_batch_size, args.steps_per_generation
    assert generations is not None
    assert response_tokens is not None
    assert batch_size is not None
    assert micro_batches is not None
    steps_per_batch = max(1, micro_batches * args.num_iterations // args.gradient_accumulation_steps)
    prompts = batch_size // generations
    probed, lengths = probe_rows(train, options)
    longest = sorted(range(len(probed)), key=lambda index: -lengths[index])
    # Fewer rows than a generation batch has prompts were probed: the longest are repeated.
    batch = train.keep([probed[longest[index % len(longest)]] for index in range(prompts)])

    memory = PeakMemory(args.device)
    with memory:
        libraries = memory.read() if args.device.type == "cpu" else 0
        trainer = build_trainer(prepared, sources, trainer_class=_Rehearsal)
        assert isinstance(trainer, _Rehearsal)
        trainer.memory = memory
        steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        trainer.train_dataset = to_dataset(batch, system_prompt=options.system_prompt)
        args.max_steps = 3 * steps_per_batch
        clock = _StepClock()
        trainer.add_callback(clock)
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise UserError(_OUT_OF_MEMORY[trainer.phase]) from error
        trainer.end_batch()

    assert trainer.optimizer is not None
    policy = unwrapped(trainer.model)
    weights = _bytes(policy.parameters()) + _bytes(trainer.ref_model.parameters() if trainer.ref_model else ())
    gradients = _bytes(one for one in policy.parameters() if one.requires_grad)
    state = _bytes(value for group in trainer.optimizer.state.values() for value in group.values())
    kept = libraries + weights + state
    measured = [
        BatchNeeds(
            rollout=max(trainer.rollout_peaks[batch] - kept, 0),
            update=max(trainer.update_peaks[batch] - kept - gradients, 0),
            step_seconds=sum(clock.seconds[batch * steps_per_batch : (batch + 1) * steps_per_batch]) / steps_per_batch,
        )
        for batch in (1, 2)
    ]
    if not trainer.is_world_process_zero():
        return None
    return Plan(
        rows=len(train),
        skipped_rows=len(train.skipped),
        long_rows=len(prepared.long),
        held_out_rows=len(sources.held_out) if sources.held_out else 0,
        prompts=prompts,
        generations=generations,
        steps=steps,
        generation_steps=steps_per_batch,
        epochs=steps / steps_per_batch * prompts / len(train),
        probed_rows=len(probed),
        prompt_tokens=(sum(lengths) / len(lengths), max(lengths)),
        response_tokens=response_tokens,
        trained_weights=sum(one.numel() for one in policy.parameters() if one.requires_grad),
        all_weights=sum(one.numel() for one in policy.parameters()),
        dtype=str(next(policy.parameters()).dtype).removeprefix("torch."),
        device=str(args.device),
        processes=trainer.accelerator.num_processes,
        loss_type=args.loss_type,
        rewards=dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)),
        memory=MemoryParts(libraries=libraries, weights=weights, gradients=gradients, optimizer=state),
        as_answered=measured[0],
        at_worst=measured[1],
    )


def probe_rows(source: RecordSource, options: TrainOptions) -> tuple[list[int], list[int]]:
    """Indices of at most `PROBED_ROWS` rows, evenly spread, and the prompt tokens of each."""
    step = max(1, -(-len(source) // PROBED_ROWS))
    indices = list(range(0, len(source), step))
    processor = load_processor(options.model)
    return indices, prompt_lengths(processor, source.keep(indices), system_prompt=options.system_prompt)


def _bytes(tensors: Iterable[Any]) -> int:
    """Bytes of this process's part of the tensors among `tensors`."""
    mine = (one.to_local() if isinstance(one, DTensor) else one for one in tensors)
    return sum(one.numel() * one.element_size() for one in mine if isinstance(one, Tensor))
