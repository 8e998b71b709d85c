"""Selection and gates against a loop over rows and tokens."""

import math
import random

import pytest
import torch

from cppo.perception import draw_rollouts, equal_rewards, gate_rollouts, select_perception_tokens

NAN = math.nan


def select_by_loop(score, mask, fraction, advantages=None):
    chosen = []
    for b, row in enumerate(score):
        candidates = []
        for t, value in enumerate(row):
            allowed = mask[b][t] == 1 and value > 0
            if advantages is not None:
                advantage = advantages[b][t] if isinstance(advantages[b], list) else advantages[b]
                allowed = allowed and advantage > 0
            if allowed:
                candidates.append(t)
        best = sorted(candidates, key=lambda t: (-row[t], t))
        best = best[: max(1, math.floor(fraction * len(candidates)))]
        chosen.append([t in best for t in range(len(row))])
    return chosen


@pytest.mark.parametrize("fraction", [0.01, 0.29, 0.3, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("advantage_shape", [None, "row", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_selection_equals_the_loop(fraction, advantage_shape, dtype):
    """Coarse scores give many ties; there are holes, empty rows, NaN, negative and infinite scores."""
    source = random.Random(f"{fraction} {advantage_shape} {dtype}")
    for length in (1, 2, 7, 40):
        score = [[source.choice([0.0, 0.25, 0.5, 0.5, 1.0, -0.5, NAN, math.inf]) for _ in range(length)]
                 for _ in range(9)]  # fmt: skip
        mask = [[int(source.random() < 0.8) for _ in range(length)] for _ in range(9)]
        mask[3] = [0] * length
        advantages = None
        if advantage_shape == "row":
            advantages = [source.choice([-1.0, 0.0, 0.5, 2.0, NAN]) for _ in range(9)]
        elif advantage_shape == "token":
            advantages = [[source.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(length)] for _ in range(9)]
        value = select_perception_tokens(
            torch.tensor(score, dtype=dtype),
            torch.tensor(mask),
            fraction,
            None if advantages is None else torch.tensor(advantages),
        )
        assert value.dtype == torch.bool
        assert value.tolist() == select_by_loop(score, mask, fraction, advantages)


def test_counts_are_the_floor_in_float64_for_every_length():
    for fraction in (0.1, 0.29, 1 / 3, 0.57, 0.9):
        score = torch.rand(1, 300, generator=torch.Generator().manual_seed(0)) + 0.1
        mask = torch.arange(300)[None] < torch.arange(301)[:, None]
        counts = select_perception_tokens(score.expand(301, 300), mask, fraction).sum(dim=1).tolist()
        assert counts == [0] + [max(1, math.floor(fraction * count)) for count in range(1, 301)]


def test_ties_go_to_the_earlier_position():
    value = select_perception_tokens(torch.ones(1, 6), torch.tensor([[0, 1, 1, 1, 1, 1]]), 0.5)
    assert value.tolist() == [[False, True, True, False, False, False]]


def test_padding_length_and_row_order_change_nothing():
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(5, 12, generator=generator)
    mask = torch.rand(5, 12, generator=generator) < 0.7
    advantages = torch.randn(5, generator=generator)
    value = select_perception_tokens(score, mask, 0.5, advantages)
    padded = select_perception_tokens(
        torch.cat([score, torch.full((5, 30), 99.0)], dim=1),
        torch.cat([mask, torch.zeros(5, 30, dtype=torch.bool)], dim=1),
        0.5,
        advantages,
    )
    assert torch.equal(padded[:, :12], value)
    assert not padded[:, 12:].any()
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = select_perception_tokens(score[order], mask[order], 0.5, advantages[order])
    assert torch.equal(shuffled, value[order])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_empty_responses(shape):
    value = select_perception_tokens(torch.zeros(shape), torch.ones(shape), 0.5, torch.ones(shape[0]))
    assert value.shape == shape


def test_selection_leaves_its_arguments_alone():
    score, mask, advantages = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool), torch.tensor([1.0, -1.0])
    copies = [tensor.clone() for tensor in (score, mask, advantages)]
    select_perception_tokens(score, mask, 0.5, advantages)
    for tensor, copy in zip((score, mask, advantages), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_gates():
    advantages = torch.tensor([0.5, -0.5, 0.0, NAN])
    correctness = torch.tensor([0.0, 1.0, NAN, 0.4])
    assert gate_rollouts("advantage", advantages).tolist() == [True, False, False, False]
    assert gate_rollouts("correct", advantages, correctness).tolist() == [False, True, False, True]
    assert gate_rollouts("none", advantages).tolist() == [True, True, True, True]


def advantages(rewards, size):
    """TRL's own formula in float32."""
    grouped = rewards.view(-1, size)
    return ((grouped - grouped.mean(dim=1, keepdim=True)) / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_equal_rewards_at_any_scale(scale):
    rewards = scale * torch.tensor([0.9] * 12 + [0.9] * 10 + [0.0] * 2 + [0.1] * 12 + [1.0] * 11 + [0.999])
    expected = [True] * 12 + [False] * 12 + [True] * 12 + [False] * 12
    assert equal_rewards(rewards[:, None], 12).tolist() == expected
    # Rounding alone would let rollouts of the first group pass.
    assert scale != 1.0 or (advantages(rewards, 12)[:12] != 0).any()


@pytest.mark.parametrize("reward", [0.9, -1.0, 1e6])
def test_rewards_are_equal_up_to_rounding_and_no_further(reward):
    """Another order of a sum changes one unit in the last place; several hundred units are a difference."""
    one = torch.tensor(reward)
    next_one = torch.nextafter(one, torch.tensor(math.inf))
    rewards = torch.stack([one, next_one, one, one + 300 * (next_one - one)])
    assert len(rewards.unique()) == 3
    assert equal_rewards(rewards[:, None], 2).tolist() == [True, True, False, False]


def test_rewards_compared_one_by_one():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [NAN, 2.0], [0.0, 2.0]])
    assert equal_rewards(rewards, 2).tolist() == [False, False, True, True]
    assert equal_rewards(rewards.nansum(dim=1, keepdim=True), 2).tolist() == [True] * 4


def test_a_response_without_a_reward_does_not_make_a_group_differ():
    """TRL leaves it out of the mean; equal rewards of the others stay without a signal."""
    rewards = torch.tensor([0.9] * 12 + [NAN] + [0.9] * 12 + [0.1] + [NAN] * 13)
    assert equal_rewards(rewards[:, None], 13).tolist() == [True] * 13 + [False] * 13 + [True] * 13


def test_draws_estimate_the_sum_over_the_gated_in_without_bias():
    """Over all equally likely draws, counted in 4,000 seeds, every gated-in rollout has mean weight 1."""
    gate = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0]).bool()
    total = torch.zeros(16)
    for seed in range(4000):
        weights = draw_rollouts(gate, 4, 2, torch.Generator().manual_seed(seed))
        for group, gated, most in zip(weights.view(4, 4), (3, 0, 4, 2), (1.5, 0.0, 2.0, 1.0), strict=True):
            assert sorted(group.tolist()) == [0.0] * (4 - min(gated, 2)) + [most] * min(gated, 2)
        total += weights
    # Four standard errors of the mean of a weight that is 2 with probability 1/2.
    assert (total / 4000 - gate.float()).abs().max() < 4 / math.sqrt(4000)
    assert torch.equal(draw_rollouts(gate, 4, 4, torch.Generator()), gate.float())


def test_arguments_that_do_not_fit_are_named():
    score, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for fraction in (0.0, -0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="top_fraction must lie in"):
            select_perception_tokens(score, mask, fraction)
    with pytest.raises(ValueError, match=r"score must have the shape \[B, T\]"):
        select_perception_tokens(score[0], mask[0])
    with pytest.raises(ValueError, match="response_mask must have the shape of score"):
        select_perception_tokens(score, mask[:, :2])
    with pytest.raises(ValueError, match=r"advantages must have the shape \[B\] or \[B, T\]"):
        select_perception_tokens(score, mask, 0.5, torch.zeros(3))
    with pytest.raises(ValueError, match="gate must be one of advantage, correct, none, but is 'best'"):
        gate_rollouts("best", torch.zeros(2))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        draw_rollouts(torch.ones(4).bool(), 4, 0, torch.Generator())
    with pytest.raises(ValueError, match="not a multiple of group_size"):
        draw_rollouts(torch.ones(5).bool(), 4, 1, torch.Generator())
    with pytest.raises(ValueError, match="needs correctness"):
        gate_rollouts("correct", torch.zeros(2))
    with pytest.raises(ValueError, match="correctness must have the shape of advantages"):
        gate_rollouts("correct", torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"advantages must have the shape \[B\]"):
        gate_rollouts("advantage", score)
