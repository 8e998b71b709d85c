"""A tiny random model of each family with its real processor, in a folder as a hub would have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from cppo.assets.build import CHAT_TEMPLATE, build_tokenizer

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
SQUARE_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SQUARE = {"size": {"height": 32, "width": 32}}


class Parts(NamedTuple):
    """What a family is made of.

    `special` are the tokens that its tokenizer adds to the micro model's; a name that ends in `_token` is an attribute.
    """

    image_text: str
    special: dict[str, str]
    config: Callable[[dict[str, Any], Callable[[str], int]], Any]
    processor: Callable[[Any, str], Any]


def _qwen(config_class: type, processor_class: type, vision: dict[str, Any], text: dict[str, Any] = MROPE) -> Parts:
    """Qwen2-VL and its successors: tokens as the micro model's, images of 32x32 pixels and more."""
    video = (
        transformers.Qwen3VLVideoProcessor
        if config_class is transformers.Qwen3VLConfig
        else transformers.Qwen2VLVideoProcessor
    )
    images = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}

    def config(common: dict[str, Any], ids: Callable[[str], int]) -> Any:
        tokens = {f"{name}_token_id": ids(f"<|{name}_pad|>") for name in ("image", "video")}
        tokens |= {f"vision_{side}_token_id": ids(f"<|vision_{side}|>") for side in ("start", "end")}
        return config_class(text_config={**common, **text}, vision_config={**QWEN_VISION, **vision}, **tokens)

    def processor(tokenizer: Any, template: str) -> Any:
        return processor_class(
            image_processor=transformers.Qwen2VLImageProcessor(**images),
            tokenizer=tokenizer,
            video_processor=video(patch_size=8, merge_size=2),
            chat_template=template,
        )

    return Parts(QWEN_IMAGE, {}, config, processor)


def _llava_config(common: dict[str, Any], ids: Callable[[str], int]) -> Any:
    return transformers.LlavaConfig(
        text_config={"model_type": "llama", **common},
        vision_config={"model_type": "clip_vision_model", **SQUARE_VISION, "projection_dim": 16},
        image_token_index=ids("<image>"),
        vision_feature_layer=-1,
    )


def _llava_processor(tokenizer: Any, template: str) -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


PINPOINTS = [[32, 32], [32, 64], [64, 32]]


def _onevision_config(common: dict[str, Any], ids: Callable[[str], int]) -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **common},
        vision_config={"model_type": "siglip_vision_model", **SQUARE_VISION, "vision_use_head": False},
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def _onevision_processor(tokenizer: Any, template: str) -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(**SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


IDEFICS_WORDS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IDEFICS_WORDS += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
IDEFICS_TOKENS = {word: word for word in IDEFICS_WORDS}


def _idefics(config_class: type, processor_class: type, image_processor_class: type, **more: Any) -> Parts:
    def config(common: dict[str, Any], ids: Callable[[str], int]) -> Any:
        return config_class(
            text_config={"model_type": "llama", **common},
            vision_config=SQUARE_VISION,
            image_token_id=ids("<image>"),
            scale_factor=2,
            pad_token_id=common["pad_token_id"],
        )

    def processor(tokenizer: Any, template: str) -> Any:
        return processor_class(
            image_processor=image_processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
            tokenizer=tokenizer,
            image_seq_len=4,
            chat_template=template,
            **{name: make() for name, make in more.items()},
        )

    return Parts("<image>", IDEFICS_TOKENS, config, processor)


def _smolvlm_video() -> Any:
    return transformers.SmolVLMVideoProcessor(
        size={"longest_edge": 64},
        max_image_size={"longest_edge": 32},
        video_sampling={"fps": 1, "max_frames": 2, "video_size": {"longest_edge": 64}},
        fps=1,
        num_frames=2,
    )


INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _internvl_config(common: dict[str, Any], ids: Callable[[str], int]) -> Any:
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **common},
        vision_config={**SQUARE_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=ids("<IMG_CONTEXT>"),
    )


def _internvl_processor(tokenizer: Any, template: str) -> Any:
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(**SQUARE, min_patches=1, max_patches=2),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(**SQUARE),
        image_seq_length=4,
        chat_template=template,
    )


GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def _gemma_config(common: dict[str, Any], ids: Callable[[str], int]) -> Any:
    return transformers.Gemma3Config(
        text_config={
            **common,
            "head_dim": 8,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 2,
        },
        vision_config={**SQUARE_VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )


def _gemma_processor(tokenizer: Any, template: str) -> Any:
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(**SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template,
    )


FAMILIES: dict[str, Parts] = {
    "qwen2_vl": _qwen(transformers.Qwen2VLConfig, transformers.Qwen2VLProcessor, {"embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": _qwen(
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLProcessor,
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
    ),
    "qwen3_vl": _qwen(
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLProcessor,
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        {"head_dim": 8, "rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}},
    ),
    "llava": Parts("<image>", {"image": "<image>"}, _llava_config, _llava_processor),
    "llava_onevision": Parts(
        "<image>", {"image": "<image>", "video": "<video>"}, _onevision_config, _onevision_processor
    ),
    "idefics3": _idefics(
        transformers.Idefics3Config, transformers.Idefics3Processor, transformers.Idefics3ImageProcessor
    ),
    "smolvlm": _idefics(
        transformers.SmolVLMConfig,
        transformers.SmolVLMProcessor,
        transformers.SmolVLMImageProcessor,
        video_processor=_smolvlm_video,
    ),
    "internvl": Parts("<IMG_CONTEXT>", INTERNVL_TOKENS, _internvl_config, _internvl_processor),
    "gemma3": Parts("<start_of_image>", GEMMA_TOKENS, _gemma_config, _gemma_processor),
}
"""Families by transformers' model type."""


def build_family(name: str, folder: Path) -> str:
    """Write model and processor of a family to `folder`; the weights are widened so that a token sees the image."""
    parts = FAMILIES[name]
    tokenizer = build_tokenizer(["What is number 0123456789 see \\boxed{}"], 300)
    tokenizer.add_tokens(list(parts.special.values()), special_tokens=True)
    # Some processors ask the tokenizer for these by name.
    named = {key: token for key, token in parts.special.items() if key.endswith("_token")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=named,
    )
    processor = parts.processor(tokenizer, CHAT_TEMPLATE.replace(QWEN_IMAGE, parts.image_text))
    common = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = parts.config(common, tokenizer.convert_tokens_to_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any() and parameter.ndim == 2:  # Gemma's projector begins at zero
                    parameter.normal_(std=0.02)
                if parameter.ndim >= 2:
                    parameter.mul_(8.0)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def with_first_token(processor: Any) -> Any:
    """The processor with a first token that both its chat template writes and its tokenizer adds, as Gemma 3's do."""
    tokenizer = processor.tokenizer
    first = tokenizer.bos_token = tokenizer.pad_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.pad_token_id)]
    )
    processor.chat_template = first + processor.chat_template
    return processor
