"""Advantages shaped token by token, against the papers' numbers by hand and loops in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from cppo.perception import (
    SHAPINGS,
    Everyone,
    ResponseScores,
    ViewScores,
    covariance,
    group_factors,
    shape_advantages,
    softmax_weights,
    split_weights,
    token_bonus,
    token_factors,
)

GENERATOR = torch.Generator().manual_seed(9)
OPTIONS = SimpleNamespace(
    perception_sink="add_advantage",
    perception_advantage_floor=0.9,
    perception_advantage_scope="batch",
    perception_advantage_mean="all",
    perception_shaping_weight=1.0,
    perception_weight_threshold=0.4,
    perception_weight_slope=2.0,
    perception_bonus_weight=0.4,
    perception_bonus_limit=0.5,
    perception_softmax_gate=0.05,
    perception_softmax_temperature=1.8,
)


def test_bonus_by_hand():
    """A = -1 and H = 2: -1 + min(0.8, 0.5) = -0.5; H = 0.5: -0.8. A = 1 and H = 0.5: 1.2. A = 0: 0."""
    advantages = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    score = torch.tensor([[2.0, 0.5]] * 3, dtype=torch.float64)
    shaped = advantages[:, None] + token_bonus(score, advantages)
    assert shaped.tolist() == [pytest.approx([-0.5, -0.8]), pytest.approx([1.5, 1.2]), [0.0, 0.0]]


def test_factors_by_hand():
    """w = (0, 1/2, 1) has the mean 1/2: factors 1/2, 1 and 3/2; one far from the others is clamped to 2 - 1/20."""
    mask = torch.ones(1, 3)
    assert token_factors(torch.tensor([[3.0, 4.0, 5.0]]), mask).tolist() == [[0.5, 1.0, 1.5]]
    assert token_factors(torch.full((1, 3), 2.0), mask).tolist() == [[1.0, 1.0, 1.0]]
    low = torch.cat([torch.zeros(1, 1), torch.ones(1, 99)], dim=1)
    assert token_factors(low, torch.ones(1, 100))[0, 0].item() == pytest.approx(0.1)
    outside = token_factors(torch.tensor([[3.0, 5.0, math.nan]]), torch.tensor([[1, 1, 0]]))
    assert outside.tolist() == [[0.5, 1.5, 1.0]]


def test_factors_within_groups_by_hand():
    """A group's sums (1, 2, 3) give u = (0, 1/2, 1): 1/2 is clamped to 0.9, then 1 and 3/2; others stay 1."""
    signal = torch.tensor([1.0, 5.0, 2.0, 5.0, 3.0, math.nan])
    found = group_factors(signal, torch.tensor([7, -1, 7, -1, 7, 7]))
    assert found.tolist() == pytest.approx([0.9, 1.0, 1.0, 1.0, 1.5, 1.0])


def test_softmax_weights():
    """Equal scores and entropies have weight 1; the mean weight is 1; a loop gives the rest."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert softmax_weights(torch.full((3, 5), 0.3), torch.ones(3, 5), mask).tolist() == mask.float().tolist()
    score, entropies = torch.rand(2, 3, 5, generator=GENERATOR, dtype=torch.float64)
    found = softmax_weights(score, entropies.masked_fill(mask == 0, math.nan), mask)
    for row, length in enumerate([4, 3]):
        s, h = score[row, :length].tolist(), entropies[row, :length].tolist()
        u = [(a - min(s)) / (max(s) - min(s)) + (b - min(h)) / (max(h) - min(h)) for a, b in zip(s, h, strict=True)]
        middle = math.fsum(u) / length
        exps = [math.exp(a * (1 + 0.05 * math.tanh(b - middle)) / 1.8) for a, b in zip(s, u, strict=True)]
        expected = [length * value / math.fsum(exps) for value in exps]
        assert found[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert found[row].mean().item() * 5 / length == pytest.approx(1.0)


def scored(score, mask, token_mask=None):
    values = torch.tensor(score, dtype=torch.float64)
    anchor = ResponseScores(-values, values)
    chosen = None if token_mask is None else torch.tensor(token_mask, dtype=torch.bool)
    return ViewScores(anchor, None, None, torch.tensor(mask), score=values, token_mask=chosen)


def shape(found, advantages, groups, **options):
    masks = [torch.ones(len(own), 3) for own in advantages]
    everyone = Everyone(lambda values: values, 0)
    given = SimpleNamespace(**{**vars(OPTIONS), **options})
    return shape_advantages(advantages, found, groups, masks, given, 1, everyone)[0]


def test_rollouts_and_tokens_have_factors_of_their_own():
    """A group over two micro-batches: sums of w are 3/2 and 1, hence u = 1 and 0, and factors 3/2 and 0.9."""
    first, second = (scored([values], [[1, 1, 1]]) for values in ([0.0, 1.0, 2.0], [0.0, 0.0, 1.0]))
    advantages = [torch.tensor([2.0, 4.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    shaped = shape(
        [([0], first), ([0], second)],
        advantages,
        [torch.tensor([5, -2]), torch.tensor([5])],
        perception_sink="factor_advantage",
    )
    assert shaped[0].tolist() == [pytest.approx([1.5, 3.0, 4.5]), [4.0, 4.0, 4.0]]
    assert shaped[1][0].tolist() == pytest.approx([0.9 * value for value in (2 / 3, 2 / 3, 5 / 3)])


@pytest.mark.parametrize("sink", sorted(name for name in SHAPINGS if ":" not in name))
def test_a_part_of_the_shaping(sink):
    """With a share of 0 the advantage is the rollout's; a quarter is a quarter of the way."""
    found = [([0, 1], scored([[0.1, 0.7, 0.4], [0.9, 0.2, 0.3]], [[1, 1, 1]] * 2, [[1, 0, 0], [0, 1, 0]]))]
    advantages, groups = [torch.tensor([1.0, -2.0], dtype=torch.float64)], [torch.tensor([0, 0])]
    none, quarter, whole = (
        shape(found, advantages, groups, perception_sink=sink, perception_shaping_weight=weight)[0]
        for weight in (0.0, 0.25, 1.0)
    )
    assert torch.equal(none, advantages[0][:, None].expand(2, 3))
    assert torch.allclose(quarter, 0.75 * none + 0.25 * whole, atol=1e-12)
    assert not torch.allclose(whole, none)


def test_the_mean_over_selected_tokens():
    """Of 6 tokens of scored rollouts 2 are selected, and all 3 of an unscored one: factor 9 / 5."""
    found = [([0, 2], scored([[0.1, 0.7, 0.4]] * 2, [[1, 1, 1]] * 2, [[1, 0, 0], [0, 1, 0]]))]
    advantages = [torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)]
    shaped = shape(
        found,
        advantages,
        [torch.tensor([0, 0, 0])],
        perception_sink="mask_advantage",
        perception_advantage_floor=1.0,
        perception_advantage_mean="selected",
    )[0]
    assert shaped.tolist() == [pytest.approx(row) for row in ([1.8, 0.0, 0.0], [1.8] * 3, [0.0, 1.8, 0.0])]


def test_covariance_and_its_split_by_hand():
    """Means 0 and -1/2: (0.4, 0.3, -0.2, 0.9); token 4 is high and 3 low: 0.04 and 0.01 at |d log p| = 0.2."""
    logps = torch.tensor([[-0.1, -0.2], [-0.3, -1.4]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    found = covariance(logps, advantages, everywhere)
    assert found.flatten().tolist() == pytest.approx([0.4, 0.3, -0.2, 0.9])
    weights = split_weights(found, everywhere)
    assert (0.1 * weights * 0.2).flatten().tolist() == pytest.approx([0.0, 0.0, 0.01, 0.04])
    bounded = split_weights(found, torch.tensor([[True, True], [True, False]]), threshold=0.35)
    assert bounded.tolist() == [[2.0, 0.5], [0.5, 0.0]]
    # The low weight wins where a token has both; an empty selection has no weights.
    assert split_weights(found, torch.tensor([[True, False], [False, False]])).tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert not split_weights(found, torch.zeros(2, 2, dtype=torch.bool)).any()
