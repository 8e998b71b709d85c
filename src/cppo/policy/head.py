"""The language-model head over chosen tokens: log-probabilities, entropies and divergences without [B, T, V] logits."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cppo.perception import EXACT_DIVERGENCES, entropy_from_logits
from cppo.probing import expect, failure
from cppo.trl_surface import chunked_logprob_function

VOCABULARY_TILE = 8192
PROBE_TOLERANCE = 1e-4
"""What float32 explains between two ways to the same numbers of about 1."""
CHUNK_LOGITS = 2**24
"""Logits held at once where a computation needs whole distributions."""


class LanguageHead:
    """Scores hidden states [n, H] of n tokens with a model's output projection, inside the model's forward.

    Args:
        model: a transformers model with a language-model head whose output is the logits, without soft cap or scale.
        float32: compute the head in float32, outside autocast (TRL's `cast_lm_head_to_fp32`).
    """

    def __init__(self, model: PreTrainedModel, float32: bool = False) -> None:
        self._projection = model.get_output_embeddings()
        self._float32 = float32
        # An adapter on the head is a module of another class, and its weight alone would leave the adapter out.
        # FSDP2 puts a class of its own before the module's.
        kind = type(self._projection)
        self._plain = torch.nn.Linear in (kind.__bases__ if issubclass(kind, FSDPModule) else (kind,))
        parameters = (self._projection.weight, self._projection.bias) if self._plain else ()
        self._parameters: tuple[Any, ...] = tuple(_whole(parameter) for parameter in parameters)

    def scores(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets [n] and entropies, [n] each, nats; both with gradients.

        float32, or float64 for a float64 model.
        """
        hidden = self._prepared(hidden)
        if self._plain and hidden.dtype != torch.float64 and failure(probe_chunked_head) is None:
            with self._precision(hidden):
                weight, bias = self._parameters
                return chunked_head(hidden, weight, bias, targets, temperature)

        # TRL's kernel computes in float32 and knows plain projections only.
        def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._logits(hidden, temperature)
            logps = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
            return logps, entropy_from_logits(logits)

        logps, entropies = self._in_chunks(chunk, hidden, targets)
        return logps, entropies

    def divergence(
        self,
        name: str,
        hidden: Tensor,
        view_hidden: Tensor,
        temperature: float = 1.0,
        *,
        anchor_gradients: bool = True,
        view_gradients: bool = True,
    ) -> Tensor:
        """Exact divergence ("kl" or "js") of a view's distribution from the anchor's at n tokens, [n], nats.

        Without `anchor_gradients` the anchor's distribution is a constant, without `view_gradients` the view's.
        """

        def logits(hidden: Tensor, gradients: bool) -> Tensor:
            with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
                return self._logits(hidden, temperature)

        def chunk(hidden: Tensor, view_hidden: Tensor) -> tuple[Tensor]:
            return (EXACT_DIVERGENCES[name](logits(hidden, anchor_gradients), logits(view_hidden, view_gradients)),)

        return self._in_chunks(chunk, self._prepared(hidden), self._prepared(view_hidden))[0]

    def _prepared(self, hidden: Tensor) -> Tensor:
        return hidden.float() if self._float32 else hidden

    def _precision(self, hidden: Tensor) -> torch.autocast | nullcontext:
        return torch.autocast(hidden.device.type, enabled=False) if self._float32 else nullcontext()

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        with self._precision(hidden):
            if self._plain:
                weight, bias = self._parameters
                bias = bias if bias is None else bias.to(hidden.dtype)
                logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
            else:
                logits = self._projection(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature

    def _in_chunks(
        self, function: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """`function` over chunks of tokens, whose logits are computed again for the backward pass."""
        size = max(1, CHUNK_LOGITS // self._projection.out_features)
        pieces = zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True)
        results = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def chunked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TRL's kernel: log-probabilities of the targets and entropies, [n] each, a tile of the vocabulary at a time."""
    no_soft_cap, no_scale = None, 1.0
    logps, entropies, *_ = chunked_logprob_function().apply(
        hidden, weight, bias, targets, temperature, VOCABULARY_TILE, no_soft_cap, no_scale, ("entropy",)
    )
    return logps, entropies


def probe_chunked_head() -> None:
    """Raise unless TRL's kernel gives the log-probabilities, entropies and gradients of whole logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).requires_grad_() for size in ((3, 4), (7, 4)))
    targets = torch.tensor([0, 3, 6])
    logits = hidden @ weight.T / 0.7
    logps = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
    expected, found = (logps, entropy_from_logits(logits)), chunked_head(hidden, weight, None, targets, 0.7)
    for name, one, other in zip(("log-probabilities", "entropies"), expected, found, strict=True):
        expect(torch.allclose(one, other, rtol=0, atol=PROBE_TOLERANCE), f"TRL's chunked head gives other {name}")
        gradients = (torch.autograd.grad(values.sum(), (hidden, weight), retain_graph=True) for values in (one, other))
        agree = [torch.allclose(a, b, rtol=0, atol=PROBE_TOLERANCE) for a, b in zip(*gradients, strict=True)]
        expect(all(agree), f"TRL's chunked head gives other gradients of the {name}")


def _whole(parameter: Tensor | None) -> Tensor | None:
    """The parameter itself, gathered where FSDP2 shards it; its gradient is then the mean over the ranks' own."""
    if not isinstance(parameter, DTensor):
        return parameter
    # By default a gradient counts as the same on all ranks, and each would keep its own for its shard alone.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
