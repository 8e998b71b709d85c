"""Greedy answers to held-out records in the middle of a run, each rank taking its share of them."""

import sys
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

from cppo.data import Record
from cppo.evaluation import CLEAN, EvalResult, ItemResult, evaluate
from cppo.training.trainer import CPPOTrainer

EVALUATION_BATCH = 64


class _Share(Sequence[Record]):
    """Every `step`-th record from `start` on, still read one at a time."""

    def __init__(self, source: Sequence[Record], start: int, step: int) -> None:
        self._source, self._indices = source, range(start, len(source), step)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self._source[self._indices[index]]


def answer_all(
    trainer: CPPOTrainer, source: Sequence[Record], label: str, *, show_bar: bool = True, **asked: Any
) -> EvalResult:
    """Greedy evaluation of the model as it is now.

    Args:
        label: of the bar on a terminal.
        asked: arguments of `evaluate`.
    """
    accelerator = trainer.accelerator
    ranks = accelerator.num_processes
    share = _Share(source, accelerator.process_index, ranks)
    model, processor = accelerator.unwrap_model(trainer.model), trainer.processing_class
    shown = show_bar and accelerator.is_main_process and sys.stderr.isatty() and not trainer.args.disable_tqdm
    mine: tuple[ItemResult, ...] = ()
    with tqdm(total=len(share), desc=label, unit="item", leave=False, disable=not shown) as bar:
        if len(share):
            mine = evaluate(model, processor, share, batch_size=EVALUATION_BATCH, progress=bar.update, **asked).items
    by_rank = gather_object([mine])
    items = [by_rank[index % ranks][index // ranks] for index in range(len(source))]
    return EvalResult(tuple(items), samples=1, condition=asked.get("condition", CLEAN).name)
