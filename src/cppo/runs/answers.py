"""Greedy answers to held-out records in the middle of a run, each rank taking its share of them."""

import sys
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm

from cppo.data import RecordSource
from cppo.evaluation import CLEAN, EvalResult, ItemResult, evaluate
from cppo.training.trainer import CPPOTrainer

EVALUATION_BATCH = 64


def answer_all(
    trainer: CPPOTrainer, source: RecordSource, label: str, *, show_bar: bool = True, **asked: Any
) -> EvalResult:
    """Greedy evaluation of the model as it is now.

    Args:
        label: of the bar on a terminal.
        asked: arguments of `evaluate`.
    """
    accelerator = trainer.accelerator
    ranks = accelerator.num_processes
    share = source.keep(range(accelerator.process_index, len(source), ranks))
    model, processor = accelerator.unwrap_model(trainer.model), trainer.processing_class
    shown = show_bar and accelerator.is_main_process and sys.stderr.isatty() and not trainer.args.disable_tqdm
    mine: tuple[ItemResult, ...] = ()
    with tqdm(total=len(share), desc=label, unit="item", leave=False, disable=not shown) as bar:
        if len(share):
            mine = evaluate(model, processor, share, batch_size=EVALUATION_BATCH, progress=bar.update, **asked).items
    by_rank = gather_object([mine])
    items = [by_rank[index % ranks][index // ranks] for index in range(len(source))]
    return EvalResult(tuple(items), samples=1, condition=asked.get("condition", CLEAN).name)
