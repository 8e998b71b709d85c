"""A small random Qwen2.5-VL with the large one's proportions, and images for it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from cppo.assets.build import MicroShape, build_config, build_processor, build_tokenizer

PATCH, MERGE = 14, 2

CHAT_TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}"
)
"""Only the image and the text, so that short prompts have the wanted length."""

SHAPE = MicroShape(
    text_hidden=256,
    text_layers=4,
    text_heads=8,
    text_intermediate=1376,
    vision_hidden=160,
    vision_layers=4,
    vision_heads=4,
    vision_intermediate=428,
    patch_size=PATCH,
    min_pixels=(PATCH * MERGE) ** 2,
    max_pixels=2**22,
    max_positions=32768,
)
"""Widths are an eighth of Qwen2.5-VL-3B's, depths a ninth and an eighth, so the vision part keeps its proportion."""

SHAPE_3B = replace(
    SHAPE,
    text_hidden=2048,
    text_layers=36,
    text_heads=16,
    text_intermediate=11008,
    vision_hidden=1280,
    vision_layers=32,
    vision_heads=16,
    vision_intermediate=3420,
)


def build_model(vocabulary: int, seed: int) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """The random model with this vocabulary size, and its processor, with a smaller tokenizer."""
    tokenizer = build_tokenizer(["0123456789"], vocab_size=300)
    config = build_config(tokenizer, SHAPE)
    config.text_config.vocab_size = vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # At their initial widths, the model's predictions hardly depend on the image.
                parameter.mul_(3.0)
    processor = build_processor(tokenizer, SHAPE)
    processor.chat_template = CHAT_TEMPLATE
    return model, processor


def build_published_shape(
    vocabulary: int, seed: int, device: torch.device
) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """Random bfloat16 weights in Qwen2.5-VL-3B's shape, made on the device: 7 GiB there, none on the host."""
    tokenizer = build_tokenizer(["0123456789"], vocab_size=300)
    config = build_config(tokenizer, SHAPE_3B)
    text: Any = config.text_config
    text.vocab_size, text.num_key_value_heads, text.initializer_range = vocabulary, 2, 0.02
    config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    config.vision_config.initializer_range = 0.02
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    processor = build_processor(tokenizer, SHAPE_3B)
    processor.chat_template = CHAT_TEMPLATE
    return model, processor


def image_of(num_tokens: int, rng: np.random.Generator) -> Image.Image:
    """Coloured noise, nearly square, with about this many image tokens (49 for 50)."""
    rows = max(1, round(math.sqrt(num_tokens)))
    height, width = (side * PATCH * MERGE for side in (rows, max(1, round(num_tokens / rows))))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
