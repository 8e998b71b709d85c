"""Checks before a step: data, options, rewards and model, and each batch's images and rewards."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate.utils import AutocastKwargs
from datasets import DatasetDict, IterableDatasetDict
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig

from cppo.data.mapping import LAYOUTS
from cppo.errors import UserError, tell
from cppo.messages import embedded_images
from cppo.methods import get_method
from cppo.options import check_gate_reward
from cppo.policy import (
    adapts_tied_weights,
    unshared_reason,
    unwrapped,
)
from cppo.policy.families import check_vision_rope
from cppo.policy.prompts import Row, check_prompt, prompt_images
from cppo.rewards import load_reward, reward_columns
from cppo.rewards.spec import parse_reward
from cppo.training.config import CPPOConfig
from cppo.upstream import (
    COLOCATED_PROMPTS,
    FSDP_OUTPUTS,
    LEARNING_RATE,
    SAMPLER_ORDER,
    check_needed_parts,
)

logger = logging.getLogger(__name__)
MAX_REWARD = 1e18
"""Largest weighted sum of rewards: the batch sum of its squares, for the deviation, must fit float32 (3.4e38)."""


class Trainer(Protocol):
    """The attributes of a `CPPOTrainer` that these checks read and set: `fallbacks`, logs and samples."""

    args: CPPOConfig
    model: Any
    ref_model: Any
    accelerator: Any
    processing_class: Any
    reward_func_names: list[str]
    aux_loss_enabled: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    use_vllm: bool
    use_transformers_continuous_batching: bool
    vllm_generation: Any
    generation_config: Any
    generation_kwargs: Any
    log_multimodal: bool
    fallbacks: list[str]


# Data


def check_columns(dataset: Any, uses_perception: bool, rewards: Any = ()) -> None:
    """Check the first row of a dataset, unless it is a stream, for the columns that training and reward functions read.

    Warns of a dataset without images. Raises UserError for one without a prompt, with a prompt that ends with an
    assistant message, or without a column that a function needs.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        raise UserError(
            f"train_dataset has the splits {', '.join(dataset)}: give one of them, such as train_dataset="
            f"data[{next(iter(dataset), 'train')!r}]"
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
        return
    # Not `column_names`: a transform may produce other columns.
    row = dataset[0]
    named = ", ".join(row)
    if "prompt" not in row:
        raise UserError(f"train_dataset has no column `prompt`: rename one; its columns are {named}")
    check_prompt(row)
    for reward in rewards if isinstance(rewards, list | tuple) else [rewards]:
        columns = {} if isinstance(reward, str | torch.nn.Module) else reward_columns(reward)
        missing = [name for name, needed in columns.items() if needed and name not in {*row, "images"}]
        if missing:
            raise UserError(
                f"reward {getattr(reward, '__name__', repr(reward))} needs the column{'s' * (len(missing) > 1)} "
                f"{', '.join(map(repr, missing))}, but train_dataset has {named}; `load_records(..., extras=[...])` "
                f"keeps more{_renamed(missing, row)}"
            )
    if not uses_perception or {"images", "image"} & set(row):
        return
    if not embedded_images(row["prompt"]):
        logger.warning(
            "train_dataset has no column `images` or `image`, but the perception loss needs images: is it among %s?",
            named,
        )


def _renamed(missing: Sequence[str], row: Row) -> str:
    """How to rename a column that well-known data sets have in place of a missing one, e.g. TRL's `solution`."""
    known = {theirs: ours for layout in LAYOUTS.values() for ours, theirs in layout.items()}
    renames = [(theirs, ours) for theirs, ours in known.items() if ours in missing and theirs in row]
    return "".join(f", or `dataset.rename_column({theirs!r}, {ours!r})`" for theirs, ours in renames)


# Options, rewards and model


def check_views_have_images(args: CPPOConfig, tools: Any, rollout_func: Any, environment_factory: Any) -> None:
    """Raise UserError where rollouts do not come from the images in the rows, which the views are made from."""
    if environment_factory is not None and (args.uses_perception or args.rollout_views):
        raise UserError(
            "environment_factory: views are made from the images in the dataset's rows, but an environment "
            "has its own; set method = 'grpo'"
        )
    if args.rollout_views and args.rollout_view_mode == "mix" and (rollout_func is not None or tools):
        raise UserError(
            f"rollout_view_mode = 'mix' makes all rollouts itself, but {'tools' if tools else 'rollout_func'} "
            "makes some from the images in the rows: choose 'augment', or another method"
        )


def check_setup(trainer: Trainer) -> None:
    """Raise UserError for options that contradict the processor, the rewards or the sharding."""
    processor = trainer.processing_class
    getattr(processor, "tokenizer", processor).padding_side = "left"  # as TRL sets it when it loads the processor
    reason = unshared_reason(trainer.model.config)
    if trainer.args.per_device_generation_batch_size is not None and reason is not None:
        raise UserError(f"per_device_generation_batch_size splits batches by images, but {reason}: set null")
    if trainer.use_vllm:
        _check_vllm(trainer)
    check_gate_reward(vars(trainer.args), trainer.reward_func_names)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if trainer.args.scorer == "shared" and is_deepspeed_zero3_enabled():
        raise UserError("scorer = 'shared' does not gather ZeRO-3 weights in the same order on all ranks: use 'kernel'")
    if trainer.args.log_perception_grad_share:
        raise UserError("log_perception_grad_share = True needs full gradients, which DeepSpeed and FSDP do not have")
    several_passes = trainer.args.perception_memory == "sequential" or trainer.args.separate_view_pass
    if trainer.args.scorer == "shared" and several_passes:
        raise UserError(
            "DeepSpeed and FSDP gather weights on each pass, and ranks without gated-in rollouts would run fewer "
            "passes: set perception_memory = 'joint' and perception_view_gradients = True, or scorer = 'kernel'"
        )


def _check_vllm(trainer: Trainer) -> None:
    """Raise UserError where vLLM would run another model than the trained one, or answer other prompts."""
    config = unwrapped(trainer.model).config
    check_vision_rope(str(config.name_or_path), config)
    if adapts_tied_weights(trainer.model):
        raise UserError(
            "the adapter is on the embedding or the output layer, which share a weight in this model, so vLLM would "
            "run another model than the trained one; leave embed_tokens and lm_head out, or set use_vllm = false"
        )
    if trainer.args.vllm_mode == "colocate" and (line := COLOCATED_PROMPTS.missing()) is not None:
        remedy = "set vllm_mode = 'server', or install the versions that docs/reference/versions.md names"
        raise UserError(f"{line}; {remedy}")


def try_parts(trainer: Trainer) -> None:
    """Probe the parts of other libraries that this trainer needs for any model.

    Raises UserError where a part without a replacement is gone.
    """
    check_needed_parts()
    for part in (SAMPLER_ORDER, LEARNING_RATE, *([FSDP_OUTPUTS] if trainer.accelerator.is_fsdp2 else [])):
        if (line := part.missing()) is not None:
            go_without(trainer, line)


def warn_of_other_rewards(method: str, names: Sequence[str]) -> None:
    """Warn of the method's rewards that a trainer does not use, by the names of their functions."""
    left_out = [text for text in get_method(method).rewards if load_reward(parse_reward(text)).__name__ not in names]
    if left_out:
        logger.warning(
            "rewards of the method %s are not used: %s; add `method` to the rewards for all of them",
            method,
            ", ".join(left_out),
        )


def tell_equal_weights(names: Sequence[str]) -> None:
    """Say that several rewards weigh 1 each, since nothing gives their weights; names: of their functions."""
    if len(names) > 1:
        ones = " ".join("1" for _ in names)
        tell(f"each reward weighs 1 ({', '.join(names)}): give reward_weights, such as {ones}, in this order")


def check_castable_head(model: Any, args: GRPOConfig) -> None:
    """Raise UserError where TRL would cast a tied output layer, which fails in a vision-language model.

    model: as for the trainer, its configuration at least a file or hub name.
    """
    if args.cast_lm_head_to_fp32:
        config = AutoConfig.from_pretrained(model) if isinstance(model, str) else unwrapped(model).config
        if config.tie_word_embeddings and hasattr(config, "vision_config"):
            raise UserError(
                "cast_lm_head_to_fp32: this model's output layer is tied to its embeddings, which TRL cannot cast in a "
                "vision-language model: set false"
            )


def keep_no_cast_weights(accelerator: Any) -> None:
    """Let autocast cast a weight each time instead of keeping the copy until the end of the step's backward pass.

    For float32 weights, the copies take half their size again; without the cache, a layer's copy lives while the layer
    runs.
    """
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


def keep_float32_outputs(accelerator: Any) -> None:
    """Stop FSDP2 wrappers from rounding the outputs of a forward pass: log-probabilities and entropies are float32.

    Accelerate rounds outputs to the precision of the weights, after any cast inside the model.
    """
    if accelerator.is_fsdp2 and FSDP_OUTPUTS.missing() is None:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def go_without(trainer: Trainer, line: str, sharing: bool = False) -> None:
    """Warn of a slower or coarser fallback, and record the line for its run.

    Raises UserError where `sharing` is lost and `require_sharing` is set.
    """
    if sharing and trainer.args.require_sharing:
        raise UserError(f"require_sharing = true, but {line}")
    logger.warning("%s", line)
    trainer.fallbacks.append(line)


# Each batch


def agree_on_images(trainer: Trainer, rows: list[Row]) -> None:
    """Make all ranks log the images of a generation batch, or none: TRL gathers them on ranks that have any.

    Raises UserError on all ranks where only some rows have images and the vision tower is sharded. Each pass through
    the tower gathers its weights, and ranks with only text would not run it.
    """
    have_images = [bool(row.get("images") or ("prompt" in row and prompt_images(row))) for row in rows]
    any_of_rank, all_of_rank = trainer.accelerator.gather(
        torch.tensor([[any(have_images), all(have_images)]], device=trainer.accelerator.device)
    ).T
    trainer.log_multimodal = trainer.args.log_multimodal and bool(any_of_rank.all())
    mixed = any_of_rank.any() and not all_of_rank.all()
    if mixed and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise UserError(
            "a batch holds rows with and without images, for which FSDP and ZeRO-3 would wait forever: train only on "
            "rows with images, or in data parallel"
        )


def check_reward_size(rewards: Tensor, weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise UserError for a reward, or a rollout's weighted sum of rewards, with an advantage that is not a number.

    Args:
        rewards: of every rollout and reward function, float32 [B, R]; NaN where a function returned None.
        weights: of the R functions.
        names: of the R functions.
    """
    for name, endless in zip(names, rewards.isinf().any(dim=0).tolist(), strict=True):
        if endless:
            raise UserError(f"the reward {name} is infinite, which gives no advantage: return finite numbers")
    products = rewards.double() * rewards.new_tensor(weights).double()
    largest = max(products.abs().nan_to_num().amax().item(), products.nansum(dim=1).abs().amax().item())
    if largest > MAX_REWARD:
        raise UserError(
            f"the weighted rewards ({', '.join(names)}) reach {largest:.2g}; advantages in float32 allow at most "
            f"{MAX_REWARD:g}: scale them down"
        )
