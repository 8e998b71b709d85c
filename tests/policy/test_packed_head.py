"""The head's chunked results against full float64 logits."""

import pytest
import torch
from tiny_models import make_model
from torch import Tensor

from cppo.perception import EXACT_DIVERGENCES, js_divergence, kl_divergence
from cppo.policy import LanguageHead
from cppo.policy import packed as head_module


def make_head(monkeypatch, dtype: torch.dtype, bias=False):
    monkeypatch.setattr(head_module, "chunk_logits", lambda device: 5 * 97)
    model = make_model("llava", dtype=dtype)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(97, dtype=dtype))
    return model.lm_head, LanguageHead(model)


def reference_logits(linear: torch.nn.Linear, hidden: Tensor) -> Tensor:
    logits = hidden.double() @ linear.weight.double().T
    if linear.bias is not None:
        logits = logits + linear.bias.double()
    return logits / 0.7


def reference_divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    if name == "kl":
        return (p * (p / q).log()).sum(dim=-1)
    mixture = (p + q) / 2
    return ((p * (p / mixture).log()).sum(dim=-1) + (q * (q / mixture).log()).sum(dim=-1)) / 2


def make_hidden(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(13, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def test_a_gpu_holds_more_logits_at_once():
    """2**27 logits of Qwen2.5-VL's vocabulary are 883 tokens, not the 110 of a CPU."""
    assert [head_module.chunk_logits(torch.device(name)) // 151_936 for name in ("cpu", "cuda")] == [110, 883]


def test_a_device_on_which_trls_kernel_fails_holds_chunks_of_logits(monkeypatch):
    """On a GPU without a C compiler Triton compiles nothing. Here the device `meta` stands for it."""
    asked = []
    monkeypatch.setattr(head_module, "failure", lambda probe, device: asked.append(device) or "no C compiler")
    monkeypatch.setattr(head_module, "chunked_head", lambda *_: pytest.fail("the kernel runs"))
    head = LanguageHead(make_model("llava").to("meta"))
    logps, entropies = head.scores(torch.empty(13, 32, device="meta"), torch.empty(13, dtype=torch.long, device="meta"))
    assert asked == ["meta"]
    assert logps.shape == entropies.shape == (13,)


TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("bias", [False, True])
def test_scores_and_gradients(monkeypatch, dtype, bias):
    linear, head = make_head(monkeypatch, dtype, bias)
    hidden, targets = make_hidden(1, dtype), torch.arange(13) * 7
    inputs = (hidden, *linear.parameters())
    logps, entropies = head.scores(hidden, targets, 0.7)
    assert logps.dtype == entropies.dtype == dtype
    log_p = torch.log_softmax(reference_logits(linear, hidden), dim=-1)
    expected = (log_p[torch.arange(13), targets], -(log_p.exp() * log_p).sum(dim=-1))
    check((logps, entropies), expected, inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["kl", "js"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("bias", [False, True])
def test_divergences_and_gradients(monkeypatch, name, dtype, bias):
    linear, head = make_head(monkeypatch, dtype, bias)
    hidden, view = make_hidden(1, dtype), make_hidden(2, dtype)
    found = head.divergence(EXACT_DIVERGENCES[name], hidden, view, 0.7)
    p, q = (torch.softmax(reference_logits(linear, h), dim=-1) for h in (hidden, view))
    expected = reference_divergence(name, p, q)
    check((found,), (expected,), (hidden, view, *linear.parameters()), TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["kl", "js"])
@pytest.mark.parametrize("constant", ["anchor", "view"])
def test_divergences_from_a_constant(monkeypatch, name, constant):
    linear, head = make_head(monkeypatch, torch.float64, True)
    hidden, view = make_hidden(1, torch.float64), make_hidden(2, torch.float64)
    found, again = (
        head.divergence(EXACT_DIVERGENCES[name], hidden, view, 0.7, **{f"{constant}_gradients": False})
        for _ in range(2)
    )
    logits = [reference_logits(linear, h) for h in (hidden, view)]
    p, q = (
        torch.softmax(one.detach() if kind == constant else one, dim=-1)
        for kind, one in zip(("anchor", "view"), logits, strict=True)
    )
    expected = reference_divergence(name, p, q)
    moving = view if constant == "anchor" else hidden
    check((found,), (expected,), (moving, *linear.parameters()), TOLERANCES[torch.float64])
    still = hidden if constant == "anchor" else view
    assert torch.autograd.grad(again.sum(), still, allow_unused=True) == (None,)


def check(found: tuple, expected: tuple, inputs: tuple, tolerance: float) -> None:
    weights = torch.linspace(-1, 1, 13, dtype=torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    gradients = [
        torch.autograd.grad(sum((values.double() * weights).sum() for values in side), inputs)
        for side in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 5 * tolerance * other.norm()


def test_no_tokens_have_no_scores(monkeypatch):
    _, head = make_head(monkeypatch, torch.float32)
    hidden = torch.zeros(0, 32, requires_grad=True)
    values = (*head.scores(hidden, torch.zeros(0, dtype=torch.long)), head.divergence(js_divergence, hidden, hidden))
    assert [tuple(value.shape) for value in values] == [(0,)] * 3
    torch.cat(values).sum().backward()
    assert hidden.grad.shape == (0, 32)


def test_no_tensor_of_all_logits_is_kept(monkeypatch):
    """Between forward and backward, no tensor as large as the logits of all tokens is alive."""
    linear, head = make_head(monkeypatch, torch.float32)
    kept = []
    hidden = torch.randn(200, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head.scores(hidden, torch.zeros(200, dtype=torch.long))
        head.divergence(kl_divergence, hidden, hidden)
    assert kept
    assert max(kept) < 200 * 97 / 2
    assert linear.weight.numel() < 200 * 97 / 2


@pytest.mark.parametrize("cast", [False, True])
def test_float32_head_of_a_bfloat16_model(cast):
    model = make_model("llava", dtype=torch.bfloat16)
    hidden = make_hidden(1, torch.bfloat16)
    logps, _ = LanguageHead(model, float32=cast).scores(hidden, torch.arange(13), 0.7)
    exact = torch.log_softmax(reference_logits(model.lm_head, hidden), dim=-1)[torch.arange(13), torch.arange(13)]
    error = (logps.double() - exact).abs().max()
    assert logps.dtype == torch.float32
    assert error < 2e-5 if cast else 1e-4 < error < 0.1
