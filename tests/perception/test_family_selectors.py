"""Selectors of other methods against loops, in each rollout and over whole batches of several processes."""

import math
from types import SimpleNamespace

import pytest
import torch

from cppo.perception import (
    ResponseScores,
    ViewScores,
    detect,
    select_band,
    select_together,
    select_tokens,
)

GENERATOR = torch.Generator().manual_seed(8)
OPTIONS = SimpleNamespace(
    perception_score="entropy",
    perception_selector="top",
    perception_selector_scope="rollout",
    perception_top_fraction=0.4,
    perception_top_rounding="floor",
    perception_nucleus=1.0,
    perception_entropy_fraction=0.3,
    perception_set_weights=[1.0, 0.5],
    perception_band=[0.25, 0.75],
)


def with_(**changes):
    return SimpleNamespace(**{**vars(OPTIONS), **changes})


def scored(rows=6, length=9, ties=False):
    logits = torch.randn(rows, length, 5, generator=GENERATOR, dtype=torch.float64)
    score = torch.rand(rows, length, generator=GENERATOR, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=GENERATOR) < 0.7
    mask[0] = False
    score = score.mul(4).round() if ties else score
    entropies = logits.exp().sum(-1)
    # Given, so that it is not computed from the logits.
    anchor = ResponseScores(logits[..., 0], entropies, exact={"nucleus_entropy": entropies})
    return ViewScores(anchor, None, None, mask, score.clone(), score)


def test_the_bottom_is_the_top_of_the_negative():
    scores = scored(ties=True)
    found = select_tokens("bottom", scores.score, scores.response_mask, 0.5)
    for row in range(6):
        places = [t for t in range(9) if scores.response_mask[row, t]]
        count = max(1, len(places) // 2) if places else 0
        worst = sorted(places, key=lambda t: (scores.score[row, t].item(), t))[:count]
        assert found[row].nonzero().flatten().tolist() == sorted(worst)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.8), (0.25, 0.5), (0.5, 0.5), (0.0, 0.3)])
def test_a_band_of_quantiles(low, high):
    for ties in (False, True):
        scores = scored(ties=ties)
        found = select_band(scores.score, scores.response_mask, low, high)
        for row in range(6):
            places = [t for t in range(9) if scores.response_mask[row, t]]
            ranked = sorted(places, key=lambda t: (scores.score[row, t].item(), t))
            kept = [t for rank, t in enumerate(ranked) if low * len(ranked) - 1e-6 <= rank < high * len(ranked) - 1e-6]
            assert found[row].nonzero().flatten().tolist() == sorted(kept), (row, ties)


def test_a_band_of_values_holds_its_ends():
    score, mask = torch.tensor([[0.1, 0.2, 0.5, 0.7]]), torch.tensor([[1, 1, 1, 0]])
    found = select_tokens("band_values", score, mask, 0.5, options=with_(perception_band=[0.2, 0.7]))
    assert found.tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match="a band of quantiles"):
        select_band(score, mask, 0.8, 0.2)
    with pytest.raises(ValueError, match="selector 'band' needs options"):
        select_tokens("band", score, mask, 0.5)


def flat(scores, options):
    """The selection among all tokens by loops: (row, index) -> weight."""
    places = [(row, t) for row, t in scores.response_mask.nonzero().tolist()]

    def best(values, fraction):
        count = max(1, math.floor(fraction * len(places)))
        return set(sorted(places, key=lambda place: (-values[place].item(), place))[:count])

    top = best(scores.score, options.perception_top_fraction)
    if options.perception_selector == "top":
        return dict.fromkeys(top, 1.0)
    uncertain = best(scores.anchor.entropies, options.perception_entropy_fraction)
    return {**dict.fromkeys(top, 0.5), **dict.fromkeys(uncertain, 1.0)}


@pytest.mark.parametrize("selector", ["top", "two_sets"])
def test_a_whole_batch_is_one_set(selector):
    scores, options = scored(), with_(perception_selector=selector, perception_selector_scope="batch")
    found = detect(scores, options)
    weights = found.token_weights if selector == "two_sets" else found.token_mask.double()
    expected = flat(scores, options)
    for row in range(6):
        for place in range(9):
            assert weights[row, place].item() == expected.get((row, place), 0.0)
    assert torch.equal(found.token_mask, weights > 0)
    assert len(set(expected.values())) == (2 if selector == "two_sets" else 1)


@pytest.mark.parametrize("selector", ["top", "two_sets", "random", "bottom"])
def test_micro_batches_of_processes_are_one_set(selector):
    """Two processes, the second with one more micro-batch of longer responses; a third has none."""
    parts = [[scored()], [scored(4, 12), scored(3, 12, ties=True)], []]
    options = with_(perception_selector=selector, perception_selector_scope="batch")

    gathered = [torch.empty(4, 0)] * 3

    def gather_of(rank):
        def keep(own):
            gathered[rank] = own
            return [own]

        return keep

    for rank in (0, 1):
        select_together(parts[rank], options, gather_of(rank), 0)
    found = [select_together(part, options, lambda _: gathered, rank) for rank, part in enumerate(parts)]
    assert [len(part) for part in found] == [1, 2, 0]

    def padded(values):
        return torch.nn.functional.pad(values, (0, 12 - values.shape[1]))

    def together(take, pieces):
        return torch.cat([padded(take(scores)) for part in pieces for scores in part])

    whole = ViewScores(
        ResponseScores(
            together(lambda s: s.anchor.logps, parts),
            together(lambda s: s.anchor.entropies, parts),
            exact={"nucleus_entropy": together(lambda s: s.anchor.entropies, parts)},
        ),
        *(None, None),
        together(lambda s: s.response_mask, parts),
        together(lambda s: s.draws, parts),
        together(lambda s: s.score, parts),
    )
    expected = detect(whole, options)
    assert torch.equal(together(lambda s: s.token_mask, found), expected.token_mask)
    if selector == "two_sets":
        assert torch.equal(together(lambda s: s.token_weights, found), expected.token_weights)
    assert 0 < expected.token_mask.sum() < whole.response_mask.sum()
