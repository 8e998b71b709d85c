"""What a checkpoint's generation_config.json asks for has no part in evaluation or rollouts, but for special tokens."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from cppo import CPPOConfig, CPPOTrainer
from cppo.evaluation import generate_responses, load_model

# Each makes other responses, or an error, where it is heard.
FIELDS = {
    "min_new_tokens": 12,
    "min_length": 200,
    "max_length": 3,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "min_p": 0.99,
    "top_h": 0.01,
    "bad_words_ids": [[token] for token in range(60, 90)],
    "sequence_bias": [[[40], 100.0]],
    "forced_bos_token_id": 40,
    "forced_eos_token_id": 40,
    "begin_suppress_tokens": [*range(60, 90)],
    "exponential_decay_length_penalty": (0, 50.0),
    "guidance_scale": 3.0,
    "return_dict_in_generate": True,
    "output_scores": True,
    "prompt_lookup_num_tokens": 2,
    "use_cache": False,
    "cache_implementation": "offloaded",
}
NEW_TOKENS = 6


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


PROMPTS = [[{"role": "user", "content": text}] for text in ("What is it?", "And what is that?")]


@pytest.fixture(scope="module")
def trainer(small_model, tmp_path_factory):
    """A trainer whose model says more than one token."""
    rows = Dataset.from_dict({"prompt": PROMPTS, "image": [picture(0), picture(1)], "answer": ["a", "b"]})
    args = CPPOConfig(
        str(tmp_path_factory.mktemp("run")),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=NEW_TOKENS,
        use_cpu=True,
        bf16=False,
        report_to="none",
        reward_weights=[1.0],
    )
    made = CPPOTrainer(small_model, lambda completions, **_: [0.0] * len(completions), args, rows)
    with torch.no_grad():
        for module in [*made.model.model.language_model.layers.modules(), *made.model.model.visual.modules()]:
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(8)
    return made


def answers(trainer, processor):
    images = [(picture(0),), (picture(1),)]
    return generate_responses(trainer.model, processor, PROMPTS, images, max_new_tokens=NEW_TOKENS)


def rollouts(trainer):
    torch.manual_seed(0)
    rows = [row for row in trainer.train_dataset for _ in range(2)]
    return trainer._generate_and_score_completions(rows)["completion_ids"]


@pytest.fixture(scope="module")
def plain(trainer, small_model):
    processor = load_model(small_model, device="cpu")[1]
    return processor, answers(trainer, processor), rollouts(trainer)


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_of_the_checkpoint_counts(trainer, plain, field, monkeypatch):
    processor, expected, sampled = plain
    asked = copy.deepcopy(trainer.model.generation_config)
    setattr(asked, field, FIELDS[field])
    monkeypatch.setattr(trainer.model, "generation_config", asked)
    assert answers(trainer, processor) == expected
    assert torch.equal(rollouts(trainer), sampled)
    assert trainer.model.generation_config is asked  # and so is saved with the weights


def test_what_the_user_sets_counts(trainer, plain, monkeypatch):
    own = copy.deepcopy(trainer.generation_config)
    own.suppress_tokens = [*range(20, 110)]
    monkeypatch.setattr(trainer, "generation_config", own)
    assert not torch.equal(rollouts(trainer), plain[2])


def test_the_ends_of_the_checkpoint_count_in_evaluation(trainer, plain, monkeypatch):
    processor, expected, _ = plain
    first = processor.tokenizer(expected[0], add_special_tokens=False)["input_ids"][0]
    asked = copy.deepcopy(trainer.model.generation_config)
    asked.eos_token_id = [first]
    monkeypatch.setattr(trainer.model, "generation_config", asked)
    assert answers(trainer, processor)[0] == processor.tokenizer.decode([first])
