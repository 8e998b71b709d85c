"""A NaN loss on one of two ranks: `python benchmarks/faults/nonfinite.py`.

In the third step of a run one rank's loss becomes NaN, on the first rank and then on the second. Both ranks must end
before the optimizer step, each with status 2 and one line. The run then continues with `--resume_from_checkpoint auto`
and a finite loss. Prints the figures of docs/results/reliability.md: statuses, the line, the newest complete
checkpoint, and whether the resumed run left the same files as the uninterrupted run.

Measured with Python 3.11, torch 2.14.1, transformers 5.24 and trl 1.16, in about two minutes on two shared cores.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_run import Started, left_behind, train_command, versions, workplace

from cppo.checkpoints import newest_whole
from cppo.training.trainer import CPPOTrainer

STEPS_BEFORE = 2


def poison(rank: int) -> None:
    """Make the loss NaN in one step, on one rank."""
    sound = CPPOTrainer._compute_loss

    def _compute_loss(self: CPPOTrainer, model: Any, inputs: Any) -> torch.Tensor:
        loss = sound(self, model, inputs)
        hit = os.environ["RANK"] == str(rank) and self.model.training and self.state.global_step == STEPS_BEFORE
        return loss * torch.nan if hit else loss

    CPPOTrainer._compute_loss = _compute_loss


def poisoned(folder: Path, rank: int, expected: dict[str, Any]) -> str:
    run = folder / f"rank-{rank}"
    argv = [*train_command(folder, run), "--resume_from_checkpoint", "auto"]
    started = Started(argv, folder / "log.txt", 2, partial(poison, rank))
    statuses, said = started.wait(), [line for line in started.said() if "error" in line]
    newest = newest_whole(run, passed_over=print)
    again = Started(argv, folder / "log.txt", 2)
    assert again.wait() == [0, 0], again.log.read_text()
    equal = "equal" if left_behind(run) == expected else "other"
    at = newest.name if newest else "none"
    return f"| {rank} | {', '.join(map(str, statuses))} | {at} | {equal} | {sorted(set(said))} |"


def main() -> None:
    print(versions(), flush=True)
    with workplace() as folder:
        started = Started(train_command(folder, folder / "whole"), folder / "log.txt", 2)
        assert started.wait() == [0, 0], started.log.read_text()
        expected = left_behind(folder / "whole")
        for rank in (0, 1):
            print(poisoned(folder, rank, expected), flush=True)


if __name__ == "__main__":
    main()
