"""Whether a training set has the columns and the rows that a run needs, asked before a model is loaded."""

import logging
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from trl import GRPOConfig

from cppo.errors import UserError
from cppo.rewards import reward_columns
from cppo.training.view_inputs import check_ends_with_question, embedded_images

logger = logging.getLogger(__name__)


def check_columns(dataset: Any, uses_perception: bool, rewards: Any = ()) -> None:
    """Hold the first row of a dataset that is no stream against what training and reward functions read.

    Raises UserError for one without a prompt, with one that ends with an assistant message, or without a column that a
    function needs, and warns of one without images.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise UserError(
            f"train_dataset has the splits {', '.join(dataset)}: give one of them, such as train_dataset="
            f"data[{next(iter(dataset), 'train')!r}]"
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
        return
    # Not `column_names`: a transform may make other columns.
    row = dataset[0]
    named = ", ".join(row)
    if "prompt" not in row:
        raise UserError(f"train_dataset has no column `prompt`: rename one; its columns are {named}")
    check_ends_with_question(row["prompt"])
    for reward in rewards if isinstance(rewards, list | tuple) else [rewards]:
        columns = {} if isinstance(reward, str | torch.nn.Module) else reward_columns(reward)
        missing = [repr(name) for name, needed in columns.items() if needed and name not in {*row, "images"}]
        if missing:
            raise UserError(
                f"reward {getattr(reward, '__name__', repr(reward))} needs the column{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)}: train_dataset has {named}; `load_records(..., extras=[...])` takes more"
            )
    if not uses_perception or {"images", "image"} & set(row):
        return
    if not embedded_images(row["prompt"]):
        logger.warning(
            "train_dataset has no column `images` or `image`, and the perception loss needs images: is it among %s?",
            named,
        )


def check_enough(name: str, rows: int, args: GRPOConfig) -> None:
    """Raise UserError where the rows of a dataset are fewer than the prompts that are generated together."""
    prompts = (args.generation_batch_size or 0) // (args.num_generations or 1)
    if rows < prompts:
        raise UserError(
            f"{name}: {rows} usable rows are fewer than the {prompts} prompts of a generation batch; "
            f"{_smaller_batch(args, rows)}, or give more rows"
        )


def _smaller_batch(args: GRPOConfig, rows: int) -> str:
    """The options that make a generation batch of at most so many prompts, in words."""
    group, steps, device = args.num_generations or 1, args.steps_per_generation or 1, args.per_device_train_batch_size
    together = (args.generation_batch_size or device) // steps  # rollouts of a micro-batch over all processes
    for fewer in range(steps - 1, 0, -1):
        if fewer * together <= rows * group and fewer * together % group == 0:
            return f"lower steps_per_generation to {fewer} (now {steps})"
    for smaller in range(device - 1, 0, -1):
        batch = smaller * (together // device)
        if batch <= rows * group and batch % group == 0:
            also = f" and set steps_per_generation to 1 (now {steps})" if steps > 1 else ""
            return f"lower per_device_train_batch_size to {smaller} (now {device}){also}"
    return f"lower num_generations (now {group})"
