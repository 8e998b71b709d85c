"""Greedy answers to held-out records in the middle of a run, each rank answering its share of them."""

import sys
from typing import Any

from tqdm import tqdm

from cppo.data import RecordSource
from cppo.evaluation import EvalResult, Processes, evaluate
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
    processes = Processes(accelerator.num_processes, accelerator.process_index)
    shown = show_bar and processes.is_first and sys.stderr.isatty() and not trainer.args.disable_tqdm
    with tqdm(total=len(source), desc=label, unit="item", leave=False, disable=not shown) as bar:
        return evaluate(
            accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            source,
            batch_size=EVALUATION_BATCH,
            progress=bar.update,
            processes=processes,
            **asked,
        )
