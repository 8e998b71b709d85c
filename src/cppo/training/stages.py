"""Stages of the data: the rows in order, split into equal parts that are trained on one after the other.

SENT (arXiv 2512.04359) sorts the rows by semantic entropy, from low to high, and trains two stages for five epochs
each. Here the stages share the run: each gets generation batches in proportion to the whole batches in its rows.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch.utils.data import Sampler
from trl import GRPOConfig

from cppo.errors import UserError
from cppo.trl_surface import RepeatSampler

STAGES = (1 << 31) + 2
"""Replaces a rank in the key of a random stream; no rank has this number."""


class StagedSampler(Sampler[int]):
    """The indices of TRL's `RepeatSampler`, with its repetitions, but stage by stage.

    Every iteration is one pass of the Trainer over as many batches; a stage spans as many passes as it needs. Within a
    stage, the rows are shuffled again each time they are used up. The order of a batch depends only on the seed, the
    stage and the batch's number. So a resumed run needs only the number of passes.

    Attributes:
        passes: iterations begun.
    """

    def __init__(self, plain: RepeatSampler, stages: int, epochs: float, batches: int | None = None) -> None:
        """Take shuffling, seed and repetitions from TRL's sampler.

        Args:
            epochs: passes of the run over the data.
            batches: generation batches of the run, where `epochs` does not set them.
        """
        self.data_source, self.passes, self._plain = plain.data_source, 0, plain
        bounds = [len(plain.data_source) * stage // stages for stage in range(stages + 1)]
        self.stages = [range(start, end) for start, end in pairwise(bounds)]
        self._batches = [len(rows) // plain.batch_size for rows in self.stages]
        a_pass = sum(self._batches)
        total = math.ceil(epochs * a_pass) if batches is None else batches
        self._starts = [round(total * sum(self._batches[:stage]) / a_pass) for stage in range(stages)]
        self._order = lru_cache(1)(self._shuffled)

    def __len__(self) -> int:
        """Indices of one iteration, repetitions included."""
        return sum(self._batches) * self._plain.batch_size * self._plain.mini_repeat_count * self._plain.repeat_count

    def __iter__(self) -> Iterator[int]:
        a_pass = sum(self._batches)
        first, self.passes = self.passes * a_pass, self.passes + 1
        for number in range(first, first + a_pass):
            rows = self._batch(number)
            for _ in range(self._plain.repeat_count):
                for row in rows:
                    yield from [row] * self._plain.mini_repeat_count

    def stage(self, number: int) -> int:
        """The stage, from 0, of the run's generation batch of this number, from 0."""
        return max(stage for stage, start in enumerate(self._starts) if start <= number)

    def rows(self, number: int) -> range:
        """The rows of the stage of such a batch."""
        return self.stages[self.stage(number)]

    def _batch(self, number: int) -> list[int]:
        stage = self.stage(number)
        turn, place = divmod(number - self._starts[stage], self._batches[stage])
        size = self._plain.batch_size
        return self._order(stage, turn)[place * size : (place + 1) * size]

    def _shuffled(self, stage: int, turn: int) -> list[int]:
        rows = self.stages[stage]
        if not self._plain.shuffle:
            return list(rows)
        key = np.random.SeedSequence((self._plain.seed or 0, STAGES, stage, turn))
        order = np.random.Generator(np.random.PCG64(key)).permutation(len(rows))
        return (rows.start + order).tolist()


def staged_sampler(plain: RepeatSampler, args: GRPOConfig, stages: int) -> StagedSampler:
    """The sampler of a run with this many stages."""
    if args.max_steps <= 0:
        return StagedSampler(plain, stages, args.num_train_epochs)
    micro_batches = args.max_steps * args.gradient_accumulation_steps
    return StagedSampler(plain, stages, 0, math.ceil(micro_batches / plain.repeat_count))


def check_stages(name: str, rows: int, args: GRPOConfig, stages: int) -> None:
    """Raise UserError where a stage has fewer rows than a generation batch has prompts."""
    prompts = (args.generation_batch_size or 0) // (args.num_generations or 1)
    if rows // stages < prompts:
        raise UserError(
            f"{name}: data_stages = {stages} cuts {rows} rows into stages of {rows // stages}, fewer than the "
            f"{prompts} prompts of a generation batch: give data_stages = {max(rows // max(prompts, 1), 1)} or less, "
            "or a smaller batch"
        )
