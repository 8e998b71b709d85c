"""Rollouts that the trainer makes itself: an initial pass over the data, and replaced prompts.

The initial pass sets the prompts' baselines (MSSR, arXiv 2512.18215). Prompts with equal rewards in all rollouts are
replaced by others (DAPO's dynamic sampling, arXiv 2503.14476). Both use TRL's generation and rewards, and log nothing.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor
from transformers import TrainerCallback

from cppo.errors import UserError, tell
from cppo.perception import equal_rewards
from cppo.policy.images_once import images_once
from cppo.policy.prompts import Row, prompt_messages, sample_id
from cppo.progress import Progress
from cppo.rewards import Sampling
from cppo.training.asking import AskingTrainer, changed
from cppo.training.baseline import PromptBaseline
from cppo.training.rollouts import GenerationBatch
from cppo.training.setup import agree_on_images
from cppo.training.telemetry import StepCosts
from cppo.trl_surface import generation_batches, log_metric, replace_advantages, unfinished_rollouts, unlogged

DRAWS = (1 << 31) + 1
"""Replaces a rank in the key of a random stream; no rank has this number."""


@dataclass(frozen=True)
class Round:
    """Rollouts of one round of a generation batch.

    Attributes:
        rows: per group of all processes, its row of the data; -1 where TRL's sampler chose it.
        first: the index of this process's first rollout among all.
        responses, logps: of this process's rollouts.
        rewards: of every rollout of all processes and every function, [B, R].
    """

    rows: Sequence[int]
    first: int
    responses: list[list[int]]
    logps: list[list[float]] | None
    rewards: Tensor

    def rollout(self, place: int) -> tuple[list[int], list[float] | None] | None:
        """The response at an index among all, and its log-probabilities; None where another process has it."""
        own = place - self.first
        if not 0 <= own < len(self.responses):
            return None
        return self.responses[own], None if self.logps is None else self.logps[own]


@dataclass(frozen=True)
class MadeRollouts:
    """A generation batch made before TRL asks for it.

    Attributes:
        rows: per rollout of this process, its row of the data; -1 where TRL's sampler chose it.
        responses: their token ids.
        logps: from vLLM's sampling, if it sampled.
        rewards: of every rollout of all processes and every function, [B, R].
    """

    rows: list[int]
    responses: list[list[int]]
    logps: list[list[float]] | None
    rewards: Tensor


class InitialPass(TrainerCallback):
    """Sets the baselines of a new run; a resumed run keeps its own."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin()


class DrawingTrainer(AskingTrainer):
    """The part of `CPPOTrainer` that makes rollouts without TRL's request.

    Raises UserError for options that contradict a stream of data, tools, an environment or a `rollout_func`.
    """

    num_generations_eval: int
    train_dataset: Any
    max_completion_length: Any
    _made: MadeRollouts | None = None
    _costs: StepCosts
    _rollouts: Callable[[Sequence[Row], int], GenerationBatch]
    _shown_rows: Callable[[GenerationBatch, int], list[Row]]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        args = self.args
        if args.data_stages > 1 and isinstance(self.train_dataset, IterableDataset):
            raise UserError("data_stages cuts rows into stages, but a stream of data has no known rows: set 1")
        if args.dynamic_sampling_rounds > 1:
            self._check_answers_alone("dynamic_sampling_rounds", 1)
        if args.advantage_baseline == "prompt":
            if args.baseline_init_samples:
                self._check_answers_alone("baseline_init_samples", 0)
            self.baseline = PromptBaseline(args.baseline_kl_target, args.baseline_kl_window, args.baseline_memory)
            self.add_callback(InitialPass(self._begin_baseline))

    def _check_answers_alone(self, option: str, off: int) -> None:
        if isinstance(self.train_dataset, IterableDataset) or not isinstance(self.train_dataset, Sized):
            raise UserError(f"{option} draws rows by index, which a stream of data does not have: set {off}")
        if self.tools or self.rollout_func is not None or self.environment_factories is not None:
            raise UserError(
                f"{option} makes rollouts without tools, environment_factory and rollout_func: set {off}, or leave "
                "these out"
            )

    def _rewarded(
        self, batch: GenerationBatch, rows: Sequence[Row], generating: AbstractContextManager[Any]
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """The responses to this process's rows, with their log-probabilities from vLLM's sampling.

        Args:
            batch: gets the rewards of all processes.
            rows: as the rollouts see them.
            generating: a context for the generation alone.
        """
        agree_on_images(self, batch.rows)
        prompts = [prompt_messages(row) for row in rows]
        try:
            with unlogged(self), images_once(self.processing_class):
                with generating:
                    self._generating = batch
                    _, responses, _, completions, logps, *_ = self._generate(prompts)
                self._generating = batch
                self._calculate_rewards(rows, prompts, completions, responses)
        finally:
            self._generating = None
        return responses, logps

    def _summed(self, rewards: Tensor) -> Tensor:
        """The weighted sum of each rollout's rewards [B, R], [B]; NaN where no function gave one."""
        summed = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        return summed.masked_fill(rewards.isnan().all(dim=1), math.nan)

    def _compared(self, rewards: Tensor, summed: Tensor) -> Tensor:
        """The values that TRL normalizes within a group, [B, F]: the summed rewards, or each weighted reward."""
        if self.multi_objective_aggregation == "sum_then_normalize":
            return summed[:, None]
        return rewards[:, self.reward_weights.to(rewards.device) != 0]

    # Baselines

    def _begin_baseline(self) -> None:
        """Answer each row of the data `baseline_init_samples` times, and start each baseline at the mean reward."""
        baseline, samples = self.baseline, self.args.baseline_init_samples
        assert baseline is not None
        if baseline.begun:
            return
        if not samples:
            baseline.begin({})
            return
        earned: defaultdict[str, list[float]] = defaultdict(list)
        data, ranks, rank = self.train_dataset, self.accelerator.num_processes, self.accelerator.process_index
        a_process = self.args.per_device_train_batch_size * (self.args.steps_per_generation or 1)
        started, places = time.perf_counter(), [row for row in range(len(data)) for _ in range(samples)]
        with Progress(total=len(places), desc="initial pass", unit="responses") as bar:
            for number, first in enumerate(range(0, len(places), a_process * ranks)):
                chunk = places[first : first + a_process * ranks]
                # All processes answer as many rows; repeated rows fill the last ones and are not counted.
                chunk_size = math.ceil(len(chunk) / ranks)
                filled = chunk + chunk[-1:] * (chunk_size * ranks - len(chunk))
                mine = [data[place] for place in filled[rank * chunk_size : (rank + 1) * chunk_size]]
                batch = GenerationBatch.of(mine, rank * chunk_size, 1, alone=False)
                with changed(self, {"num_generations": 1, "num_generations_eval": 1}):
                    sampling = Sampling(max_tokens=self.max_completion_length, seed=number)
                    self._rewarded(batch, batch.rows, self._asking(sampling))
                assert batch.rewards is not None
                names = gather_object([sample_id(row) for row in batch.rows])
                for name, reward in list(zip(names, self._summed(batch.rewards).tolist(), strict=True))[: len(chunk)]:
                    if reward == reward:
                        earned[name].append(reward)
                bar.update(len(chunk))
        means = {name: sum(rewards) / len(rewards) for name, rewards in earned.items()}
        baseline.begin(means)
        if self.is_world_process_zero():
            mean = sum(means.values()) / max(len(means), 1)
            tell(
                f"initial pass: {len(places):,} responses to {len(data):,} prompts in "
                f"{time.perf_counter() - started:.1f} s, mean reward {mean:.3f}"
            )

    def _baseline_advantages(self, batch: GenerationBatch, summed: Tensor) -> Tensor:
        """The advantages of this process's rollouts, [B], relative to the baselines of their prompts.

        summed: the reward of every rollout of all processes.
        """
        baseline = self.baseline
        assert baseline is not None
        own = torch.tensor(baseline.sums_so_far(), dtype=torch.float64, device=summed.device)
        baseline.close(*self.accelerator.reduce(own, "sum").tolist())
        names = gather_object([sample_id(row) for row in batch.rows])
        advantages = baseline.advantages(names, summed)
        replace_advantages(self, advantages.tolist())
        values = [baseline.value(name) for name in names]
        log_metric(self, "baseline/value", sum(values) / len(values))
        if baseline.recent:
            log_metric(self, "baseline/kl", sum(baseline.recent) / len(baseline.recent))
        return advantages[batch.mine]

    # Replaced prompts

    def _redrawn(self, inputs: list[Row]) -> list[Row]:
        """The rows of a generation batch; within the allowed rounds, groups with equal rewards are replaced.

        The rollouts are kept until TRL asks for them. New rows are drawn at random from the data, or from the batch's
        stage of it, none twice in a batch. The draws depend only on the run's seed and the batch number.
        """
        size, ranks, rank = self.num_generations, self.accelerator.num_processes, self.accelerator.process_index
        slots, step, data = len(inputs) * ranks // size, self.state.global_step, self.train_dataset
        key = np.random.SeedSequence((self.args.seed, generation_batches(self), DRAWS))
        rows = range(len(data)) if self._stages is None else self._stages.rows(generation_batches(self))
        order = (rows.start + np.random.Generator(np.random.PCG64(key)).permutation(len(rows))).tolist()
        # Groups that give each process as many rollouts, or as many whole groups.
        unit = ranks // math.gcd(size, ranks) if self.args.pixel_steps is None else ranks
        source: dict[int, tuple[int, int]] = {}
        rounds: list[Round] = []
        drawn, asked = [-1] * slots, inputs
        while True:
            batch = self._rollouts(asked, step)
            responses, logps = self._rewarded(batch, self._shown_rows(batch, step), nullcontext())
            assert batch.rewards is not None
            rounds.append(Round(drawn, batch.first, responses, logps, batch.rewards))
            equal = equal_rewards(self._compared(batch.rewards, self._summed(batch.rewards)), size)[::size].tolist()
            differ = [group for group, alike in enumerate(equal) if not alike]
            waiting = [slot for slot in range(slots) if slot not in source]
            fits = zip(waiting, differ, strict=False) if len(rounds) > 1 else zip(differ, differ, strict=True)
            source |= {slot: (len(rounds) - 1, group) for slot, group in fits}
            missing = slots - len(source)
            count = min(math.ceil(missing / unit), len(order) // unit) * unit
            if not count or len(rounds) == self.args.dynamic_sampling_rounds:
                break
            drawn, order = order[:count], order[count:]
            a_process = count * size // ranks
            loaded = {group: data[drawn[group]] for group in _groups(rank * a_process, a_process, size)}
            asked = [loaded[place // size] for place in range(rank * a_process, (rank + 1) * a_process)]
        chosen = [source.get(slot, (0, slot)) for slot in range(slots)]
        self._made = self._put_together(rounds, chosen, len(inputs))
        log_metric(self, "dynamic_sampling/rounds", len(rounds))
        log_metric(self, "dynamic_sampling/rollouts", sum(len(one.rewards) for one in rounds))
        log_metric(self, "dynamic_sampling/redrawn", sum(number > 0 for number, _ in chosen) / slots)
        log_metric(self, "dynamic_sampling/equal", missing / slots)
        return [row if index < 0 else {**data[index]} for row, index in zip(inputs, self._made.rows, strict=True)]

    def _put_together(self, rounds: Sequence[Round], chosen: Sequence[tuple[int, int]], count: int) -> MadeRollouts:
        """This process's `count` rollouts of the chosen groups, each given by its round and its index there."""
        size, first = self.num_generations, rounds[0].first
        places = [(number, group * size + member) for number, group in chosen for member in range(size)]
        own = [(place, rounds[place[0]].rollout(place[1])) for place in places if place[0]]
        moved: dict[tuple[int, int], Any] = dict(
            gather_object([(place, held) for place, held in own if held is not None])
        )
        mine = places[first : first + count]
        found: list[Any] = [moved[place] if place[0] else rounds[0].rollout(place[1]) for place in mine]
        sampled = [logps for _, logps in found if logps is not None]
        return MadeRollouts(
            [rounds[number].rows[place // size] for number, place in mine],
            [response for response, _ in found],
            sampled or None,
            torch.cat([rounds[number].rewards[group * size : (group + 1) * size] for number, group in chosen]),
        )

    def _as_drawn(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that TRL's sampler repeats in a resumed run, with the replaced rows in their places."""
        again = list(rows)
        for inputs in unfinished_rollouts(self) or ():
            for place, index in zip(inputs["rollout_place"], inputs.get("rollout_row", ()), strict=False):
                if index >= 0:
                    again[place] = {**self.train_dataset[index]}
        return again


def _groups(first: int, count: int, size: int) -> range:
    """The groups, of `size` rollouts, that contain the `count` rollouts from index `first` on."""
    return range(first // size, -(-(first + count) // size))
