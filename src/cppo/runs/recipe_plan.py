"""Lengths, sizes and the spread over GPUs, from a recipe and its launch, for the memory plan."""

import os
from types import SimpleNamespace

from cppo.errors import UserError
from cppo.hooks import register_own
from cppo.options import TrainOptions, schema
from cppo.perception import SHAPINGS, adds_perception_loss, scored_views
from cppo.recipes import Recipe
from cppo.runs.memory_plan import Need
from cppo.runs.memory_work import DDP, DEFAULT_PROMPT_TOKENS, FSDP2, LORA, ZERO3, Way, Work

GIB = 2**30


def recipe_work(
    recipe: Recipe,
    gpus: int,
    prompt_tokens: int | None = None,
    image_tokens: int | None = None,
    response_tokens: int | None = None,
    micro_batch: int | None = None,
    lora_r: int | None = None,
) -> Work:
    """Each GPU's work by the recipe; arguments replace its values.

    Args:
        recipe: of a training.
        prompt_tokens: by default the recipe's longest, or `DEFAULT_PROMPT_TOKENS`.
        image_tokens: part of them; by default three quarters.

    Raises:
        UserError: an image leaves no text in its prompt, or a micro-batch is larger than a step.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    inherited = {name: field.default for name, field in schema("train").inherited.items()}
    config = SimpleNamespace(**{**inherited, **recipe.resolved})
    prompt = prompt_tokens or options.max_prompt_tokens or DEFAULT_PROMPT_TOKENS
    image = prompt * 3 // 4 if image_tokens is None else image_tokens
    if image >= prompt:
        raise UserError(f"--image_tokens {image} leaves no text in a prompt of {prompt} tokens: give a longer prompt")
    rollouts = config.per_device_train_batch_size
    step = rollouts * config.gradient_accumulation_steps
    if micro_batch is not None and micro_batch > step:
        raise UserError(f"--micro_batch {micro_batch}: each GPU has {step} rollouts in a step: give at most that many")
    register_own(vars(config))
    adds_loss = adds_perception_loss(config)
    uses_views = adds_loss or config.perception_sink in SHAPINGS
    # Without steps_per_generation TRL uses gradient_accumulation_steps.
    batch = rollouts * (config.steps_per_generation or config.gradient_accumulation_steps)
    at_a_time = 0 if config.use_vllm else config.per_device_generation_batch_size or batch
    return Work(
        gpus=gpus,
        prompt_tokens=prompt,
        image_tokens=image,
        response_tokens=response_tokens or config.max_completion_length,
        num_generations=config.num_generations,
        micro_batch=micro_batch or rollouts,
        step_rollouts=step,
        batch_rollouts=batch,
        generation_slice=min(at_a_time, batch),
        views=len(scored_views(config)) if uses_views else 0,
        view_gradients=adds_loss and config.perception_view_policy == "current" and config.perception_view_gradients,
        sequential=config.perception_memory == "sequential",
        shared=config.scorer == "shared",
        checkpointing=config.gradient_checkpointing,
        reference=config.beta != 0,
        frozen_tower=config.freeze_vision_tower,
        lora_r=lora_r or options.lora_r,
    )


def launched_way(adapter: bool) -> tuple[Way, int]:
    """How this process was launched to train, and on how many GPUs, from the variables of `accelerate` and `torchrun`.

    adapter: whether only an adapter is trained.
    """
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    if adapter:
        return LORA, gpus
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return FSDP2, gpus
    return ZERO3 if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else DDP, gpus


def arithmetic_text(way: Way, work: Work, need: Need, measured: tuple[int, int] | None = None) -> str:
    """Memory of rollouts and update on each GPU, by arithmetic.

    measured: measured bytes of rollouts and update on a GPU here.
    """
    spread = f"{way.name} on {work.gpus} GPUs" if work.gpus > 1 else f"{way.name} on one GPU".removeprefix("DDP on ")
    text = (
        f"{spread}, by `cppo plan`, not measured: rollouts {need.rollouts / GIB:.2f} GiB, update "
        f"{need.update / GIB:.2f} GiB on each, at {work.prompt_tokens:,} + {work.response_tokens:,} tokens"
    )
    if measured is None:
        return text
    rollouts, update = (size / GIB for size in measured)
    return f"{text}; measured on this GPU at worst: rollouts {rollouts:.2f} GiB, update {update:.2f} GiB"
