"""A GPU's work in training, and the ways to spread training over GPUs, as far as memory depends on them."""

from dataclasses import dataclass

HALF, FULL, INDEX = 2, 4, 8
"""Bytes of a number in bfloat16 and in float32, and of an index."""
DEFAULT_PROMPT_TOKENS = 1024
"""Prompt length if the recipe sets no limit."""


@dataclass(frozen=True)
class Work:
    """A GPU's work.

    Attributes:
        gpus: number of GPUs that train together.
        prompt_tokens, image_tokens, response_tokens: of a rollout; the prompt's include the image's.
        num_generations: rollouts of a prompt.
        micro_batch: rollouts of a backward pass.
        step_rollouts, batch_rollouts: of an optimizer step, and of a generation batch.
        generation_slice: rollouts that are generated at a time.
        views: scored for each rollout, beside its image.
        view_gradients: whether views take part in the backward pass.
        sequential: whether the image and each view have separate passes, computed again for the backward pass.
        shared: whether prompts are scored once for a group; otherwise once for each row.
        checkpointing: whether layers are computed again for the backward pass.
        reference: whether there is a reference model.
        frozen_tower: whether the vision tower is not trained.
        lora_r: rank of an adapter.
    """

    gpus: int
    prompt_tokens: int
    image_tokens: int
    response_tokens: int
    num_generations: int
    micro_batch: int
    step_rollouts: int
    batch_rollouts: int
    generation_slice: int
    views: int
    view_gradients: bool = True
    sequential: bool = False
    shared: bool = True
    checkpointing: bool = True
    reference: bool = False
    frozen_tower: bool = False
    lora_r: int = 16


@dataclass(frozen=True)
class Way:
    """A way to spread training over GPUs.

    Attributes:
        stream: bytes of a number of the hidden states between layers; float32 weights under autocast give 4.
        shards: whether weights, gradients and optimizer are spread over the GPUs.
        adapter: whether only an adapter is trained.
        packs: whether prompts can be shared.
        gathers_all: whether all weights are gathered during generation.
    """

    name: str
    stream: int = HALF
    shards: bool = False
    adapter: bool = False
    packs: bool = True
    gathers_all: bool = False


DDP = Way("DDP", stream=FULL)
FSDP2 = Way("FSDP2", shards=True)
ZERO3 = Way("ZeRO-3", shards=True, packs=False, gathers_all=True)
LORA = Way("LoRA", adapter=True)
WAYS = (DDP, FSDP2, ZERO3, LORA)
