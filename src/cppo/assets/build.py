"""Build the untrained micro VLM: a Qwen2.5-VL of 1.4 million parameters with its own tokenizer and processor.

Everything is derived from the generated tasks' text and a seed; nothing is downloaded. `cppo sft` trains it (recipes
`micro-warmup` and `micro-sft`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from cppo.tasks import TASK_NAMES, make_item, parse_task_options

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Each digit is one token (with the space before it, if any), so that no merge hides a number's digits. The format's
# marks are single tokens, which keeps responses short.
PRETOKENS = r" ?</?think>| ?\\boxed\{| ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


@dataclass(frozen=True)
class MicroShape:
    """Sizes of the model: widths in units, image bounds in pixels (height times width), `vocab_size` in tokens.

    The defaults are the embedded model's. An image of 64x64 pixels has 8x8 patches and so 16 image tokens, all in one
    attention window. In larger images every second vision layer attends across windows.
    """

    text_hidden: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_intermediate: int = 256
    vision_hidden: int = 96
    vision_layers: int = 4
    vision_heads: int = 4
    vision_intermediate: int = 256
    patch_size: int = 8
    min_pixels: int = 64 * 64
    max_pixels: int = 128 * 128
    vocab_size: int = 640
    max_positions: int = 1024


def task_words() -> list[str]:
    """The words of the generated tasks' prompts and responses, each once, with and without a space before it.

    The tokenizer learns its merges from them; frequency does not matter, so every word becomes a token.
    """
    words = {"user", "assistant", "system"}
    for name, ask, level in product(TASK_NAMES, ("name", "reason"), ("1", "2", "3")):
        options = parse_task_options(name, {"ask": ask, "level": level})
        for index in range(100):
            item = make_item(name, options, seed=0, index=index, split="train")
            words.update(re.findall(r"[A-Za-z]+", f"{item.prompt} {item.response}"))
    marks = ["<think>", "</think>", "\\boxed{", *"0123456789+-*=.,?"]
    return [spaced for word in [*sorted(words), *marks] for spaced in (word, f" {word}")]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text has an encoding) with Qwen's special tokens; pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, shape: MicroShape) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor with our tokenizer: a 64x64 image is unchanged, others are scaled into the bounds."""
    vision: dict[str, Any] = {
        "patch_size": shape.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": shape.min_pixels, "longest_edge": shape.max_pixels},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**vision),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, shape: MicroShape) -> Qwen2_5_VLConfig:
    """The model's configuration; the rotary sections share a head's frequencies 1:1.5:1.5 (time, height, width)."""
    ids = tokenizer.get_vocab()
    frequencies = shape.text_hidden // shape.text_heads // 2
    spatial = frequencies * 3 // 8
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.text_hidden,
            "intermediate_size": shape.text_intermediate,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.text_heads,
            "num_key_value_heads": shape.text_heads,
            "max_position_embeddings": shape.max_positions,
            "initializer_range": 0.04,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "mrope_section": [frequencies - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.text_hidden,
            "patch_size": shape.patch_size,
            "window_size": 8 * shape.patch_size,
            "fullatt_block_indexes": list(range(1, shape.vision_layers, 2)),
            "initializer_range": 0.04,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_micro(
    output_dir: str | Path, seed: int = 0, *, texts: Iterable[str] | None = None, **shape_overrides: int
) -> Path:
    """Write an untrained micro VLM (model, tokenizer, processor, chat template) to `output_dir` and return the path.

    `shape_overrides` are fields of `MicroShape`, for smaller models in tests; `texts` replaces the tasks' text as the
    tokenizer's corpus. Weights depend only on `seed` and the shape; the global random state is restored.
    """
    shape = MicroShape(**shape_overrides)
    tokenizer = build_tokenizer(task_words() if texts is None else texts, shape.vocab_size)
    config = build_config(tokenizer, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    ids = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], max_new_tokens=128
    )
    folder = Path(output_dir)
    model.save_pretrained(folder)
    build_processor(tokenizer, shape).save_pretrained(folder)
    return folder
