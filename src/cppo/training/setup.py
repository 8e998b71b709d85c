"""What is settled once, when a trainer is built: do the options fit, are prompts shared, what is never sampled."""

import logging
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftType
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig

from cppo.errors import UserError
from cppo.policy import (
    adapts_tied_weights,
    add_shared_prompt_forward,
    unshared_reason,
    unwrapped,
    vision_placeholder_ids,
    vision_tower_parameters,
)
from cppo.rewards import reward_columns
from cppo.training.option_rules import check_gate_reward
from cppo.training.view_inputs import Row, check_ends_with_question, embedded_images, prompt_images

logger = logging.getLogger(__name__)


def check_setup(trainer: Any) -> None:
    """Raise UserError for options that fit neither this processor, these rewards nor this way to shard a model."""
    trainer._tokenizer.padding_side = "left"  # as TRL sets it where it loads the processor
    reason = unshared_reason(trainer.model.config)
    if trainer.args.per_device_generation_batch_size is not None and reason is not None:
        raise UserError(f"per_device_generation_batch_size cuts batches by images, but {reason}: set null")
    if trainer.use_vllm and adapts_tied_weights(trainer.model):
        raise UserError(
            "the adapter lies on the embedding or the output layer, which share a weight in this model: vLLM would "
            "roll out another model than is trained; leave embed_tokens and lm_head out, or set use_vllm = false"
        )
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


def keep_float32_outputs(accelerator: Any) -> None:
    """Let no FSDP2 wrapper round what a forward pass returns: log-probabilities and entropies are float32.

    Accelerate rounds the outputs to the precision of the weights, after any cast inside the model.
    """
    if accelerator.is_fsdp2:
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


def share_prompts(trainer: Any) -> bool:
    """Let policy and reference score packed rows, if asked for and possible; say why if not."""
    if trainer.args.scorer != "shared":
        return False
    reason = unshared_reason(trainer.model.config)
    places = getattr(unwrapped(trainer.model), "hf_device_map", None) or {}
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
        if trainer.args.perception_memory == "sequential" and trainer.args.uses_perception:
            raise UserError(f"perception_memory = 'sequential' needs shared prompts, but {reason}: use 'joint'")
        logger.warning("Prompts and images are not shared over a group's rollouts: %s.", reason)
        return False
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            add_shared_prompt_forward(unwrapped(model), trainer.args.cast_lm_head_to_fp32)
    return True


def check_head(trainer: Any) -> None:
    """Raise UserError where TRL's fused head would get wrong gradients: with FSDP2, unless it is tied.

    Each process would train its part of the head on its own rollouts alone.
    """
    if not trainer.accelerator.is_fsdp2 or trainer._shares_prompts or trainer.args.needs_logits:
        return
    model = unwrapped(trainer.model)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise UserError(
            "scorer = 'kernel' is TRL's fused head, which with FSDP2 trains an untied output layer on a part of the "
            "rollouts: use 'shared' where the model can share prompts, else 'plain', or DeepSpeed"
        )


def agree_on_images(trainer: Any, rows: list[Row]) -> None:
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


def freeze_vision_tower(model: Any) -> None:
    """Let no gradient reach the weights of a model's vision tower. Raises UserError if it has none."""
    for parameter in vision_tower_parameters(unwrapped(model)):
        parameter.requires_grad_(False)


def ban_vision_placeholders(trainer: Any) -> list[int]:
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
