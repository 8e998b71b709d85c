from types import SimpleNamespace

from cppo.assets.build import SPECIAL_TOKENS, MicroShape, build_config, build_processor, build_tokenizer
from cppo.policy import vision_placeholder_ids


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
