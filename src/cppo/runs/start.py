"""The block at a run's start: recipe, model, rows, batch, lengths, learning rate."""

import sys

from transformers import SchedulerType, TrainingArguments
from trl import GRPOConfig

from cppo.recipes import Recipe
from cppo.runs.rated_rows import order_lines


def show_start(recipe: Recipe, args: TrainingArguments, rows: int) -> None:
    """Print the block on stderr, in the first of all processes; `rows`: number of training rows."""
    if args.process_index == 0:
        print("\n".join(start_lines(recipe, args, rows)), file=sys.stderr, flush=True)


def start_lines(recipe: Recipe, args: TrainingArguments, rows: int) -> list[str]:
    """The block as text lines. Batches are over all processes; a step is one update of the weights."""
    options, prompts = recipe.options, "prompts of any length"
    if options.max_prompt_tokens:
        prompts = f"prompts up to {options.max_prompt_tokens:,} tokens"
    micro = args.per_device_train_batch_size
    step = micro * args.world_size * args.gradient_accumulation_steps
    method, order = "", list[str]()
    if isinstance(args, GRPOConfig):
        group = args.num_generations or 1
        together = (args.generation_batch_size or step) // group
        method = f", method {recipe.method}"
        order = order_lines(recipe)
        batch = (
            f"{step / group:g} prompts x {group} rollouts a step, {together:,} prompts generated together, "
            f"micro-batches of {micro} rollouts"
        )
        lengths = f"{prompts}, responses up to {args.max_completion_length} tokens"
    else:
        batch = f"{step} rows a step, micro-batches of {micro}"
        lengths = prompts
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    adapter = f", a LoRA adapter of rank {options.lora_r}" if options.use_peft else ""
    return [
        f"recipe     {recipe.name}{method}",
        f"model      {options.model}{adapter}",
        f"rows       {rows:,}",
        *order,
        f"batch      {batch}",
        f"lengths    {lengths}",
        f"learning   rate {args.learning_rate:g}, schedule {SchedulerType(args.lr_scheduler_type).value}, {length}",
    ]
