"""Facts that differ between families of vision-language models."""

from typing import Any

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
