"""The models that share prompts, and the log line for the others."""

import pytest
import transformers
from tiny_models import TEXT, make_config

from cppo.policy import unshared_reason


def test_the_tested_families_share(family):
    assert unshared_reason(make_config(family)) is None


def sliding_mistral():
    text = {"model_type": "mistral", **TEXT, "sliding_window": 8}
    return transformers.LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model"})


def sliding_qwen():
    text = {**TEXT, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return transformers.Qwen2_5_VLConfig(text_config=text)


def sinks():
    return transformers.InternVLConfig(text_config={"model_type": "gpt_oss"})


REASONS = {
    "gemma3": (transformers.Gemma3Config, "model type 'gemma3'"),
    "sliding mistral": (sliding_mistral, "sliding window"),
    "sliding qwen": (sliding_qwen, "sliding window"),
    "attention sinks": (sinks, "'gpt_oss', has no shared-prompt form"),
}


@pytest.mark.parametrize("case", list(REASONS))
def test_others_say_why_not_in_one_line(case):
    make, words = REASONS[case]
    reason = unshared_reason(make())
    assert words in reason
    assert "\n" not in reason
