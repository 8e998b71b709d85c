"""The embedded model as it is committed."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from cppo.assets import MICRO_DIR, resolve_model
from cppo.assets.build import MicroShape, build_tokenizer, task_words
from cppo.tasks import TASK_NAMES, make_item, parse_task_options

LEAST = {"digits": 0.85, "shapes": 0.5, "chart": 0.4}
"""The share of right answers to ask for; it has 0.94, 0.56 and 0.45 of them."""


@pytest.fixture(scope="module")
def micro():
    folder = resolve_model("micro")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_class_size_and_special_ids(micro):
    model, processor = micro
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert isinstance(processor, Qwen2_5_VLProcessor)
    assert sum(Path(file).stat().st_size for file in MICRO_DIR.glob("*.safetensors")) <= 8_000_000
    tokenizer = processor.tokenizer
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.padding_side == "left"
    assert model.dtype == torch.float32


def test_tokenizer_is_the_one_that_the_tasks_text_gives(micro):
    rebuilt = build_tokenizer(task_words(), MicroShape().vocab_size)
    assert micro[1].tokenizer.get_vocab() == rebuilt.get_vocab()


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("level", ["1", "2", "3"])
def test_responses_take_at_most_80_tokens(micro, name, level):
    options = parse_task_options(name, {"level": level})
    for index in range(60):
        item = make_item(name, options, seed=9, index=index, split="test")
        ids = micro[1].tokenizer(item.response + "<|im_end|>").input_ids
        assert len(ids) <= 80
        assert micro[1].tokenizer.decode(ids, skip_special_tokens=True) == item.response


def answers(micro, items, images):
    model, processor = micro
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.prompt}]}] for item in items
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    batch = processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=80, do_sample=False)
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_it_sees(micro, name):
    """At the noise it was trained with, a picture at least doubles the right answers over a grey one."""
    options = parse_task_options(name, {"noise": "25"})
    items = [make_item(name, options, seed=9, index=index, split="test") for index in range(64)]
    seen = answers(micro, items, [item.image for item in items])
    blind = answers(micro, items, [Image.new("RGB", (64, 64), "grey")] * len(items))
    right, right_blind = (
        sum(text.endswith(f"\\boxed{{{item.answer}}}") for text, item in zip(texts, items, strict=True))
        for texts in (seen, blind)
    )
    assert right >= max(2 * right_blind, LEAST[name] * len(items))
    assert sum(text.startswith("<think>") and "</think> \\boxed{" in text for text in seen) >= 0.95 * len(items)
