"""Families of vision-language models: one `Family` record per model type of transformers.

A family without a record trains with one row per rollout. docs/train/models.md adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from transformers import AutoConfig

from cppo.errors import UserError

PLAIN_TEXT = ("llama", "mistral", "qwen2", "qwen3")
VISION_ROPE_THETA = 10_000.0
"""Base of the rotary embedding in the vision tower of every published Qwen-VL model."""


class Sizes(NamedTuple):
    """Sizes of a tiny model: its text part's options and its vision tower.

    tokens: ids of `image`, and of `video`, `start` and `end` (of an image) where the family has them. side: in pixels,
    as `patch`, of the square images for a tower of one size.
    """

    text: dict[str, Any]
    tokens: dict[str, int]
    layers: int
    patch: int
    side: int


@dataclass(frozen=True)
class Family:
    """An architecture for which packed rows and plain rows get the same scores.

    Attributes:
        tiny: options of the family's configuration for a tiny model, which tries sharing before a run.
        images: layout of `pixel_values`: "patches" of all images, counted by `image_grid_thw`; "tiles" of all images,
            one or several each, with equal token counts unless `images_a_row` counts the images; or "rows" [B, images,
            ...], padded with images of zeros to the fullest row.
        image_inputs: the model's inputs that describe images.
        images_a_row: the input with the number of images of each row that has any; empty where the model needs none.
            LLaVA-OneVision cuts a single image into tiles, but not several.
        text_types: model types of its text parts. Their attention is causal and plain: no sinks, no soft caps, no
            attention between image tokens. The head's output is the logits, without soft cap or scale.
        placeholder_tokens: texts of the tokens that represent or frame an image or a video.
        placeholder_fields: fields of configuration and processor with the ids of such tokens.
        projector_parts: modules inside the vision tower that project into the language model; in most families the
            projector is outside.
    """

    tiny: Callable[[Sizes], dict[str, Any]]
    images: Literal["patches", "tiles", "rows"] = "tiles"
    image_inputs: tuple[str, ...] = ("pixel_values",)
    images_a_row: str = ""
    text_types: tuple[str, ...] = PLAIN_TEXT
    placeholder_tokens: tuple[str, ...] = ("<image>",)
    placeholder_fields: tuple[str, ...] = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    projector_parts: tuple[str, ...] = ()


def text_part(layers: int, **more: Any) -> dict[str, Any]:
    """Options of a tiny text part with 4 heads of size 8; `more` sets its vocabulary."""
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {**widths, "num_hidden_layers": layers, "tie_word_embeddings": False, **more}


def square_tower(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Options of a tiny vision tower for square images of one size."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    shape = {"num_hidden_layers": sizes.layers, "image_size": sizes.side, "patch_size": sizes.patch}
    return {**widths, **shape, **more}


def grid_tower(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Options of a tiny vision tower for images of any size, in patches."""
    shape = {"depth": sizes.layers, "num_heads": 2, "patch_size": sizes.patch}
    return {**shape, "temporal_patch_size": 2, "spatial_merge_size": 2, **more}


def mrope(**more: Any) -> dict[str, Any]:
    """Options of a tiny text part with positions in time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], **more}}


def _qwen(sizes: Sizes, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "text_config": {**sizes.text, **text},
        "vision_config": grid_tower(sizes, **vision),
        "image_token_id": sizes.tokens["image"],
        "video_token_id": sizes.tokens["video"],
        "vision_start_token_id": sizes.tokens["start"],
        "vision_end_token_id": sizes.tokens["end"],
    }


QWEN_TOWER = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
QWEN2_VL = Family(
    tiny=lambda sizes: _qwen(sizes, mrope(), {"embed_dim": 16, "hidden_size": 32}),
    images="patches",
    image_inputs=("pixel_values", "image_grid_thw"),
    text_types=("qwen2_vl_text",),
    placeholder_tokens=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    placeholder_fields=(
        "image_token_id",
        "video_token_id",
        "vision_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ),
    projector_parts=("merger",),
)
LLAVA = Family(
    tiny=lambda sizes: {
        "text_config": {"model_type": "llama", **sizes.text},
        "vision_config": square_tower(sizes, model_type="clip_vision_model", projection_dim=16),
        "image_token_index": sizes.tokens["image"],
        "vision_feature_layer": -1,
    },
    image_inputs=("pixel_values", "image_sizes"),
)
IDEFICS3 = Family(
    tiny=lambda sizes: {
        "text_config": {"model_type": "llama", **sizes.text},
        "vision_config": square_tower(sizes),
        "image_token_id": sizes.tokens["image"],
        "scale_factor": 2,
        "pad_token_id": sizes.text["pad_token_id"],
    },
    images="rows",
    image_inputs=("pixel_values", "pixel_attention_mask"),
    placeholder_tokens=("<image>", "<fake_token_around_image>", "<global-img>"),
)
FAMILIES = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": replace(
        QWEN2_VL,
        tiny=lambda sizes: _qwen(
            sizes,
            mrope(),
            {**QWEN_TOWER, "window_size": 2 * sizes.patch, "fullatt_block_indexes": [sizes.layers - 1]},
        ),
        text_types=("qwen2_5_vl_text",),
    ),
    "qwen3_vl": replace(
        QWEN2_VL,
        tiny=lambda sizes: _qwen(
            sizes,
            {"head_dim": 8, **mrope(mrope_interleaved=True)},
            {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
        text_types=("qwen3_vl_text",),
        projector_parts=("merger", "deepstack_merger_list"),
    ),
    "llava": LLAVA,
    "llava_onevision": replace(
        LLAVA,
        tiny=lambda sizes: {
            "text_config": {"model_type": "qwen2", **sizes.text},
            "vision_config": square_tower(sizes, model_type="siglip_vision_model", vision_use_head=False),
            "image_token_index": sizes.tokens["image"],
            "video_token_index": sizes.tokens["video"],
            "image_grid_pinpoints": [
                [sizes.side, sizes.side],
                [sizes.side, 2 * sizes.side],
                [2 * sizes.side, sizes.side],
            ],
        },
        image_inputs=("pixel_values", "image_sizes", "batch_num_images"),
        images_a_row="batch_num_images",
        placeholder_tokens=("<image>", "<video>"),
    ),
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "internvl": Family(
        tiny=lambda sizes: {
            "text_config": {"model_type": "qwen2", **sizes.text},
            "vision_config": square_tower(sizes, image_size=[sizes.side] * 2, patch_size=[sizes.patch] * 2),
            "image_token_id": sizes.tokens["image"],
        },
        placeholder_tokens=("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
    ),
}
"""Tested families by model type of transformers: their packed scores equal the plain ones."""

UNKNOWN = Family(tiny=lambda sizes: {}, projector_parts=("merger", "deepstack_merger_list"))
"""The record of every other family."""


def family_of(config: Any) -> Family:
    """The record of a model's family; `UNKNOWN` for other model types. config: the model's configuration."""
    return FAMILIES.get(config.model_type, UNKNOWN)


def tiny_config(model_type: str, sizes: Sizes) -> Any:
    """The configuration of a tiny model of one of `FAMILIES`."""
    return AutoConfig.for_model(model_type, **FAMILIES[model_type].tiny(sizes))


def takes_images_a_row(config: Any) -> bool:
    """Whether a model needs the number of images in each row. config: its configuration."""
    return bool(family_of(config).images_a_row)


def unshared_reason(config: Any) -> str | None:
    """Why a model cannot score packed rows that share a prompt, in one line; None if it can.

    config: the model's configuration.
    """
    text = config.get_text_config()
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"model type {config.model_type!r} is not among those with tested shared-prompt attention ({known})"
    if text.model_type not in family_of(config).text_types:
        return f"the attention of its text part, {text.model_type!r}, has no shared-prompt form"
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if sliding is not None or "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "its text part attends through a sliding window"
    return None


def vision_placeholder_ids(processing_class: Any, config: Any) -> list[int]:
    """Ids of tokens that represent images or videos; they must never be sampled as text.

    A sampled placeholder breaks the scoring pass: the model would look for an image that is not there. The placeholders
    of all families are banned, because a tokenizer may have another family's too.

    Args:
        processing_class: a transformers processor or tokenizer.
        config: the model's configuration.

    Returns:
        Sorted ids without duplicates; empty for a text-only model.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    vocabulary = tokenizer.get_vocab()
    ids: set[int] = set()
    for family in FAMILIES.values():
        ids.update(vocabulary[token] for token in family.placeholder_tokens if token in vocabulary)
        values = [
            getattr(holder, name, None) for holder in (config, processing_class) for name in family.placeholder_fields
        ]
        ids.update(value for value in values if isinstance(value, int) and value >= 0)
    return sorted(ids)


def check_vision_rope(name: str, config: Any) -> None:
    """Refuse a Qwen model with an unusual rotary base in its vision tower: vLLM ignores the model's base.

    Raises UserError.
    """
    rope = getattr(config.vision_config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", VISION_ROPE_THETA)
    if config.model_type.startswith("qwen") and theta != VISION_ROPE_THETA:
        raise UserError(
            f"--use_vllm: the vision tower of {name} has rope_theta {theta:g}, but vLLM always computes with "
            f"{VISION_ROPE_THETA:g}; leave out --use_vllm"
        )
