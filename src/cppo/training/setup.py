"""What must fit before a step: data, options, model, what prompts share, and a batch's images and rewards."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate.utils import AutocastKwargs, is_peft_model
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftType
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig

from cppo.errors import UserError
from cppo.messages import embedded_images
from cppo.methods import get_method
from cppo.options import check_gate_reward
from cppo.policy import (
    adapts_tied_weights,
    add_shared_prompt_forward,
    unshared_reason,
    unwrapped,
    vision_placeholder_ids,
)
from cppo.policy.families import check_vision_rope
from cppo.policy.prompts import Row, check_ends_with_question, prompt_images
from cppo.rewards import load_reward, reward_columns
from cppo.rewards.spec import parse_reward
from cppo.training.config import CPPOConfig
from cppo.upstream import (
    COLOCATED_PROMPTS,
    FSDP_OUTPUTS,
    LEARNING_RATE,
    PACKED_ATTENTION,
    SAMPLER_ORDER,
    SHARED_PREFILL,
    check_needed_parts,
)

logger = logging.getLogger(__name__)
MAX_REWARD = 1e18
"""A weighted sum beyond it: its square, summed over a batch for the deviation, would leave float32 (3.4e38)."""


class Trainer(Protocol):
    """What is read here of a `CPPOTrainer`, and set: `fallbacks`, what is logged and what is sampled."""

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


# Options, model and what they share


def check_setup(trainer: Trainer) -> None:
    """Raise UserError for options that fit neither this processor, these rewards nor this way to shard a model."""
    processor = trainer.processing_class
    getattr(processor, "tokenizer", processor).padding_side = "left"  # as TRL sets it where it loads the processor
    reason = unshared_reason(trainer.model.config)
    if trainer.args.per_device_generation_batch_size is not None and reason is not None:
        raise UserError(f"per_device_generation_batch_size cuts batches by images, but {reason}: set null")
    if trainer.use_vllm:
        _check_vllm(trainer)
    check_gate_reward(vars(trainer.args), trainer.reward_func_names)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if trainer.args.scorer == "shared" and is_deepspeed_zero3_enabled():
        raise UserError("scorer = 'shared' does not gather ZeRO-3 weights alike on all ranks: use 'kernel'")
    if trainer.args.log_perception_grad_share:
        raise UserError("log_perception_grad_share = True works on whole gradients, not with DeepSpeed or FSDP")
    several_passes = trainer.args.perception_memory == "sequential" or trainer.args.separate_view_pass
    if trainer.args.scorer == "shared" and several_passes:
        raise UserError(
            "DeepSpeed and FSDP gather weights on each pass, and ranks without gated-in rollouts would make fewer: "
            "set perception_memory = 'joint' and perception_view_gradients = True, or scorer = 'kernel'"
        )


def _check_vllm(trainer: Trainer) -> None:
    """Raise UserError where vLLM would roll out another model than is trained, or answer other prompts."""
    config = unwrapped(trainer.model).config
    check_vision_rope(str(config.name_or_path), config)
    if adapts_tied_weights(trainer.model):
        raise UserError(
            "the adapter lies on the embedding or the output layer, which share a weight in this model: vLLM would "
            "roll out another model than is trained; leave embed_tokens and lm_head out, or set use_vllm = false"
        )
    if trainer.args.vllm_mode == "colocate" and (line := COLOCATED_PROMPTS.missing()) is not None:
        remedy = "set vllm_mode = 'server', or install the versions that docs/reference/versions.md names"
        raise UserError(f"{line}; {remedy}")


def try_parts(trainer: Trainer) -> None:
    """Try the parts of other libraries that this trainer needs whatever its model is.

    Raises UserError where one is gone that has no replacement.
    """
    check_needed_parts()
    for part in (SAMPLER_ORDER, LEARNING_RATE, *([FSDP_OUTPUTS] if trainer.accelerator.is_fsdp2 else [])):
        if (line := part.missing()) is not None:
            go_without(trainer, line)


def warn_of_other_rewards(method: str, names: Sequence[str]) -> None:
    """Say which rewards of the method are not among those of a trainer, by the names of their functions."""
    left_out = [text for text in get_method(method).rewards if load_reward(parse_reward(text)).__name__ not in names]
    if left_out:
        logger.warning(
            "rewards of the method %s are left out: %s; `method` among the rewards stands for all of them",
            method,
            ", ".join(left_out),
        )


def check_castable_head(model: Any, args: GRPOConfig) -> None:
    """Raise UserError where TRL would cast a tied output layer, which it cannot in a vision-language model.

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
    """Let autocast cast a weight anew each time, not keep the copy until the step's backward pass is over.

    With float32 weights the copies take half their size again; a copy of a layer's own lives as long as the layer runs.
    """
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


def keep_float32_outputs(accelerator: Any) -> None:
    """Let no FSDP2 wrapper round what a forward pass returns: log-probabilities and entropies are float32.

    Accelerate rounds the outputs to the precision of the weights, after any cast inside the model.
    """
    if accelerator.is_fsdp2 and FSDP_OUTPUTS.missing() is None:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def learns_a_prompt(model: Any) -> bool:
    """Whether a PEFT model learns virtual tokens instead of weights.

    Raises UserError for prefix tuning, with which TRL cannot score the responses of a vision-language model.
    """
    if not is_peft_model(model):
        return False
    config = model.active_peft_config
    if config.peft_type == PeftType.PREFIX_TUNING:
        raise UserError("peft_config: TRL cannot train a prefix of a vision-language model: use LoRA or prompt tuning")
    return bool(config.is_prompt_learning)


def share_prompts(trainer: Trainer) -> tuple[bool, bool]:
    """Let policy and reference score packed rows, if asked for and possible; whether updates and rollouts then share.

    Raises UserError where they do not, although an option needs it.
    """
    if trainer.args.scorer != "shared":
        return False, False
    policy = unwrapped(trainer.model)
    reason = unshared_reason(policy.config)
    places = getattr(policy, "hf_device_map", None) or {}
    if len(set(places.values())) > 1:
        reason = (
            "one process sees several GPUs and the model is split over them (launch a process a GPU, or set "
            "CUDA_VISIBLE_DEVICES)"
        )
    if learns_a_prompt(trainer.model):
        reason = "a prompt-learning adapter puts tokens of its own before each row"
    if trainer.aux_loss_enabled:
        reason = "a mixture-of-experts model balances its experts over whole rows"
    if reason is not None:
        _check_unshared(trainer.args, reason)
        go_without(
            trainer, f"rollouts and updates do not share prompts and images over a group: {reason}", sharing=True
        )
        return False, False
    rollouts = SHARED_PREFILL.missing(policy.config.model_type)
    if rollouts is not None and _generates(trainer):
        go_without(trainer, rollouts, sharing=True)
    eager = policy.config.get_text_config()._attn_implementation.startswith("eager")
    updates = PACKED_ATTENTION.missing(policy.config.model_type, "eager" if eager else "sdpa")
    if updates is not None:
        _check_unshared(trainer.args, updates)
        go_without(trainer, updates, sharing=True)
    else:
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                add_shared_prompt_forward(unwrapped(model), trainer.args.cast_lm_head_to_fp32)
    return updates is None, rollouts is None and _generates(trainer)


def go_without(trainer: Trainer, line: str, sharing: bool = False) -> None:
    """Warn of something that this trainer does in a slower or coarser way, and remember the line for its run.

    Raises UserError where `sharing` is lost and `require_sharing` is set.
    """
    if sharing and trainer.args.require_sharing:
        raise UserError(f"require_sharing = true, but {line}")
    logger.warning("%s", line)
    trainer.fallbacks.append(line)


def _generates(trainer: Trainer) -> bool:
    """Whether rollouts come from transformers' `generate`."""
    return not (trainer.use_vllm or trainer.use_transformers_continuous_batching)


def _check_unshared(args: Any, reason: str) -> None:
    if args.perception_memory == "sequential" and args.uses_perception:
        raise UserError(f"perception_memory = 'sequential' needs shared prompts, but {reason}: use 'joint'")


def check_head(trainer: Trainer, shares_prompts: bool) -> None:
    """Raise UserError where TRL's fused head would get wrong gradients: with FSDP2, unless it is tied.

    Each process would train its part of the head on its own rollouts alone.
    """
    if not trainer.accelerator.is_fsdp2 or shares_prompts or trainer.args.needs_logits:
        return
    model = unwrapped(trainer.model)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise UserError(
            "scorer = 'kernel' is TRL's fused head, which with FSDP2 trains an untied output layer on a part of the "
            "rollouts: use 'shared' where the model can share prompts, else 'plain', or DeepSpeed"
        )


def ban_vision_placeholders(trainer: Trainer) -> list[int]:
    """Never sample a token that stands for an image; the ids of these tokens."""
    placeholders = vision_placeholder_ids(trainer.processing_class, trainer.model.config)
    if not placeholders:
        return placeholders
    if trainer.use_vllm:
        options = trainer.vllm_generation.generation_kwargs
        options["logit_bias"] = {**dict.fromkeys(placeholders, -100.0), **(options.get("logit_bias") or {})}
        return placeholders
    ids = sorted({*placeholders, *(trainer.generation_config.suppress_tokens or [])})
    trainer.generation_config.suppress_tokens = ids
    trainer.generation_kwargs["suppress_tokens"] = ids
    return placeholders


# Each batch


def agree_on_images(trainer: Trainer, rows: list[Row]) -> None:
    """Let all ranks log the images of a generation batch or none: TRL gathers them on the ranks that have any.

    Raises UserError on all ranks where some rows have images, others none, and the vision tower is sharded: its weights
    are gathered on each pass through it, which ranks with nothing but text would not make.
    """
    have_images = [bool(row.get("images") or ("prompt" in row and prompt_images(row))) for row in rows]
    any_of_rank, all_of_rank = trainer.accelerator.gather(
        torch.tensor([[any(have_images), all(have_images)]], device=trainer.accelerator.device)
    ).T
    trainer.log_multimodal = trainer.args.log_multimodal and bool(any_of_rank.all())
    mixed = any_of_rank.any() and not all_of_rank.all()
    if mixed and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise UserError(
            "a batch holds rows with and without images, for which FSDP and ZeRO-3 would wait forever: train on rows "
            "with images alone, or in data parallel"
        )


def check_reward_size(rewards: Tensor, weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise UserError for a reward, or a rollout's weighted sum of rewards, whose advantage would not be a number.

    Args:
        rewards: of every rollout and reward function, float32 [B, R]; NaN where a function returned None.
        weights: of the R functions.
        names: of the R functions.
    """
    for name, endless in zip(names, rewards.isinf().any(dim=0).tolist(), strict=True):
        if endless:
            raise UserError(f"the reward {name} is infinite, which makes no advantage: let it return finite numbers")
    products = rewards.double() * rewards.new_tensor(weights).double()
    largest = max(products.abs().nan_to_num().amax().item(), products.nansum(dim=1).abs().amax().item())
    if largest > MAX_REWARD:
        raise UserError(
            f"the rewards ({', '.join(names)}) reach {largest:.2g} with their weights; advantages in float32 take "
            f"at most {MAX_REWARD:g}: scale them down"
        )
