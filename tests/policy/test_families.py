"""The records of families, and a family added by one record, that of docs/train/models.md."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PAD, SHARING, make_batch, make_config, make_model
from transformers import AutoConfig, GenerationConfig

from cppo.assets.build import SPECIAL_TOKENS, MicroShape, build_config, build_processor, build_tokenizer
from cppo.policy import (
    add_shared_prompt_forward,
    plain_scores,
    shared_generation,
    shared_prompt_scores,
    unshared_reason,
    vision_placeholder_ids,
    vision_tower_parameters,
)
from cppo.policy.families import FAMILIES

MODELS_PAGE = Path(__file__).parents[2] / "docs" / "train" / "models.md"


@pytest.fixture
def glm4v(monkeypatch):
    """The name of a family that has a record during this test."""
    (code,) = re.findall(r"```python\n(.*?)```", MODELS_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setitem(FAMILIES, "glm4v", FAMILIES["llava"])
    exec(code, {})
    return "glm4v"


def test_the_families_with_a_record_are_the_tested_ones():
    assert tuple(FAMILIES) == SHARING


def test_without_a_record_a_family_does_not_share():
    assert "'glm4v' is not among those with tested" in unshared_reason(AutoConfig.for_model("glm4v"))


def test_one_record_lets_a_family_share_its_updates(glm4v):
    model, batch = make_model(glm4v), make_batch(glm4v)
    assert unshared_reason(model.config) is None
    assert "pixel_values" in batch.vision
    expected = plain_scores(model, **batch.rows, vision=batch.vision)
    add_shared_prompt_forward(model)
    found = shared_prompt_scores(model, **batch.rows, groups=batch.groups(model.config))
    for name in ("logps", "entropies"):
        one, other = (getattr(scores, name) * batch.response_mask for scores in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_one_record_lets_a_family_share_its_rollouts(glm4v):
    model, batch = make_model(glm4v), make_batch(glm4v)
    end = batch.input_ids.shape[1] - batch.num_response_tokens
    inputs = {"input_ids": batch.input_ids[:, :end], "attention_mask": batch.attention_mask[:, :end]}
    inputs |= {name: batch.vision[name] for name in ("pixel_values", "image_grid_thw")}
    inputs["mm_token_type_ids"] = batch.vision["mm_token_type_ids"][:, :end]
    config = GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=PAD)
    expected = model.generate(**inputs, generation_config=config)
    with shared_generation(model, batch.group_ids, config) as prefills:
        assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    assert prefills == [5]  # of ten rows


def test_one_record_names_placeholders_and_projector(glm4v):
    model = make_model(glm4v)
    assert vision_placeholder_ids(vocabulary(**{"<|begin_of_image|>": 4}), make_config(glm4v)) == [4, 90, 91, 92, 93]
    tower, projector = (set(part.parameters()) for part in (model.model.visual, model.model.visual.merger))
    assert set(vision_tower_parameters(model)) == tower - projector


def vocabulary(**tokens):
    return SimpleNamespace(get_vocab=lambda: tokens)


def test_the_micro_models_placeholders():
    tokenizer = build_tokenizer(["text"], 270)
    processor = build_processor(tokenizer, MicroShape())
    names = [token for token in SPECIAL_TOKENS if "vision" in token or "pad" in token]
    assert names == ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    expected = sorted(tokenizer.convert_tokens_to_ids(names))
    assert vision_placeholder_ids(processor, build_config(tokenizer, MicroShape())) == expected
    assert tokenizer.eos_token_id not in expected
    assert tokenizer.pad_token_id not in expected


def test_ids_of_configuration_processor_and_vocabulary_are_joined():
    tokenizer = SimpleNamespace(**vars(vocabulary(**{"<IMG_CONTEXT>": 8, "<img>": 3, "word": 1})))
    processor = SimpleNamespace(tokenizer=tokenizer, image_token_id=8, video_token_id=12)
    config = SimpleNamespace(image_token_index=5, image_token_id=8)
    assert vision_placeholder_ids(processor, config) == [3, 5, 8, 12]


def test_absent_and_negative_ids_are_none():
    config = SimpleNamespace(image_token_id=None, video_token_id=-1)
    assert vision_placeholder_ids(vocabulary(word=1), config) == []
