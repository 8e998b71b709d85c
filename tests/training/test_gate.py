"""Which rollouts are gated in where rewards are equal, or large, or a tool has put images into a response."""

from types import SimpleNamespace

import pytest
import torch
from rollout_stubs import generation_batch, inject, make_rows, picture

from cppo.errors import UserError
from cppo.policy import plain_scores, unwrapped


def test_an_unscorable_response_gates_no_other_in(make_trainer):
    def reward(completion_ids, **kwargs):
        return [0.9, 0.9, 0.9, None] * (len(completion_ids) // 4)

    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=reward))
    batch = generation_batch(trainer, make_rows([1, 1]))
    assert batch["perception_views"] == [None] * 8


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_large_rewards_are_gated_like_small_ones(make_trainer, scale):
    def reward(completion_ids, **kwargs):
        return [scale * (row % 4 != 0) for row in range(len(completion_ids))]

    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=reward))
    batch = generation_batch(trainer, make_rows([1, 1]))
    assert [views is not None for views in batch["perception_views"]] == [False, True, True, True] * 2


def test_a_response_with_images_is_scored_unshared(make_trainer, processor):
    """What TRL makes of a tool that returns an image: its placeholders in the response, its pixels among the row's."""
    trainer = make_trainer(make_rows([1, 1]))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    rows = [f"{image}Look.{image}A {word}" for word in "12"]
    pictures = [[picture(1), picture(2)], [picture(3), picture(4)]]
    inputs = dict(processor(text=rows, images=pictures, return_tensors="pt"))
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    assert ids[0].tolist().count(trainer.model.config.image_token_id) % 2 == 0
    kept = ids.shape[1] - 1 - (ids[0] == trainer.model.config.image_token_id).nonzero()[0].item() - 8
    assert trainer._has_placeholder(ids[:, -kept:]).all()
    expected = plain_scores(trainer.model, ids, mask, kept, 1.0, inputs).logps
    asked = {"num_images": [2, 2], **inputs}
    trainer.tools = []
    wrong, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, **asked)
    assert (wrong - expected).abs().max() > 1e-2
    trainer.tools = [print]
    found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, **asked)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_vllm_takes_rollouts_without_the_shared_prefill(make_trainer, monkeypatch):
    trainer = make_trainer(make_rows([1, 1]))
    assert trainer._shares_prompts
    trainer.use_vllm = True
    del trainer.generation_config
    asked = []

    def generate(prompts, images, num_generations, profiler):
        asked.append(images)
        return prompts, [[9]] * len(prompts), [[[0.0]]] * len(prompts), None

    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None, generate=generate)
    trainer._last_loaded_step = 0
    completions, _ = trainer._generate_single_turn([[8], [8]], [["image"], []], {}, 1)
    assert completions == [[9], [9]]
    assert asked == [[["image"], None]]


@pytest.mark.parametrize("given", [{"rollout_func": object}, {"tools": [print]}])
def test_mixed_rollouts_are_made_here(make_trainer, given):
    (name,) = given
    with pytest.raises(UserError, match=f"rollout_view_mode = 'mix' makes the rollouts itself, but {name}"):
        make_trainer(make_rows([1, 1]), method="noisyrollout", **given)


def test_environments_are_refused(make_trainer):
    with pytest.raises(UserError, match="environment_factory"):
        make_trainer(make_rows([1, 1]), environment_factory=object)


def test_a_compiled_model_is_unwrapped(tiny_model):
    assert unwrapped(torch.compile(tiny_model)) is tiny_model
