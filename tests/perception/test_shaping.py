"""Selections and weights of other methods against loops and closed forms."""

import math
import random

import pytest
import torch

from cppo.perception import (
    advantage_scale,
    rollout_dependency,
    select_perception_tokens,
    select_random_tokens,
    select_tokens,
    select_top_tokens,
    token_advantage_weights,
    token_mean_loss,
)


@pytest.mark.parametrize(("rounding", "rounded"), [("floor", math.floor), ("ceil", math.ceil)])
@pytest.mark.parametrize("fraction", [0.01, 0.4, 0.5, 1.0])
def test_top_tokens_of_all(fraction, rounding, rounded):
    random.seed(1)
    score = [[random.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(17)] for _ in range(20)]
    mask = [[int(random.random() < 0.7) for _ in range(17)] for _ in range(19)] + [[0] * 17]
    expected = []
    for values, row in zip(score, mask, strict=True):
        places = [t for t in range(17) if row[t]]
        count = max(1, rounded(fraction * len(places))) if places else 0
        best = sorted(places, key=lambda t: (-values[t], t))[:count]
        expected.append([t in best for t in range(17)])
    assert select_top_tokens(torch.tensor(score), torch.tensor(mask), fraction, rounding).tolist() == expected


def test_the_synchronous_rule_keeps_one_of_three_tokens_and_the_asynchronous_two():
    score, mask = torch.tensor([[0.3, 0.0, 0.9, 0.6]]), torch.ones(1, 4)
    kept = {name: select_tokens("top_positive", score, mask, 0.5, rounding=name).tolist() for name in ("floor", "ceil")}
    assert kept == {"floor": [[False, False, True, False]], "ceil": [[False, False, True, True]]}


def test_the_ceiling_is_not_raised_by_rounding():
    """0.07 x 100 is 7.000000000000001 in float64."""
    score, mask = torch.arange(1.0, 101.0)[None], torch.ones(1, 100)
    assert select_top_tokens(score, mask, 0.07, "ceil").sum() == 7
    with pytest.raises(ValueError, match="rounding must be one of floor, ceil"):
        select_top_tokens(score, mask, 0.5, "round")


def test_random_tokens_are_as_many_and_uniform():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]]).expand(4000, 6)
    like = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool().expand(4000, 6)
    chosen = select_random_tokens(like, mask, torch.rand(4000, 6, generator=generator))
    assert (chosen.sum(dim=1) == 2).all()
    assert not chosen[:, 5].any()
    share = chosen[:, :5].float().mean(dim=0)
    assert ((share - 0.4).abs() < 4 * math.sqrt(0.24 / 4000)).all()


def test_a_selector_by_its_name():
    generator = torch.Generator().manual_seed(3)
    score, draws = torch.randn(30, 9, generator=generator), torch.rand(30, 9, generator=generator)
    mask = torch.rand(30, 9, generator=generator) < 0.8
    best = select_perception_tokens(score, mask, 0.5)
    for name, expected in {
        "top_positive": best,
        "top": select_top_tokens(score, mask, 0.5),
        "random": select_random_tokens(best, mask, draws),
        "all": mask,
    }.items():
        assert torch.equal(select_tokens(name, score, mask, 0.5, draws), expected)
    with pytest.raises(ValueError, match="'random' needs draws"):
        select_tokens("random", score, mask, 0.5)
    with pytest.raises(ValueError, match="selector must be one of top_positive, all, top, bottom, random"):
        select_tokens("best", score, mask, 0.5)


def test_random_tokens_refuse_other_shapes():
    with pytest.raises(ValueError, match="like must have the shape"):
        select_random_tokens(torch.ones(1, 3).bool(), torch.ones(1, 4), torch.rand(1, 4))


def test_dependency_is_the_mean_over_response_tokens():
    score = torch.tensor([[1.0, 3.0, math.nan], [5.0, 5.0, 5.0]])
    assert rollout_dependency(score, torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.9, 1.0])
def test_weights_have_mean_one_and_start_at_the_floor(floor):
    dependency = torch.tensor([0.3, 0.1, 0.7, 0.2], dtype=torch.float64)
    weights = advantage_scale(dependency, floor)
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-12)
    assert weights.min().item() == pytest.approx(floor, abs=1e-12)
    # Linear in the dependency: equal steps get equal differences.
    assert (weights[0] - weights[3]).item() == pytest.approx((weights[3] - weights[1]).item(), abs=1e-12)


@pytest.mark.parametrize("dependency", [[], [0.4], [0.2, 0.2]])
def test_equal_dependencies_weigh_alike(dependency):
    assert advantage_scale(torch.tensor(dependency)).tolist() == [1.0] * len(dependency)


def test_weights_of_a_part_by_hand():
    """Of 0, 1, 2 and 4 the last two are weighted together: u = (0.5, 1), mean 0.75, ceiling 0.9 + 0.1 / 0.75."""
    everyone = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    weights = advantage_scale(everyone[2:], 0.9, everyone)
    assert weights.tolist() == pytest.approx([0.9 + 0.1 * 0.5 / 0.75, 0.9 + 0.1 / 0.75], abs=1e-12)
    assert advantage_scale(everyone[:1], 0.9, everyone).tolist() == [0.9]


def test_a_floor_outside_of_0_and_1_is_refused():
    with pytest.raises(ValueError, match="floor"):
        advantage_scale(torch.tensor([1.0, 2.0]), 1.1)


@pytest.mark.parametrize(("threshold", "slope"), [(0.4, 2.0), (0.7, 0.0)])
def test_token_weights_against_a_loop(threshold, slope):
    random.seed(2)
    score = [[random.random() * 3 for _ in range(9)] for _ in range(5)]
    mask = [[1] * 9, [1] * 5 + [0] * 4, [0, 1] * 4 + [1], [0] * 9, [1] + [0] * 8]
    expected = []
    for values, row in zip(score, mask, strict=True):
        places = [t for t in range(9) if row[t]]
        own = [values[t] for t in places]
        weights = [1.0] * len(own)
        if len(set(own)) > 1:
            logs = [math.log(1 + value) for value in own]
            scaled = [(value - min(logs)) / (max(logs) - min(logs)) for value in logs]
            weights = [
                u / threshold if u < threshold else 1 + slope * (u - threshold) / (1 - threshold) for u in scaled
            ]
            weights = [weight * len(own) / math.fsum(weights) for weight in weights]
        by_place = dict(zip(places, weights, strict=True))
        expected.append([by_place.get(t, 0.0) for t in range(9)])
    kept = torch.tensor(mask)
    hidden = torch.tensor(score, dtype=torch.float64).masked_fill(kept == 0, math.nan)  # values outside do not count
    found = token_advantage_weights(hidden, kept, threshold, slope)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_token_weights_by_hand():
    """Scores 0, 1, e - 1 and e^2 - 1 are I = 0, ln 2 / 2, 1/2 and 1: raw weights 0, 0.8664, 1.3333 and 3, of mean 1.3.

    Without the logarithm the second score would be at 0.157 of the largest.
    """
    score = torch.tensor([[0.0, 1.0, math.e - 1, math.e**2 - 1]], dtype=torch.float64)
    weights = token_advantage_weights(score, torch.ones(1, 4), threshold=0.4, slope=2.0)
    assert weights.tolist()[0] == pytest.approx([0.0, 0.6665, 1.0257, 2.3078], abs=5e-5)


@pytest.mark.parametrize(("threshold", "slope"), [(0.0, 2.0), (1.0, 2.0), (0.4, -1.0)])
def test_token_weights_refuse(threshold, slope):
    with pytest.raises(ValueError, match="threshold must lie in"):
        token_advantage_weights(torch.ones(1, 2), torch.ones(1, 2), threshold, slope)


def test_token_mean():
    values = torch.tensor([[1.0, math.nan], [2.0, 6.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert token_mean_loss(values, mask).item() == 3.0
    assert token_mean_loss(values, mask, 6).item() == 1.5
    assert token_mean_loss(values, torch.zeros(2, 2)).item() == 0.0
