"""Facts that differ between families of vision-language models, and the model inside what trainers wrap around it."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch.nn import Parameter
from transformers import PreTrainedModel

from cppo.errors import UserError

PLACEHOLDER_ATTRIBUTES = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "vision_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
"""Configuration fields in which transformers' models keep the ids of tokens that stand for, or frame, an image."""

PLACEHOLDER_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<image>",
    "<video>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<fake_token_around_image>",
    "<global-img>",
)
"""The same tokens by their text, for families that keep them in the tokenizer alone."""

SHARED_PROMPT_MODELS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_onevision",
    "idefics3",
    "smolvlm",
    "internvl",
)
"""Model types whose packed scores are tested against the plain ones."""

SHARED_PROMPT_TEXT_MODELS = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)
"""Their text parts with plain causal attention: no sinks, no soft caps, no attention between image tokens. The logits
are the head's output, without soft cap or scale."""

IMAGES_A_ROW = "batch_num_images"
"""LLaVA-OneVision's input with the number of images of each row that has any."""


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, `torch.compile` and PEFT wrappers."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            wrapper, model = model, extract_model_from_parallel(model, keep_torch_compile=False)
            if model is wrapper:
                raise TypeError(f"{type(model).__name__} is no transformers model, and no known wrapper of one")
    return model


def takes_images_a_row(config: Any) -> bool:
    """Whether a model must be told how many images each row has: one alone is cut into tiles, several are not."""
    return config.model_type == "llava_onevision"


def unshared_reason(config: Any) -> str | None:
    """Why a model cannot score packed rows that share a prompt over its rollouts, in one line; None if it can.

    config: the model's configuration.
    """
    text = config.get_text_config()
    if config.model_type not in SHARED_PROMPT_MODELS:
        known = ", ".join(SHARED_PROMPT_MODELS)
        return f"model type {config.model_type!r} is not among those with tested shared-prompt attention ({known})"
    if text.model_type not in SHARED_PROMPT_TEXT_MODELS:
        return f"the attention of its text part, {text.model_type!r}, has no shared-prompt form"
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if sliding is not None or "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "its text part attends through a sliding window"
    return None


PROJECTOR_PARTS = {"merger", "deepstack_merger_list"}
"""Parts of Qwen's vision towers that project into the language model; other families have a module outside for it."""


def vision_tower_parameters(model: Any) -> list[Parameter]:
    """The parameters of a vision-language model's vision tower, without its projector into the language model.

    model: a transformers model without wrappers; adapters in the tower belong to it.

    Raises:
        UserError: it has no vision tower.
    """
    tower = model.get_encoder(modality="image")
    if tower is model or tower is model.base_model:
        raise UserError(f"freeze_vision_tower = True, but a model of type {model.config.model_type!r} has none")
    return [parameter for name, parameter in tower.named_parameters() if PROJECTOR_PARTS.isdisjoint(name.split("."))]


def vision_placeholder_ids(processing_class: Any, config: Any) -> list[int]:
    """Token ids that stand for images or videos and therefore must never be sampled as text.

    One sampled placeholder breaks the scoring pass: the model would look for an image that is not there.

    Args:
        processing_class: a transformers processor or tokenizer.
        config: the model's configuration.

    Returns:
        Sorted ids without duplicates; empty for a text-only model.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in PLACEHOLDER_TOKENS if token in vocabulary}
    for holder in (config, processing_class):
        values = (getattr(holder, name, None) for name in PLACEHOLDER_ATTRIBUTES)
        ids.update(value for value in values if isinstance(value, int) and value >= 0)
    return sorted(ids)
