"""Supervised fine-tuning of a vision-language model on reference responses, with TRL's `SFTTrainer`.

    data = load_records("tasks:digits?n=2000")
    trainer = sft_trainer("micro", data, "runs/sft", sft_args={"max_steps": 100, "use_cpu": True, "bf16": False})
    trainer.train()
    trainer.save_model()

The loss is taken on the response alone: a record's prompt (images, question) conditions it and is never a target.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from cppo.assets import resolve_model
from cppo.data import Record, RecordSource, chat_messages
from cppo.errors import UserError, first_line, one_line_with_remedy
from cppo.evaluation import check_marks
from cppo.options import RunOptions
from cppo.policy import leave_out_frozen_tower, unwrapped
from cppo.policy.loading import whole_weights
from cppo.progress import Progress
from cppo.runs.adapters import adapter_arguments, name_base
from cppo.runs.loggers import check_loggers
from cppo.runs.precision import cpu_options, say_cpu_precision
from cppo.runs.sources import check_responses
from cppo.training.durable import DurableTrainer

# TRL's defaults would cut rows at 1,024 tokens (with image tokens), report to every installed logger, save a
# configuration that generates without a cache, and print nothing in a run below `logging_steps`.
DEFAULTS: dict[str, Any] = {"max_length": None, "report_to": "none", "use_cache": True, "logging_first_step": True}
# Rows are made on access, so training does not read the stored columns.
FIXED: dict[str, Any] = {"remove_unused_columns": False, "completion_only_loss": True}


def sft_row(record: Record, system_prompt: str | None = None) -> dict[str, Any]:
    """A record as TRL's conversational prompt-completion row."""
    return {
        "prompt": chat_messages(record.prompt, system_prompt),
        "completion": [{"role": "assistant", "content": record.response}],
        "images": list(record.images),
    }


def sft_dataset(source: RecordSource, system_prompt: str | None = None) -> Dataset:
    """The records as a lazy dataset: rows are read (images decoded or drawn) when a batch asks for them.

    `system_prompt` is added before every prompt without one.

    Raises UserError if a record has no reference response.
    """
    check_responses(source)

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [sft_row(source[number], system_prompt) for number in batch["number"]]
        return {key: [row[key] for row in rows] for key in rows[0]}

    return Dataset.from_dict({"number": list(range(len(source)))}).with_transform(read)


def sft_config(output_dir: str, sft_args: Mapping[str, Any]) -> SFTConfig:
    """TRL's configuration from our defaults and `sft_args`; UserError for a field or value that it refuses."""
    for name in FIXED:
        if sft_args.get(name, FIXED[name]) != FIXED[name]:
            raise UserError(f"{name}: supervised fine-tuning needs {FIXED[name]}; remove the option")
    try:
        return SFTConfig(output_dir=output_dir, **{**DEFAULTS, **cpu_options(sft_args), **sft_args, **FIXED})
    except (TypeError, ValueError) as error:
        raise UserError(f"sft options: {one_line_with_remedy(error)}") from error


class DurableSFTTrainer(DurableTrainer, SFTTrainer):
    """`trl.SFTTrainer` with complete checkpoints and finite steps; resuming works in every family."""


def sft_trainer(
    model: str,
    data: RecordSource,
    output_dir: str,
    eval_data: RecordSource | None = None,
    sft_args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    options: RunOptions | None = None,
) -> SFTTrainer:
    """The trainer of `model` (a folder, hub id or packaged name) on the responses of `data`.

    `sft_args` are fields of `trl.SFTConfig`; only the system prompt and the adapter's options are used of `options`.
    Given callbacks replace the Trainer's own printing. Raises UserError for a refused option, data without reference
    responses or with a model's own marks, or a model that cannot be loaded or has no vision tower.
    """
    config = sft_config(output_dir, sft_args or {})
    say_cpu_precision(sft_args or {})
    check_loggers(config)
    system_prompt = None if options is None else options.system_prompt
    train_dataset = sft_dataset(data, system_prompt)
    eval_dataset = None if eval_data is None else sft_dataset(eval_data, system_prompt)
    adapter = {} if options is None else adapter_arguments(options, config)
    try:
        with Progress(desc=f"load {model}"), whole_weights():
            trainer = DurableSFTTrainer(
                model=resolve_model(model),
                args=config,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=list(callbacks),
                **adapter,
            )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} cannot be fine-tuned: {first_line(error)}") from error
    check_marks(
        trainer.processing_class, [data, eval_data], system_prompt=system_prompt, prompt_suffix=data.prompt_suffix
    )
    trainer.rows = data.digest()
    if adapter:
        name_base(trainer.model, model)
        leave_out_frozen_tower(unwrapped(trainer.model))
    for callback in (ProgressCallback, PrinterCallback) if callbacks else ():
        trainer.remove_callback(callback)
    return trainer
