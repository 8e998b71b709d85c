"""Held-out items during a run: answers to them, and the perception tokens of a few fixed ones."""

import math
from collections.abc import Sequence
from typing import Any

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cppo.data import RecordSource, question_text
from cppo.evaluation import EvalResult, Processes, evaluate
from cppo.evaluation.generate import evaluation_mode
from cppo.evaluation.inspection import InspectedItem, InspectOptions, inspect_record
from cppo.progress import Progress
from cppo.recipes import RunDirectory
from cppo.runs.recorder import append_json_lines
from cppo.training.config import CPPOConfig
from cppo.training.trainer import CPPOTrainer
from cppo.views import image_data_uri

EVALUATION_BATCH = 64
PROBES_A_RUN = 8
SHOWN_ITEMS = 3
SHOWN_TOKENS = 256
"""Most tokens of a shown response: each view's logits over the whole vocabulary are in memory at once."""
IMAGE_SIDE = 128


def answer_all(trainer: CPPOTrainer, source: RecordSource, label: str, **asked: Any) -> EvalResult:
    """Greedy evaluation of the model as it is now, each rank answering its share of the records.

    With FSDP the weights are sharded for it before training; until then one process may hold them all.

    Args:
        label: of the progress.
        asked: arguments of `evaluate`.
    """
    accelerator = trainer.accelerator
    processes = Processes(accelerator.num_processes, accelerator.process_index, trainer.is_fsdp_enabled)
    if processes.sharded:
        shard(trainer)
    with Progress(total=len(source), desc=label, unit="items") as bar:
        return evaluate(
            accelerator.unwrap_model(trainer.model),
            trainer.processing_class,
            source,
            batch_size=EVALUATION_BATCH,
            progress=bar.update,
            processes=processes,
            **asked,
        )


def shard(trainer: CPPOTrainer) -> None:
    """Shard the weights of a trainer that has not started, as its start would."""
    if isinstance(trainer.model, FSDPModule):
        return
    trainer.create_optimizer()  # FSDP2 wants both at once
    prepared = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model, trainer.optimizer = trainer.model_wrapped, _ = prepared
    # The start prepares both again, which would wrap each layer twice.
    trainer.accelerator.state.fsdp_plugin.activation_checkpointing = False
    register_fsdp_forward_method(trainer.model, "generate")  # it encodes images before the first forward pass


class HeldOutProbe(TrainerCallback):
    """Appends one JSON object to `probes.jsonl` before the first step, then every `every` steps and after the last.

    It holds the greedy accuracy on `items`. For the first few items it also holds the greedy response's tokens, their
    dependency scores and the method's selection, under the same views each time. It draws no random number, so training
    does not change.

    Args:
        every: optimizer steps between two probes; None for an eighth of the run.
        asked: arguments of `evaluate`.
    """

    def __init__(
        self,
        trainer: CPPOTrainer,
        files: RunDirectory,
        items: RecordSource,
        *,
        every: int | None,
        asked: dict[str, Any],
    ) -> None:
        self._trainer, self._files, self._items, self._every, self._asked = trainer, files, items, every, asked
        args = trainer.args
        assert isinstance(args, CPPOConfig)
        self._score = args.perception_score
        self._sampler = args.view_sampler()
        self._options = InspectOptions(
            samples=1,
            temperature=args.temperature,
            max_new_tokens=min(asked["max_new_tokens"], SHOWN_TOKENS),
            seed=args.seed,
            system_prompt=asked["system_prompt"],
            score=args.perception_score,
            selector=args.perception_selector,
            top_fraction=args.perception_top_fraction,
            top_rounding=args.perception_top_rounding,
            tolerance=asked["tolerance"],
            run=args,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._every is None:
            self._every = math.ceil(state.max_steps / PROBES_A_RUN)
        if state.global_step == 0:
            self._take(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._every is not None
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._take(state.global_step)

    def _take(self, step: int) -> None:
        found = answer_all(self._trainer, self._items, "held out", **self._asked)
        writes = self._trainer.is_world_process_zero()
        if not (writes or self._trainer.is_fsdp_enabled):
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        with evaluation_mode(model):
            shown = [
                inspect_record(model, self._trainer.processing_class, self._items[place], self._sampler, self._options)
                for place in range(min(SHOWN_ITEMS, len(self._items)))
            ]
        if not writes:
            return
        # The pictures stay the same: only the first line holds them.
        with_images = not self._files.probes.is_file()
        append_json_lines(self._files.probes, [probe_record(step, found, shown, self._score, with_images)])


def probe_record(
    step: int, found: EvalResult, shown: Sequence[InspectedItem], score: str, with_images: bool
) -> dict[str, Any]:
    """A probe as JSON values; images become small data URIs."""
    return {
        "step": step,
        "accuracy": found.accuracy,
        "accuracy_ci95": list(found.accuracy_ci95),
        "n": found.n,
        "items": [_item_record(item, score, with_images) for item in shown],
    }


def _item_record(item: InspectedItem, score: str, with_images: bool) -> dict[str, Any]:
    (response,) = item.responses
    return {
        "id": item.record.id,
        "prompt": question_text(item.record.prompt),
        "images": [image_data_uri(image, IMAGE_SIDE) for image in item.record.images] if with_images else [],
        "answer": item.record.answer,
        "correct": response.correct,
        "tokens": [token.text for token in response.tokens],
        "score": [round(token.scores[score], 5) for token in response.tokens],
        "selected": [token.selected[score] for token in response.tokens],
        "true_perception": [token.true_perception for token in response.tokens],
    }
