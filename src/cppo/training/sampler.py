"""TRL's prompt sampler, able to begin at a later epoch."""

from collections.abc import Iterator

import torch
from trl.trainer.utils import RepeatSampler


class ResumableRepeatSampler(RepeatSampler):
    """`RepeatSampler` whose order in epoch e depends on (seed, e) alone, and equals TRL's in an uninterrupted run.

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
