"""`cppo train --dry_run`: the whole run set up, three generation batches trained, the plan told, nothing kept.

Memory and time are measured, not modelled: the longest prompts go through the real trainer on this machine.
"""

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
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
from cppo.runs.run import PreparedRun, build_config, build_trainer, may_probe, prepare_run
from cppo.runs.sources import RunSources
from cppo.training.config import CPPOConfig
from cppo.training.group_shuffle import rollouts_a_pass
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

    @property
    def kept(self) -> int:
        """Bytes beside those of the gradients, which come and go with the updates."""
        return self.libraries + self.weights + self.optimizer


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
        return memory.kept + max(self.rollout, memory.gradients + self.update)


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
        self.clock = _StepClock()
        self.add_callback(self.clock)

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


def rehearse(recipe: Recipe, sources: RunSources) -> list[str] | None:
    """Check a recipe with its data and model by training three generation batches; None but on the main process.

    Nothing is written but a temporary folder that is removed, and no logger is called.

    Returns:
        What the run would do and need, as text lines; "as now" is with the model's present answers, "at worst" with
        every response of full length and every second one rewarded.

    Raises:
        UserError: as `cppo.runs.run.run_training`; or a batch does not fit into memory, naming the phase.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "eval_strategy": "no"}
        check_loggers(build_config(recipe))
        prepared = prepare_run(replace(recipe, config={**recipe.config, **quiet}), sources)
        return _plan_lines(recipe, prepared, sources)


def _plan_lines(recipe: Recipe, prepared: PreparedRun, sources: RunSources) -> list[str] | None:
    """Train on the longest of the probed prompts, and tell what the run would do and need."""
    args, train, config = prepared.args, prepared.train, recipe.resolved
    generations, batch_size, micro_batches = args.num_generations, args.generation_batch_size, args.steps_per_generation
    assert generations is not None
    assert batch_size is not None
    assert micro_batches is not None
    steps_per_batch = max(1, micro_batches * args.num_iterations // args.gradient_accumulation_steps)
    prompts = batch_size // generations
    probed, lengths = probe_rows(train, prepared.options)
    longest = sorted(range(len(probed)), key=lambda index: -lengths[index])
    # Fewer rows than a generation batch has prompts were probed: the longest are repeated.
    batch = train.keep([probed[longest[index % len(longest)]] for index in range(prompts)])

    trainer, steps, libraries = _train_briefly(prepared, sources, batch, 3 * steps_per_batch)
    memory = memory_parts(trainer, libraries)
    as_answered, at_worst = (
        BatchNeeds(
            rollout=max(trainer.rollout_peaks[number] - memory.kept, 0),
            update=max(trainer.update_peaks[number] - memory.kept - memory.gradients, 0),
            step_seconds=sum(trainer.clock.seconds[number * steps_per_batch :][:steps_per_batch]) / steps_per_batch,
        )
        for number in (1, 2)
    )
    if not trainer.is_world_process_zero():
        return None
    held_out = {
        "before and after training": sources.held_out,
        "in each evaluation": sources.evaluation,
        "in each probe": sources.probes if may_probe(trainer, prepared.options) else None,
    }
    answered = [f"{len(source):,} items {when}" for when, source in held_out.items() if source is not None]
    weights = list(unwrapped(trainer.model).parameters())
    trained = sum(one.numel() for one in weights if one.requires_grad)
    rewards = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    return [
        f"recipe     {recipe.name}",
        f"model      {recipe.options.model}: {trained:,} of {sum(one.numel() for one in weights):,} weights trained, "
        f"{str(weights[0].dtype).removeprefix('torch.')} on {args.device}, "
        f"{trainer.accelerator.num_processes} process(es)",
        f"rows       {len(train):,} to train on, {len(train.skipped):,} bad, "
        f"{len(train.other_images):,} with other images, {len(prepared.long):,} too long",
        f"held-out   {', '.join(answered) or 'nothing is answered'}",
        f"steps      {steps:,}, {steps / steps_per_batch * prompts / len(train):.2f} epochs; every {steps_per_batch} "
        f"share {prompts} prompts x {generations} responses",
        f"tokens     prompts {sum(lengths) / len(lengths):.0f} on average, {max(lengths):,} at most in {len(probed):,} "
        f"rows, images included; responses up to {args.max_completion_length:,}",
        f"method     {config['method']}: {method_text(config)}",
        f"sharing    {sharing_text(args, trainer._shares_prompts)}",
        f"loss       {args.loss_type}, learning rate {args.learning_rate:g}, scorer {config['scorer']}",
        f"rewards    {', '.join(f'{name} x {weight:g}' for name, weight in rewards)}",
        *(f"fallback   {line}" for line in trainer.fallbacks),
        f"memory     {', '.join(f'{part} {_mib(size)}' for part, size in asdict(memory).items())}",
        _needs_line("as now", as_answered, memory, steps),
        _needs_line("at worst", at_worst, memory, steps),
        f"written    nothing; without --dry_run it goes to {recipe.output_dir}",
    ]


def _train_briefly(
    prepared: PreparedRun, sources: RunSources, batch: RecordSource, max_steps: int
) -> tuple[_Rehearsal, int, int]:
    """Train `max_steps` steps on the rows of `batch`.

    Returns:
        The trainer, the optimizer steps of the whole run, and the bytes in use before the model was loaded.
    """
    args = prepared.args
    memory = PeakMemory(args.device)
    with memory:
        libraries = memory.read() if args.device.type == "cpu" else 0
        trainer = build_trainer(prepared, sources, trainer_class=_Rehearsal)
        assert isinstance(trainer, _Rehearsal)
        trainer.memory = memory
        steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        trainer.train_dataset = to_dataset(batch, system_prompt=prepared.options.system_prompt)
        args.max_steps = max_steps
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise UserError(_OUT_OF_MEMORY[trainer.phase]) from error
        trainer.end_batch()
    return trainer, steps, libraries


def memory_parts(trainer: CPPOTrainer, libraries: int) -> MemoryParts:
    """What stays in this process's memory after a step of `trainer`; `libraries` bytes were in use before the model."""
    assert trainer.optimizer is not None
    policy = unwrapped(trainer.model)
    return MemoryParts(
        libraries=libraries,
        weights=_bytes(policy.parameters()) + _bytes(trainer.ref_model.parameters() if trainer.ref_model else ()),
        gradients=_bytes(one for one in policy.parameters() if one.requires_grad),
        optimizer=_bytes(value for group in trainer.optimizer.state.values() for value in group.values()),
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


def method_text(config: Mapping[str, Any]) -> str:
    """What a method makes of views, from the options in force."""
    sink, weight = config["perception_sink"], config["perception_weight"]
    entropies = {
        "I-": config["perception_removing_entropy_weight"],
        "I+": config["perception_preserving_entropy_weight"],
    }
    used = []
    if sink == "advantage":
        used.append(f"perception_sink advantage, kept by the tokens of the best {config['perception_score']}")
    elif sink == "weights":
        used.append(f"perception_sink weights, of every token by its {config['perception_score']}")
    elif sink != "none" and weight:
        once = config["perception_view_policy"] == "rollout"
        scored = "scored once a generation batch" if once else config["perception_memory"]
        used.append(f"perception_sink {sink}, perception_weight {weight:g}, views {scored}")
    if sink in ("contrast", "divergence"):
        used += [f"entropy under {view} x {weight:g}" for view, weight in entropies.items() if weight]
    if config["rollout_views"]:
        share = f"{config['rollout_view_mode']} {config['rollout_view_fraction']:g}"
        used.append(f"rollouts from {', '.join(config['rollout_views'])} ({share})")
    return "; ".join(used) or "no views"


def sharing_text(args: CPPOConfig, shares_prompts: bool) -> str:
    """For how many rollouts of a micro-batch each prompt and image runs once."""
    size, group = args.per_device_train_batch_size, args.num_generations or 1
    rows = size * (args.steps_per_generation or 1)
    if not shares_prompts:
        return f"none: each of the {size} rollouts of a micro-batch runs its own prompt and images"
    mean = float(rollouts_a_pass(rows, group, size))
    cut = f"of groups of {group}" if size % group == 0 else f"cut groups of {group}"
    return (
        f"micro-batches of {size} rollouts {cut}: each prompt and image runs once for at most {min(size, group)} of "
        f"them, {mean:.1f} on average"
    )


def _needs_line(label: str, needs: BatchNeeds, memory: MemoryParts, steps: int) -> str:
    return (
        f"{label:<10} rollout {_mib(needs.rollout)}, update {_mib(needs.update)}, {_mib(needs.peak(memory))} "
        f"at the peak; {needs.step_seconds:.2f} s a step, {steps * needs.step_seconds / 60:,.1f} minutes for all steps"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
