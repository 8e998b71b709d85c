"""Scores of other methods against closed forms and loops in float64."""

import math

import pytest
import torch

from cppo.perception import (
    SCORES,
    Owners,
    ResponseScores,
    compensated,
    cosine_to_mean,
    dependency_score,
    entropy_from_logits,
    fused_entropy,
    js_divergence,
    mean_cosine,
    nucleus_entropy,
    of_the_tokens_themselves,
    scaled,
)

GENERATOR = torch.Generator().manual_seed(5)
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def policy():
    logits = 2 * torch.randn(3, 6, 7, generator=GENERATOR, dtype=torch.float64)
    return ResponseScores(logits.log_softmax(-1)[..., 0], entropy_from_logits(logits), logits)


ANCHOR, REMOVING, PRESERVING = (policy() for _ in range(3))


def given(logps):
    values = torch.tensor([logps], dtype=torch.float64)
    return ResponseScores(values, values.abs())


def test_scores_of_the_sampled_token_alone():
    """At p = 1/2 the surprisal is ln 2, and its term in the entropy half of that; a token of p = 0 adds nothing."""
    anchor = given([math.log(0.5), -math.inf, 0.0])
    assert dependency_score("sampled_surprisal", anchor).tolist() == [[pytest.approx(math.log(2)), math.inf, 0.0]]
    assert dependency_score("sampled_entropy", anchor).tolist() == [[pytest.approx(0.3466, abs=5e-5), 0.0, 0.0]]


def test_differences_of_log_probabilities():
    anchor, removing = given([-0.5, -2.0, -1.0]), given([-2.0, -0.5, -1.0])
    assert dependency_score("logp_difference", anchor, removing).tolist() == [[1.5, 1.5, 0.0]]
    relative = dependency_score("logp_difference_relative", anchor, removing)
    assert relative.tolist() == [pytest.approx([0.75, 0.75, 0.0], abs=1e-6)]


def test_entropy_needs_no_view():
    assert torch.equal(dependency_score("entropy", ANCHOR), ANCHOR.entropies)
    with pytest.raises(ValueError, match="'js' compares removing"):
        dependency_score("js", ANCHOR)


def test_fused_entropy_by_hand():
    """E where either signal is 1, 0 where both are 0; half of each: E (1 - 0.5^0.7 0.5^0.3) = E / 2."""
    divergence, shift = torch.tensor([1.0, 0.3, 0.0, 0.5]), torch.tensor([0.2, 1.0, 0.0, 0.5])
    assert fused_entropy(divergence, shift, torch.full((4,), 0.8)).tolist() == pytest.approx([0.8, 0.8, 0.0, 0.4])


def test_anchored_entropy_against_a_loop():
    found = dependency_score("anchored_entropy", ANCHOR, REMOVING, response_mask=MASK)
    divergence = js_divergence(ANCHOR.logits, REMOVING.logits)
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        signals = []
        for values in (divergence, (ANCHOR.entropies - REMOVING.entropies).abs(), ANCHOR.entropies):
            own = values[row, :length].tolist()
            signals.append([(value - min(own)) / (max(own) - min(own)) for value in own])
        expected = [e * (1 - (1 - j) ** 0.7 * (1 - d) ** 0.3) for j, d, e in zip(*signals, strict=True)]
        assert found[row, :length].tolist() == pytest.approx(expected, abs=1e-12)


def test_robust_dependency():
    """The divergence from I- where I+ changes nothing; 0 where I+ changes everything; in proportion between."""
    unchanged = dependency_score("robust_dependency", ANCHOR, REMOVING, ANCHOR)
    assert torch.allclose(unchanged, js_divergence(ANCHOR.logits, REMOVING.logits), atol=1e-12)
    found = dependency_score("robust_dependency", ANCHOR, REMOVING, PRESERVING)
    stays = 1 - js_divergence(ANCHOR.logits, PRESERVING.logits) / math.log(2)
    assert torch.allclose(found, unchanged * stays, atol=1e-12)
    certain = torch.full((1, 1, 2), -math.inf, dtype=torch.float64)
    one, other = certain.clone(), certain.clone()
    one[..., 0], other[..., 1] = 0.0, 0.0
    anchor, far = (ResponseScores(torch.zeros(1, 1), torch.zeros(1, 1), logits) for logits in (one, other))
    assert dependency_score("robust_dependency", anchor, far, far).item() == pytest.approx(0.0, abs=1e-12)
    assert dependency_score("robust_dependency", anchor, far, anchor).item() == pytest.approx(math.log(2))


def test_scaled_scores():
    assert scaled(torch.tensor([[2.0, 6.0, 4.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])).tolist() == [
        [0.0, 1.0, 0.5, 0.0]
    ]
    assert scaled(torch.full((1, 3), 2.0), torch.ones(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


def compensated_by_loop(values):
    length = len(values)
    late = list(range(math.floor(length / 2), length))
    count = max(1, math.floor(0.2 * len(late)))
    least = sorted((values[t] for t in late), reverse=True)[count - 1]
    return [
        value * (1 + 0.3 * t / (length - 1)) if t in late and value >= least else value
        for t, value in enumerate(values)
    ]


@pytest.mark.parametrize("length", [2, 3, 10, 11, 41])
def test_late_tokens_are_compensated(length):
    values = torch.rand(2, length, generator=GENERATOR, dtype=torch.float64).mul(4).round() / 4  # ties
    mask = torch.ones(2, length + 3)
    mask[:, length:] = 0
    padded = torch.cat([values, torch.full((2, 3), 9.0, dtype=torch.float64)], dim=1)
    found = compensated(padded, mask)
    assert not found[:, length:].any()
    for row in range(2):
        assert found[row, :length].tolist() == pytest.approx(compensated_by_loop(values[row].tolist()), abs=1e-12)


def test_a_response_of_one_token_is_not_compensated():
    assert compensated(torch.tensor([[0.5]]), torch.ones(1, 1)).tolist() == [[0.5]]


@pytest.mark.parametrize("mass", [0.3, 0.95, 1.0])
def test_entropy_of_the_nucleus(mass):
    logits = ANCHOR.logits[0]
    for found, row in zip(nucleus_entropy(logits, mass).tolist(), logits.softmax(-1).tolist(), strict=True):
        kept, total = [], 0.0
        for p in sorted(row, reverse=True):
            if total < mass:
                kept.append(p)
            total += p
        shares = [p / math.fsum(kept) for p in kept]
        assert found == pytest.approx(-math.fsum(p * math.log(p) for p in shares), abs=1e-9)


def test_cosines_by_loop(monkeypatch):
    """Two prompts, the second without an image, in chunks of two tokens."""
    monkeypatch.setattr("cppo.perception.similarity.CHUNK", 2)
    prompts = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
    responses = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
    owners = Owners(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 1, 0, 1, 0]), 2)
    images = prompts[1:4]
    for place, values in enumerate(
        zip(mean_cosine(prompts, responses, owners), cosine_to_mean(prompts, responses, owners), strict=True)
    ):
        if owners.of_responses[place]:
            assert [value.item() for value in values] == [0.0, 0.0]
            continue
        token = responses[place]
        cosines = [torch.dot(token, image) / (token.norm() * image.norm()) for image in images]
        middle = images.mean(dim=0)
        expected = [sum(cosines) / 3, torch.dot(token, middle) / (token.norm() * middle.norm())]
        assert [value.item() for value in values] == pytest.approx([value.item() for value in expected], abs=1e-12)


def test_values_of_the_tokens_own_places():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert of_the_tokens_themselves(values, torch.tensor([[1, 1, 1], [1, 1, 0]])).tolist() == [
        [2.0, 3.0, 3.0],
        [5.0, 5.0, 6.0],
    ]


def test_similarities_are_scores():
    near = ResponseScores(
        ANCHOR.logps, ANCHOR.entropies, similarities={"last_layer": ANCHOR.logps.tanh(), "all_layers": ANCHOR.logps}
    )
    assert torch.equal(dependency_score("image_cosine", near), near.similarities["last_layer"])
    assert torch.equal(dependency_score("image_cosine_layers", near), near.similarities["all_layers"])
    expected = compensated((1 + near.similarities["last_layer"]) / 2, MASK)
    assert torch.equal(dependency_score("image_focus", near, response_mask=MASK), expected)


def test_scores_have_no_gradient():
    anchor = ResponseScores(
        ANCHOR.logps.clone().requires_grad_(), ANCHOR.entropies.clone().requires_grad_(), ANCHOR.logits
    )
    names = [name for name in SCORES if ":" not in name and "image" not in name]
    assert len(names) == 13
    for name in names:
        assert not dependency_score(name, anchor, REMOVING, PRESERVING, MASK).requires_grad, name
