"""Fit a model to its run: what is frozen, what is never sampled, what is shared, and which kernels attend."""

from typing import Any, NamedTuple

from accelerate.utils import is_peft_model
from peft import PeftType
from transformers.integrations import is_deepspeed_zero3_enabled

from cppo.errors import UserError
from cppo.options.ascent import ENTROPY_ASCENT
from cppo.options.views import INSIDE_VIEWS
from cppo.policy import (
    add_shared_prompt_forward,
    leave_out_frozen_tower,
    unshared_reason,
    unwrapped,
    vision_placeholder_ids,
    vision_tower_parameters,
)
from cppo.policy.packed import attend_packed
from cppo.training.kernels import choose_kernels
from cppo.training.setup import Trainer, go_without
from cppo.upstream import PACKED_ATTENTION, SHARED_PREFILL


class Fit(NamedTuple):
    """What a model gives its run.

    Attributes:
        placeholder_ids: tokens that represent an image, which are never sampled.
        shares_prompts, shares_rollouts: whether updates and rollouts compute a prompt and its images once per group.
        kernels: the attention kernel of each part, in one line.
    """

    placeholder_ids: list[int]
    shares_prompts: bool
    shares_rollouts: bool
    kernels: str


def fit_model(trainer: Trainer) -> Fit:
    """Freeze, share and choose kernels as the options say. Raises UserError where the model does not allow it."""
    policy = unwrapped(trainer.model)
    if trainer.args.freeze_vision_tower:
        for parameter in vision_tower_parameters(policy):
            parameter.requires_grad_(False)
    leave_out_frozen_tower(policy)
    placeholder_ids = ban_vision_placeholders(trainer)
    shares_prompts, shares_rollouts = share_prompts(trainer)
    kernels = choose_kernels(trainer, shares_prompts)
    check_head(trainer, shares_prompts)
    admit_inside_views(trainer)
    admit_ascent(trainer)
    return Fit(placeholder_ids, shares_prompts, shares_rollouts, kernels)


def ban_vision_placeholders(trainer: Trainer) -> list[int]:
    """Ban tokens that represent an image from sampling; returns their ids."""
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


def share_prompts(trainer: Trainer) -> tuple[bool, bool]:
    """Let policy and reference score packed rows, if requested and possible; returns whether updates and rollouts
    share.

    Raises UserError where they do not share although an option needs it.
    """
    if trainer.args.scorer != "shared":
        return False, False
    policy = unwrapped(trainer.model)
    reason = unshared_reason(policy.config)
    places = getattr(policy, "hf_device_map", None) or {}
    if len(set(places.values())) > 1:
        reason = (
            "one process sees several GPUs and the model is split over them (launch one process per GPU, or set "
            "CUDA_VISIBLE_DEVICES)"
        )
    if learns_a_prompt(trainer.model):
        reason = "a prompt-learning adapter adds its own tokens before each row"
    if trainer.aux_loss_enabled:
        reason = "a mixture-of-experts model balances its experts over whole rows"
    if reason is not None:
        _check_unshared(trainer.args, reason)
        go_without(trainer, f"rollouts and updates do not share prompts and images in a group: {reason}", sharing=True)
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


def learns_a_prompt(model: Any) -> bool:
    """Whether a PEFT model learns virtual tokens instead of weights.

    Raises UserError for prefix tuning: with it, TRL cannot score the responses of a vision-language model.
    """
    if not is_peft_model(model):
        return False
    config = model.active_peft_config
    if config.peft_type == PeftType.PREFIX_TUNING:
        raise UserError("peft_config: TRL cannot train a prefix of a vision-language model: use LoRA or prompt tuning")
    return bool(config.is_prompt_learning)


def _generates(trainer: Trainer) -> bool:
    """Whether transformers' `generate` makes the rollouts."""
    return not (trainer.use_vllm or trainer.use_transformers_continuous_batching)


def _check_unshared(args: Any, reason: str) -> None:
    if args.perception_memory == "sequential" and args.uses_perception:
        raise UserError(f"perception_memory = 'sequential' needs shared prompts, but {reason}: use 'joint'")


def check_head(trainer: Trainer, shares_prompts: bool) -> None:
    """Raise UserError where TRL's fused head would get wrong gradients: with FSDP2, unless the head is tied.

    Each process would train its part of the head only on its own rollouts.
    """
    if not trainer.accelerator.is_fsdp2 or shares_prompts or trainer.args.needs_logits:
        return
    model = unwrapped(trainer.model)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise UserError(
            "scorer = 'kernel' is TRL's fused head, which with FSDP2 trains an untied output layer on part of the "
            "rollouts: use 'shared' where the model can share prompts, else 'plain', or DeepSpeed"
        )


def admit_inside_views(trainer: Trainer) -> None:
    """Give the model the attention that its views inside the model need.

    Raises UserError where its attention is of another kind, or where processes would wait for each other.
    """
    args, policy = trainer.args, unwrapped(trainer.model)
    names = [name for name in args.input_views.values() if name in INSIDE_VIEWS]
    reason = unshared_reason(policy.config)
    for name in names:
        if name != "image_removed" and reason is not None:
            raise UserError(f"removing_views = ['{name}'] changes the attention, but {reason}")
    if "values_replaced" in names:
        attend_packed(policy)
    alone = args.separate_view_pass or (args.adds_perception_loss and args.perception_view_policy == "rollout")
    sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    for name in names:
        if name != "values_replaced" and alone and sharded:
            raise UserError(
                f"removing_views = ['{name}'] scores views without the vision tower, and FSDP and ZeRO-3 would wait "
                "forever: set perception_view_policy = 'current' and perception_view_gradients = true"
            )


def admit_ascent(trainer: Trainer) -> None:
    """Raise UserError where no gradient reaches the pixels, or where processes would wait for each other."""
    if trainer.args.pixel_steps is None:
        return
    what = f"rollout_views = ['{ENTROPY_ASCENT}']"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(f"{what} needs a gradient outside the update, which DeepSpeed and FSDP do not give: use DDP")
    if not any(parameter.requires_grad for parameter in vision_tower_parameters(unwrapped(trainer.model))):
        raise UserError(f"{what} needs a gradient through the vision tower, but nothing in it is trained: train it too")
