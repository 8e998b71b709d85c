"""A tiny random model of each family with its real processor, in a folder as from a hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from cppo.assets.build import CHAT_TEMPLATE, build_tokenizer
from cppo.policy.families import Sizes, square_tower, text_part, tiny_config

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
SIDE, PATCH = 32, 8
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]


def gemma3(sizes: Sizes) -> Any:
    sliding = {"sliding_window": 16, "sliding_window_pattern": 2, "num_hidden_layers": 2}
    return transformers.Gemma3Config(
        text_config={**sizes.text, "head_dim": 8, **sliding},
        vision_config=square_tower(sizes, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=sizes.tokens["start"],
        eoi_token_index=sizes.tokens["end"],
        image_token_index=sizes.tokens["image"],
    )


class Parts(NamedTuple):
    """The parts of a family, beside its configuration.

    `tokens` are those that the configuration names; `special` are the tokens that its tokenizer adds to the micro
    model's; a name that ends in `_token` is an attribute.
    """

    image_text: str
    tokens: dict[str, str]
    special: dict[str, str]
    processor: Callable[[Any, str], Any]


def _qwen(processor_class: type, video_class: type) -> Parts:
    """Qwen2-VL and its successors: tokens as the micro model's, images of 32x32 pixels and more."""
    images = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}

    def processor(tokenizer: Any, template: str) -> Any:
        return processor_class(
            image_processor=transformers.Qwen2VLImageProcessor(**images),
            tokenizer=tokenizer,
            video_processor=video_class(patch_size=PATCH, merge_size=2),
            chat_template=template,
        )

    return Parts(QWEN_IMAGE, QWEN_TOKENS, {}, processor)


def _llava_processor(tokenizer: Any, template: str) -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
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


def _idefics(processor_class: type, image_processor_class: type, **more: Any) -> Parts:
    def processor(tokenizer: Any, template: str) -> Any:
        return processor_class(
            image_processor=image_processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
            tokenizer=tokenizer,
            image_seq_len=4,
            chat_template=template,
            **{name: make() for name, make in more.items()},
        )

    return Parts("<image>", {"image": "<image>"}, IDEFICS_TOKENS, processor)


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


def _internvl_processor(tokenizer: Any, template: str) -> Any:
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(**SQUARE, min_patches=1, max_patches=2),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(**SQUARE),
        image_seq_length=4,
        chat_template=template,
    )


GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def _gemma_processor(tokenizer: Any, template: str) -> Any:
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(**SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template,
    )


LLAVA_TOKENS = {"image": "<image>"}
ONEVISION_TOKENS = {"image": "<image>", "video": "<video>"}
FAMILIES: dict[str, Parts] = {
    "qwen2_vl": _qwen(transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor),
    "qwen2_5_vl": _qwen(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
    "qwen3_vl": _qwen(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    "llava": Parts("<image>", LLAVA_TOKENS, LLAVA_TOKENS, _llava_processor),
    "llava_onevision": Parts("<image>", ONEVISION_TOKENS, ONEVISION_TOKENS, _onevision_processor),
    "idefics3": _idefics(transformers.Idefics3Processor, transformers.Idefics3ImageProcessor),
    "smolvlm": _idefics(
        transformers.SmolVLMProcessor, transformers.SmolVLMImageProcessor, video_processor=_smolvlm_video
    ),
    "internvl": Parts("<IMG_CONTEXT>", {"image": "<IMG_CONTEXT>"}, INTERNVL_TOKENS, _internvl_processor),
    "gemma3": Parts(
        "<start_of_image>",
        {"image": "<image_soft_token>", "start": "<start_of_image>", "end": "<end_of_image>"},
        GEMMA_TOKENS,
        _gemma_processor,
    ),
}
"""Families by transformers' model type."""


def build_processor(name: str) -> Any:
    """The processor of a family, with a small tokenizer."""
    parts = FAMILIES[name]
    tokenizer = build_tokenizer(["What is number 0123456789 see \\boxed{}"], 300)
    tokenizer.add_tokens(list(parts.special.values()), special_tokens=True)
    # Some processors need these names on the tokenizer.
    named = {key: token for key, token in parts.special.items() if key.endswith("_token")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=named,
    )
    return parts.processor(tokenizer, CHAT_TEMPLATE.replace(QWEN_IMAGE, parts.image_text))


def build_family(name: str, folder: Path) -> str:
    """Write model and processor of a family to `folder`, with widened weights, so that a token sees the image."""
    processor = build_processor(name)
    tokenizer = processor.tokenizer
    text = text_part(
        1,
        max_position_embeddings=512,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    tokens = {role: tokenizer.convert_tokens_to_ids(token) for role, token in FAMILIES[name].tokens.items()}
    sizes = Sizes(text, tokens, layers=1, patch=PATCH, side=SIDE)
    config = gemma3(sizes) if name == "gemma3" else tiny_config(name, sizes)
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
    """The processor with a first token that both its chat template and its tokenizer add, as in Gemma 3."""
    tokenizer = processor.tokenizer
    first = tokenizer.bos_token = tokenizer.pad_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.pad_token_id)]
    )
    processor.chat_template = first + processor.chat_template
    return processor
