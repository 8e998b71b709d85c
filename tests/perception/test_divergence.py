"""Divergences and scores against loops in Python floats (float64), closed forms and gradcheck."""

import math
import random

import pytest
import torch

from cppo.perception import (
    contrastive_perception_loss,
    entropy_from_logits,
    entropy_shift,
    js_divergence,
    k1_divergence,
    k3_divergence,
    kl_divergence,
    logp_shift,
)

INF = math.inf


def probabilities(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) if value > -INF else 0.0 for value in row]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def relative_entropy(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0.0)


def jensen_shannon(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (relative_entropy(p, middle) + relative_entropy(q, middle)) / 2


def random_logits(seed: int, shape: tuple[int, ...], spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(function, logits, view_logits):
    return torch.tensor(
        [
            [function(probabilities(a), probabilities(b)) for a, b in zip(row, view_row, strict=True)]
            for row, view_row in zip(logits.tolist(), view_logits.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("exact", "reference"), [(kl_divergence, relative_entropy), (js_divergence, jensen_shannon)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_exact_divergences_equal_the_loop(exact, reference, dtype, tolerance):
    logits, view_logits = random_logits(0, (3, 4, 11)), random_logits(1, (3, 4, 11))
    logits[0, 1, 3] = view_logits[0, 1, 3] = -INF
    logits[2, 2, 5] = -INF
    value = exact(logits.to(dtype), view_logits.to(dtype))
    assert value.dtype == dtype
    expected = by_loop(reference, logits, view_logits)
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("exact", "reference"), [(kl_divergence, relative_entropy), (js_divergence, jensen_shannon)])
def test_bf16_logits_are_accumulated_in_float32(exact, reference):
    logits, view_logits = random_logits(2, (2, 3, 4000)).bfloat16(), random_logits(3, (2, 3, 4000)).bfloat16()
    value = exact(logits, view_logits)
    assert value.dtype == torch.float32
    expected = by_loop(reference, logits.double(), view_logits.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_closed_forms():
    p, q = 0.9, 0.2
    logits = torch.tensor([[[math.log(p / (1 - p)), 0.0]]], dtype=torch.float64)
    view_logits = torch.tensor([[[math.log(q / (1 - q)), 0.0]]], dtype=torch.float64)
    bernoulli = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl_divergence(logits, view_logits).item() == pytest.approx(bernoulli, rel=1e-12)
    point = torch.tensor([[0.0, -INF, -INF, -INF]], dtype=torch.float64)
    uniform = torch.zeros(1, 4, dtype=torch.float64)
    assert kl_divergence(point, uniform).item() == pytest.approx(math.log(4), rel=1e-12)
    assert kl_divergence(uniform, point).item() == INF
    assert entropy_from_logits(uniform).item() == pytest.approx(math.log(4), rel=1e-12)
    assert entropy_from_logits(point).item() == 0.0


def test_divergence_of_a_distribution_from_itself_is_exactly_zero():
    logits = random_logits(4, (2, 5, 50)).float()
    logits[:, :, :7] = -INF
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(2, 5))
    assert js_divergence(logits, logits).abs().max() < 1e-6
    logps = torch.log_softmax(logits, -1)[:, :, 10]
    assert torch.equal(k3_divergence(logps, logps), torch.zeros(2, 5))


def test_js_is_symmetric_and_bounded_by_ln_2_and_reaches_it():
    logits, view_logits = random_logits(5, (4, 6, 30), spread=20.0), random_logits(6, (4, 6, 30), spread=20.0)
    value = js_divergence(logits, view_logits)
    torch.testing.assert_close(value, js_divergence(view_logits, logits), rtol=1e-12, atol=1e-14)
    assert value.min() >= -1e-14
    assert value.max() <= math.log(2) + 1e-12
    left, right = torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])
    assert js_divergence(left, right).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("exact", [kl_divergence, js_divergence, lambda a, b: entropy_from_logits(a + b)])
def test_gradcheck(exact):
    logits = random_logits(7, (2, 3, 5), spread=1.0).requires_grad_()
    view_logits = random_logits(8, (2, 3, 5), spread=1.0).requires_grad_()
    assert torch.autograd.gradcheck(exact, (logits, view_logits), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("exact", [kl_divergence, js_divergence, lambda a, b: entropy_from_logits(a + b)])
def test_banned_tokens_change_neither_value_nor_gradient(exact):
    """The same distributions with a banned token in both, and without that token."""
    short = [random_logits(seed, (1, 2, 6), spread=1.0).requires_grad_() for seed in (9, 10)]
    column = torch.full((1, 2, 1), -INF, dtype=torch.float64)
    long = [torch.cat([tensor.detach(), column], dim=-1).requires_grad_() for tensor in short]
    expected, value = exact(*short), exact(*long)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    expected.sum().backward()
    value.sum().backward()
    for kept, extended in zip(short, long, strict=True):
        torch.testing.assert_close(extended.grad[..., :6], kept.grad, rtol=1e-10, atol=1e-14)
        assert torch.equal(extended.grad[..., 6], torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("banned_side", [0, 1])
def test_js_gradient_is_finite_and_right_where_one_side_bans_a_token(banned_side):
    """A ban is the limit of a very low logit; the gradient must agree with the limit."""
    banned = [random_logits(seed, (3, 6), spread=1.0) for seed in (11, 12)]
    low = [tensor.clone() for tensor in banned]
    banned[banned_side][:, 2] = -INF
    low[banned_side][:, 2] = -60.0
    for tensor in banned + low:
        tensor.requires_grad_()
    value = js_divergence(*banned)
    value.sum().backward()
    js_divergence(*low).sum().backward()
    for one, other in zip(banned, low, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-12)


def k3_by_loop(logp: float, view_logp: float) -> float:
    x = min(20.0, max(-20.0, view_logp - logp))
    return min(10.0, max(-10.0, math.exp(x) - x - 1.0))


def test_k3_equals_the_loop_with_its_clamps():
    source = random.Random(0)
    logps = [-source.expovariate(0.3) for _ in range(60)] + [-30.0, -0.1, -1.0, -25.0]
    view_logps = [-source.expovariate(0.3) for _ in range(60)] + [-0.1, -40.0, -3.0, -4.0]
    expected = torch.tensor([k3_by_loop(a, b) for a, b in zip(logps, view_logps, strict=True)])
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        value = k3_divergence(torch.tensor(logps, dtype=dtype), torch.tensor(view_logps, dtype=dtype))
        torch.testing.assert_close(value.float(), expected, rtol=tolerance, atol=1e-6)
    assert expected.max() == 10.0  # the values' clamp acts; that of the ratios, below


def test_k3_gradient_is_the_closed_form_and_zero_at_the_clamp():
    logps = torch.tensor([-1.0, -2.0, -0.5, -30.0], dtype=torch.float64, requires_grad=True)
    view_logps = torch.tensor([-1.5, -0.3, -0.5, -0.1], dtype=torch.float64, requires_grad=True)
    k3_divergence(logps, view_logps).sum().backward()
    slope = [math.exp(x) - 1.0 for x in (-0.5, 1.7, 0.0)] + [0.0]
    torch.testing.assert_close(view_logps.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(logps.grad, -view_logps.grad, rtol=1e-12, atol=0)


def test_k3_of_a_token_that_the_anchor_all_but_bans_is_10_with_gradient_0():
    """exp of these log-ratios overflows float32, and 0 times infinity would be the gradient."""
    logps = torch.tensor([-100.0, -INF, -1.0, -1.0], requires_grad=True)
    view_logps = torch.tensor([-1.0, -1.0, -100.0, -INF], requires_grad=True)
    value = k3_divergence(logps, view_logps)
    value.sum().backward()
    assert value.tolist() == [10.0] * 4
    assert logps.grad.tolist() == view_logps.grad.tolist() == [0.0] * 4


def test_k3_is_unbiased_for_kl_on_sampled_tokens():
    """Its expectation over the anchor's own tokens is KL(anchor || view), summed over the vocabulary."""
    log_p = torch.log_softmax(random_logits(13, (8,), spread=0.7), -1)
    log_q = torch.log_softmax(random_logits(14, (8,), spread=0.7), -1)
    expectation = (log_p.exp() * k3_divergence(log_p, log_q)).sum().item()
    assert expectation == pytest.approx(relative_entropy(log_p.exp().tolist(), log_q.exp().tolist()), rel=1e-10)


def test_k3_keeps_small_differences_that_exp_minus_one_would_lose():
    logps = torch.tensor([-1.0], dtype=torch.float32)
    view_logps = logps + 2.0**-12
    assert k3_divergence(logps, view_logps).item() == pytest.approx(0.5 * 2.0**-24, rel=1e-3)


def test_k3_of_tokens_banned_under_both_views_is_zero_with_zero_gradient():
    logps = torch.tensor([-INF, -1.0], requires_grad=True)
    view_logps = torch.tensor([-INF, -INF], requires_grad=True)
    value = k3_divergence(logps, view_logps)
    assert value.tolist() == [0.0, 10.0]
    value.sum().backward()
    assert logps.grad.tolist() == [0.0, 0.0]
    assert view_logps.grad.tolist() == [0.0, 0.0]


def test_k3_of_bf16_is_computed_in_float32():
    logps, view_logps = torch.tensor([[-1.0]]).bfloat16(), torch.tensor([[-1.0078125]]).bfloat16()
    value = k3_divergence(logps, view_logps)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(k3_by_loop(-1.0, -1.0078125), rel=1e-4)


def test_entropy_equals_the_loop():
    logits = random_logits(15, (2, 3, 9))
    logits[1, 1, :4] = -INF
    expected = [
        [-math.fsum(p * math.log(p) for p in probabilities(token) if p > 0) for token in row] for row in logits.tolist()
    ]
    torch.testing.assert_close(
        entropy_from_logits(logits), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )
    assert entropy_from_logits(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_equal_the_loop_and_carry_no_gradient(dtype):
    source = random.Random(1)
    entropy = torch.tensor([[source.expovariate(1.0) for _ in range(5)] for _ in range(4)]).to(dtype)
    view_entropy = torch.tensor([[source.expovariate(1.0) for _ in range(5)] for _ in range(4)]).to(dtype)
    entropy[0, 0] = view_entropy[0, 0] = 0.0
    entropy.requires_grad_()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6

    rise = [
        [max(0.0, b - a) for a, b in zip(row, view_row, strict=True)]
        for row, view_row in zip(entropy.tolist(), view_entropy.tolist(), strict=True)
    ]
    share = [
        [r / (b + 1e-6) for r, b in zip(row, view_row, strict=True)]
        for row, view_row in zip(rise, view_entropy.tolist(), strict=True)
    ]
    for value, expected in (
        (entropy_shift(entropy, view_entropy), share),
        (entropy_shift(entropy, view_entropy, relative=False), rise),
        (logp_shift(-entropy, -view_entropy), rise),
    ):
        assert not value.requires_grad
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            value.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )
        assert (value[entropy >= view_entropy] == 0.0).all()


def test_rounding_of_entropies_near_zero_is_no_rise():
    """Two float32 formulas of the entropy and float64 agree on which tokens rise, where the policy is mostly sure."""
    sure = random_logits(0, (40, 500), 1.0)
    gap = torch.where(torch.arange(40) % 2 == 0, torch.linspace(2.0, 6.0, 40), torch.linspace(20.0, 22.0, 40))
    sure[:, 0] = sure[:, 1:].amax(dim=1) + gap
    view = sure.clone()
    view[:, 0] -= 0.05

    def by_log_partition(logits):  # as in TRL's head and verl's engines
        return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)

    exact = [entropy_from_logits(logits) for logits in (sure, view)]
    rounded = [by_log_partition(logits.float()) for logits in (sure, view)]
    also_rounded = [entropy_from_logits(logits.float()) for logits in (sure, view)]
    rising = [entropy_shift(*pair) > 0 for pair in (exact, rounded, also_rounded)]
    assert rising[0].tolist() == [True, False] * 20
    assert torch.equal(rising[0], rising[1])
    assert torch.equal(rising[0], rising[2])
    assert (exact[1] > exact[0]).all()
    assert not (rounded[1] > rounded[0]).all()


def test_arguments_that_do_not_fit_are_named():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"view_logps must have the shape of logps, \(2, 3\), but has \(2, 4\)"):
        k3_divergence(a, b)
    with pytest.raises(ValueError, match="view_logits must have the shape of logits"):
        kl_divergence(a, b)
    with pytest.raises(ValueError, match="view_logits must have the shape of logits"):
        js_divergence(a, b)
    with pytest.raises(ValueError, match="view_entropy must have the shape of entropy"):
        entropy_shift(a, b)
    with pytest.raises(ValueError, match=r"logps must be a floating-point tensor, but its dtype is torch\.int64"):
        logp_shift(a.long(), a)
    with pytest.raises(ValueError, match="logits must have a floating-point dtype and a vocabulary dimension"):
        entropy_from_logits(torch.zeros(2, 0))


def test_k1_is_the_log_ratio_and_the_anchor_cancels_in_a_difference():
    logps = torch.tensor([[-0.8, -0.8, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    views = torch.tensor([[-1.0, -0.8, -25.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    value = k1_divergence(logps, views)
    torch.testing.assert_close(value, torch.tensor([[0.2, 0.0, 10.0, 0.0]], dtype=torch.float64))
    for gradient, sign in zip(torch.autograd.grad(value.sum(), (logps, views)), (1.0, -1.0), strict=True):
        assert gradient.tolist() == [[sign, sign, 0.0, 0.0]]


@pytest.mark.parametrize(("divergence", "loss"), [(k1_divergence, 0.1269), (k3_divergence, 0.4681)])
def test_the_loss_of_one_token_by_hand(divergence, loss):
    """log-probabilities -0.8 under the image, -1 under I+ and -1.2 under I-; the temperature is 0.1."""
    logp, preserving, removing = (torch.tensor([[value]], dtype=torch.float64) for value in (-0.8, -1.0, -1.2))
    logp.requires_grad_()
    kept = torch.ones(1, 1)

    def contrast(anchor):
        return contrastive_perception_loss(divergence(anchor, preserving), divergence(anchor, removing), kept, 0.1)

    found = contrast(logp)
    assert found.item() == pytest.approx(loss, abs=5e-5)
    (gradient,) = torch.autograd.grad(found, logp)
    elsewhere = contrast(torch.tensor([[-4.0]], dtype=torch.float64))
    anchor_cancels = divergence is k1_divergence
    assert (gradient.item() == 0.0) == anchor_cancels
    assert (elsewhere.item() == pytest.approx(loss, abs=5e-5)) == anchor_cancels
