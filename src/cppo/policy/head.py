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
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from cppo.perception import EXACT_DIVERGENCES, entropy_from_logits

VOCABULARY_TILE = 8192
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
        if self._plain and hidden.dtype != torch.float64:
            with self._precision(hidden), maybe_gather_lm_head_ctx(*self._parameters):
                logps, entropies, *_ = ChunkedLogProbFunction.apply(
                    hidden,
                    *self._parameters,
                    targets,
                    temperature,
                    VOCABULARY_TILE,
                    None,  # no soft cap
                    1.0,  # no scale
                    ("entropy",),
                )
            return logps, entropies

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
        with self._precision(hidden), maybe_gather_lm_head_ctx(*self._parameters):
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


def _whole(parameter: Tensor | None) -> Tensor | None:
    """The parameter itself, gathered where FSDP2 shards it; its gradient is then the mean over the ranks' own."""
    if not isinstance(parameter, DTensor):
        return parameter
    # By default a gradient counts as the same on all ranks, and each would keep its own for its shard alone.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
