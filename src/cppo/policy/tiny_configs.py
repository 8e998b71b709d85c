"""Configurations of tiny models of every family that shares prompts, by transformers' model type."""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers

MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}}


class Sizes(NamedTuple):
    """What the caller chooses: vocabulary and length of the text part, and the vision tower's sizes."""

    text: dict[str, Any]
    tokens: dict[str, int]
    """Ids of `image`, and of `video`, `start` and `end` (of an image) where the family has them."""

    layers: int
    """Of the vision tower."""

    patch: int
    side: int
    """Of the square images that towers of one size take."""


def text_part(layers: int, **more: Any) -> dict[str, Any]:
    """Options of a text part of 4 heads of 8 numbers each; `more` are those of its vocabulary."""
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {**widths, "num_hidden_layers": layers, "tie_word_embeddings": False, **more}


def _qwen(sizes: Sizes, text: dict[str, Any] = MROPE, **vision: Any) -> dict[str, Any]:
    shape = {"depth": sizes.layers, "num_heads": 2, "patch_size": sizes.patch}
    return {
        "text_config": {**sizes.text, **text},
        "vision_config": {**shape, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision},
        "image_token_id": sizes.tokens["image"],
        "video_token_id": sizes.tokens["video"],
        "vision_start_token_id": sizes.tokens["start"],
        "vision_end_token_id": sizes.tokens["end"],
    }


def qwen2_vl(sizes: Sizes) -> Any:
    return transformers.Qwen2VLConfig(**_qwen(sizes, embed_dim=16, hidden_size=32))


def qwen2_5_vl(sizes: Sizes) -> Any:
    widths: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
    windows: dict[str, Any] = {"window_size": 2 * sizes.patch, "fullatt_block_indexes": [sizes.layers - 1]}
    return transformers.Qwen2_5_VLConfig(**_qwen(sizes, **widths, **windows))


def qwen3_vl(sizes: Sizes) -> Any:
    widths: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
    vision: dict[str, Any] = {**widths, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text: dict[str, Any] = {"head_dim": 8, "rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(**_qwen(sizes, text, **vision))


def square_tower(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Options of a vision tower that takes square images of one size."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    shape = {"num_hidden_layers": sizes.layers, "image_size": sizes.side, "patch_size": sizes.patch}
    return {**widths, **shape, **more}


def llava(sizes: Sizes) -> Any:
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **sizes.text},
        vision_config=square_tower(sizes, model_type="clip_vision_model", projection_dim=16),
        image_token_index=sizes.tokens["image"],
        vision_feature_layer=-1,
    )


def llava_onevision(sizes: Sizes) -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **sizes.text},
        vision_config=square_tower(sizes, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=sizes.tokens["image"],
        video_token_index=sizes.tokens["video"],
        image_grid_pinpoints=pinpoints(sizes.side),
    )


def pinpoints(side: int) -> list[list[int]]:
    """The sizes, in pixels, that LLaVA-OneVision cuts into tiles of this side."""
    return [[side, side], [side, 2 * side], [2 * side, side]]


def _idefics(sizes: Sizes) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **sizes.text},
        "vision_config": square_tower(sizes),
        "image_token_id": sizes.tokens["image"],
        "scale_factor": 2,
        "pad_token_id": sizes.text["pad_token_id"],
    }


def idefics3(sizes: Sizes) -> Any:
    return transformers.Idefics3Config(**_idefics(sizes))


def smolvlm(sizes: Sizes) -> Any:
    return transformers.SmolVLMConfig(**_idefics(sizes))


def internvl(sizes: Sizes) -> Any:
    pairs = {"image_size": [sizes.side, sizes.side], "patch_size": [sizes.patch, sizes.patch]}
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **sizes.text},
        vision_config=square_tower(sizes, **pairs),
        image_token_id=sizes.tokens["image"],
    )


CONFIGS: dict[str, Callable[[Sizes], Any]] = {
    make.__name__: make
    for make in (qwen2_vl, qwen2_5_vl, qwen3_vl, llava, llava_onevision, idefics3, smolvlm, internvl)
}
