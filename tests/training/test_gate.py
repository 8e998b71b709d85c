"""The gated-in and drawn rollouts where rewards are weighted or large, or where tools wrote part of the response."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from rollout_stubs import generation_batch, inject, make_rows, picture

from cppo.errors import UserError
from cppo.policy import plain_scores, unwrapped
from cppo.training.rollouts import GenerationBatch, rollout_weights, token_draws


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


@pytest.mark.parametrize(
    ("pairs", "options", "expected"),
    [
        ([(1, 0), (0, 1)], {"reward_weights": [0.9, 0.1]}, [True, False]),
        ([(1, 0), (0, 2)], {"reward_weights": [2.0, 1.0]}, [False, False]),
        (
            [(1, 0), (0, 2)],
            {"reward_weights": [2.0, 1.0], "multi_objective_aggregation": "normalize_then_sum"},
            [True, False],
        ),
    ],
)
def test_the_gate_weights_and_sums_rewards_as_trl_does(make_trainer, pairs, options, expected):
    """Every second rollout gets each of two pairs of rewards."""

    def first(completion_ids, **kwargs):
        return [float(pairs[place % 2][0]) for place in range(len(completion_ids))]

    def second(completion_ids, **kwargs):
        return [float(pairs[place % 2][1]) for place in range(len(completion_ids))]

    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=[first, second], **options))
    batch = generation_batch(trainer, make_rows([1, 1]))
    assert [views is not None for views in batch["perception_views"]] == expected * 4


def test_a_reward_of_weight_0_gates_nothing_in(make_trainer):
    def second_alike(completion_ids, **kwargs):
        return [1.0, 0.0] * 6 + [0.9] * 12

    def watched(completion_ids, **kwargs):
        return [float(place) for place in range(len(completion_ids))]

    options = {"reward_weights": [1.0, 0.0], "multi_objective_aggregation": "normalize_then_sum"}
    options |= {"num_generations": 12, "per_device_train_batch_size": 24}
    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=[second_alike, watched], **options))
    batch = generation_batch(trainer, make_rows([1, 1]))
    assert (batch["advantages"][12:] > 0).all()  # by rounding alone
    assert [views is not None for views in batch["perception_views"]] == [True, False] * 6 + [False] * 12


def test_responses_with_a_tools_image_or_no_token_of_their_own_are_left_out(make_trainer):
    rows = make_rows([1, 1])
    trainer = inject(make_trainer(rows, perception_gate="none"))

    generate = trainer._generate

    def generate_with_tools(prompts):
        prompt_ids, completion_ids, _, *rest = generate(prompts)
        completion_ids[1].append(trainer.model.config.image_token_id)
        own = [[int(place != 2)] * len(ids) for place, ids in enumerate(completion_ids)]
        return prompt_ids, completion_ids, own, *rest

    trainer._generate = generate_with_tools
    batch = generation_batch(trainer, rows)
    assert [views is not None for views in batch["perception_views"]] == [True, False, False, *[True] * 5]


def test_a_rollout_with_a_tools_image_leaves_its_group(make_trainer):
    trainer = make_trainer(make_rows([1, 1]), scorer="kernel")
    trainer.tools = [print]
    batch = GenerationBatch.of([row for row in make_rows([1, 1]) for _ in range(4)], 0, 4, alone=False)
    ids = torch.full((8, 3), 9)
    ids[5, 1] = trainer.model.config.image_token_id
    output = {"completion_ids": ids}
    trainer._put_images_together(output, batch)
    assert output["group_id"] == [0, 0, 0, 0, 1, -6, 1, 1]


def draws(seed=1, batch=0, rank=0):
    tokens = token_draws(torch.Size([2, 50]), seed, batch, rank)
    return tokens, rollout_weights(torch.ones(64, dtype=torch.bool), 8, 1, seed, batch)


def test_every_seed_batch_and_rank_draws_its_own_tokens():
    found = [draws()[0], draws(seed=2)[0], draws(batch=1)[0], draws(rank=1)[0]]
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))
    assert torch.equal(found[0], draws()[0])


def test_every_seed_and_batch_draws_its_own_rollouts():
    found = [draws()[1], draws(seed=2)[1], draws(batch=1)[1]]
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))
    assert torch.equal(found[0], draws(rank=1)[1])


def test_a_response_with_images_is_scored_unshared(make_trainer, processor):
    """A tool returned an image: TRL puts its placeholders in the response and its pixels among the row's."""
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
    trainer._generating = GenerationBatch(0, make_rows([1, 1]), [0, 0], [0, 1])
    trainer._generating.generated(ids[:, :-kept].tolist(), ids[:, -kept:].tolist())
    trainer.tools = []
    wrong, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, **asked)
    assert (wrong - expected).abs().max() > 1e-2
    trainer.tools = [print]
    found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, **asked)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_vllm_takes_rollouts_without_the_shared_prefill(make_trainer):
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
    image = picture(1)
    completions, _ = trainer._generate_single_turn([[8], [8]], [[image], []], {}, 1)
    assert completions == [[9], [9]]
    assert asked == [[[image], None]]


@pytest.mark.parametrize("given", [{"rollout_func": object}, {"tools": [print]}])
def test_mixed_rollouts_are_made_here(make_trainer, given):
    (name,) = given
    with pytest.raises(UserError, match=f"rollout_view_mode = 'mix' makes all rollouts itself, but {name}"):
        make_trainer(make_rows([1, 1]), method="noisyrollout", **given)


def test_environments_are_refused(make_trainer):
    with pytest.raises(UserError, match="environment_factory"):
        make_trainer(make_rows([1, 1]), environment_factory=object)


def test_a_compiled_model_is_unwrapped(tiny_model):
    assert unwrapped(torch.compile(tiny_model)) is tiny_model
