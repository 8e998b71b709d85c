"""The contrastive perception loss against a float64 loop, gradcheck and its invariances."""

import math
import random

import pytest
import torch

from cppo.perception import contrastive_perception_loss, contrastive_perception_tokens, rollout_mean_loss


def token_by_loop(d_plus: float, d_minus: float, tau: float) -> float:
    """InfoNCE by its definition, scaled by its larger term so that nothing overflows."""
    low, high = -d_plus / tau, -d_minus / tau
    top = max(low, high)
    return -(low - top - math.log(math.exp(low - top) + math.exp(high - top)))


def example(seed: int, rows: int = 4, length: int = 7):
    source = random.Random(seed)
    d_plus = [[source.expovariate(4.0) for _ in range(length)] for _ in range(rows)]
    d_minus = [[source.expovariate(2.0) for _ in range(length)] for _ in range(rows)]
    mask = [[source.random() < 0.5 for _ in range(length)] for _ in range(rows)]
    mask[1] = [False] * length
    d_plus[0][0], d_minus[0][0], mask[0][0] = 9.9, 0.0, True
    d_plus[2][1], d_minus[2][1], mask[2][1] = 0.0, 9.9, True
    return d_plus, d_minus, mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("num_tokens", [None, 31, 2.5, "tensor"])
def test_loss_equals_the_loop(dtype, tolerance, tau, num_tokens):
    d_plus, d_minus, mask = example(0)
    chosen = [(b, t) for b in range(4) for t in range(7) if mask[b][t]]
    total = math.fsum(token_by_loop(d_plus[b][t], d_minus[b][t], tau) for b, t in chosen)
    divisor = len(chosen) if num_tokens is None else 31 if num_tokens == "tensor" else num_tokens
    value = contrastive_perception_loss(
        torch.tensor(d_plus, dtype=dtype),
        torch.tensor(d_minus, dtype=dtype),
        torch.tensor(mask),
        tau,
        torch.tensor(31) if num_tokens == "tensor" else num_tokens,
    )
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.item() == pytest.approx(total / divisor, rel=tolerance)


def test_bf16_divergences_are_accumulated_in_float32():
    """4,000 tokens: a bfloat16 sum would stop growing at 256."""
    generator = torch.Generator().manual_seed(1)
    d_plus, d_minus = torch.rand(4, 1000, generator=generator), torch.rand(4, 1000, generator=generator)
    d_plus, d_minus = d_plus.bfloat16(), d_minus.bfloat16()
    value = contrastive_perception_loss(d_plus, d_minus, torch.ones(4, 1000), num_tokens=1)
    assert value.dtype == torch.float32
    pairs = zip(d_plus.double().flatten().tolist(), d_minus.double().flatten().tolist(), strict=True)
    assert value.item() == pytest.approx(math.fsum(token_by_loop(a, b, 0.1) for a, b in pairs), rel=1e-4)


def test_equal_divergences_cost_ln_2():
    d = torch.rand(2, 3, dtype=torch.float64)
    assert contrastive_perception_loss(d, d, torch.ones(2, 3)).item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("num_tokens", [None, 0, 5, torch.tensor(0), torch.tensor(5.0)])
def test_empty_selection_is_a_zero_with_a_graph(num_tokens):
    d_plus = torch.rand(2, 3, requires_grad=True)
    d_minus = torch.rand(2, 3, requires_grad=True)
    value = contrastive_perception_loss(d_plus, d_minus, torch.zeros(2, 3), num_tokens=num_tokens)
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(d_plus.grad, torch.zeros(2, 3))
    assert torch.equal(d_minus.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("reduce", ["tokens", "rollouts"])
def test_values_outside_the_selection_have_no_effect(reduce):
    d_plus, d_minus, mask = example(2)
    mask = torch.tensor(mask)
    values, gradients = [], []
    for filler in (0.0, math.nan, math.inf):
        plus = torch.tensor(d_plus).masked_fill(~mask, filler).requires_grad_()
        minus = torch.tensor(d_minus).masked_fill(~mask, filler).requires_grad_()
        if reduce == "tokens":
            value = contrastive_perception_loss(plus, minus, mask)
        else:
            value = rollout_mean_loss(contrastive_perception_tokens(plus, minus, 0.1, mask), mask, 3)
        value.backward()
        values.append(value.detach())
        gradients.append(torch.stack([plus.grad, minus.grad]))
    for value, gradient in zip(values, gradients, strict=True):
        assert torch.equal(value, values[0])
        assert torch.equal(gradient, gradients[0])
    assert gradients[0].abs().sum() > 0


def test_gradcheck():
    generator = torch.Generator().manual_seed(3)
    d_plus = torch.rand(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    d_minus = torch.rand(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4, generator=generator) < 0.6

    def loss(a, b):
        return contrastive_perception_loss(a, b, mask, temperature=0.3)

    def rollout_loss(a, b):
        return rollout_mean_loss(contrastive_perception_tokens(a, b, 0.3), mask, 2)

    assert torch.autograd.gradcheck(loss, (d_plus, d_minus), atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(rollout_loss, (d_plus, d_minus), atol=1e-8, rtol=1e-6)


def test_rollout_mean_equals_the_loop_and_adds_up_over_any_cut():
    d_plus, d_minus, mask = example(4, rows=6)
    expected = 0.0
    for b in range(6):
        kept = [token_by_loop(d_plus[b][t], d_minus[b][t], 0.1) for t in range(7) if mask[b][t]]
        expected += math.fsum(kept) / len(kept) / 5 if kept else 0.0
    mask = torch.tensor(mask)
    tokens = contrastive_perception_tokens(
        torch.tensor(d_plus, dtype=torch.float64), torch.tensor(d_minus, dtype=torch.float64), 0.1
    )
    assert rollout_mean_loss(tokens, mask, 5).item() == pytest.approx(expected, rel=1e-12)
    for cut in (1, 2, 3, 5):
        parts = zip(tokens.split(cut), mask.split(cut), strict=True)
        assert sum(rollout_mean_loss(a, b, 5).item() for a, b in parts) == pytest.approx(expected, rel=1e-12)


def test_rollout_mean_of_nothing_is_a_zero_with_a_graph():
    tokens = torch.rand(2, 3, requires_grad=True)
    value = rollout_mean_loss(tokens, torch.zeros(2, 3), 0)
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(tokens.grad, torch.zeros(2, 3))


def test_padding_and_row_order_change_nothing():
    d_plus, d_minus, mask = (torch.tensor(part) for part in example(5))
    d_plus, d_minus = d_plus.double(), d_minus.double()
    order = torch.tensor([2, 3, 0, 1])

    def pad(tensor):
        return torch.nn.functional.pad(tensor, (3, 9), value=1)

    def losses(a, b, m):
        tokens = contrastive_perception_tokens(a, b, 0.1)
        return torch.stack([contrastive_perception_loss(a, b, m), rollout_mean_loss(tokens, m, 3)])

    expected = losses(d_plus, d_minus, mask)
    padded_mask = torch.nn.functional.pad(mask, (3, 9))
    torch.testing.assert_close(losses(pad(d_plus), pad(d_minus), padded_mask), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses(d_plus[order], d_minus[order], mask[order]), expected, rtol=1e-12, atol=0)


def test_arguments_that_do_not_fit_are_named():
    d, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            contrastive_perception_loss(d, d, mask, temperature)
    with pytest.raises(ValueError, match="d_removing must have the shape of d_preserving"):
        contrastive_perception_loss(d, d[:, :2], mask)
    with pytest.raises(ValueError, match="token_mask must have the shape of the loss"):
        contrastive_perception_loss(d, d, mask[:1])
    with pytest.raises(ValueError, match="num_tokens must not be negative"):
        contrastive_perception_loss(d, d, mask, num_tokens=-1)
    with pytest.raises(ValueError, match=r"weights must have the shape \(2,\), but has \(1,\)"):
        rollout_mean_loss(d, mask, 1, torch.ones(1))
    with pytest.raises(ValueError, match="num_rollouts must not be negative"):
        rollout_mean_loss(d, mask, math.nan)
    with pytest.raises(ValueError, match=r"token_loss must have the shape \[B, T\]"):
        rollout_mean_loss(d[0], mask[0], 1)
