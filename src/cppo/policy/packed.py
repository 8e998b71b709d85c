"""The model on packed rows: attention, the backbone, and the head on selected tokens.

Call `add_shared_prompt_forward(model)` once; then `model(shared_prompt=pack(...), readout=readout)`, also through
wrappers (DDP, FSDP, PEFT). The head runs inside the forward, and each backward has one forward.

The attention is an entry of transformers' own table, `NAME_shared_prompt` on the model's text part, where NAME is its
former attention. With the keyword argument `shared_prompt_layout` it attends over a packed row; without it, it is NAME.
The layout is an argument, so recomputation under gradient checkpointing sees the right row.
"""

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from cppo.perception import entropy_from_logits
from cppo.policy.inside import ReplacedValues
from cppo.policy.packing import PackedBatch, PackedRow, SharedPromptLayout
from cppo.policy.varlen import no_varlen_reason, varlen_attention
from cppo.probing import expect, failure
from cppo.trl_surface import chunked_logprob_function

SUFFIX = "_shared_prompt"
VOCABULARY_TILE = 8192
PROBE_TOLERANCE = 1e-4
"""Largest float32 difference between two computations of the same numbers of about 1."""


def add_shared_prompt_forward(model: PreTrainedModel, cast_lm_head_to_fp32: bool = False) -> None:
    """Let `model(shared_prompt=batch, readout=readout)` run a packed batch and return the result of `readout`.

    The backbone runs over the batch's passes; then `readout` gets the head and the hidden states of all scored tokens,
    in the order of `PackedBatch.tokens`. One pass for all views is the fastest. Several passes with gradients are each
    recomputed in the backward pass, so that peak memory stays near that of one. Without `shared_prompt` the model's
    forward is unchanged, including TRL's fused head, which must be added before. PEFT and other wrappers may come
    before or after.

    Args:
        model: a transformers vision-language model without wrappers, of a family that `unshared_reason` accepts.
        cast_lm_head_to_fp32: as in TRL.
    """
    attend_packed(model)
    original_forward = model.forward

    # The signature must stay: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        shared_prompt: PackedBatch | None = None,
        readout: "Readout | None" = None,
        **kwargs: Any,
    ) -> Any:
        if shared_prompt is None:
            return original_forward(*args, **kwargs)
        if readout is None:
            raise ValueError("shared_prompt needs a readout: pass the function that takes the hidden states")
        again = torch.is_grad_enabled() and sum(row.gradients for row in shared_prompt.passes) > 1

        def run(row: PackedRow) -> Tensor:
            if again and row.gradients:
                return checkpoint(_hidden_states, self, row, use_reentrant=False)
            with torch.set_grad_enabled(row.gradients and torch.is_grad_enabled()):
                return _hidden_states(self, row)

        return readout(torch.cat([run(row) for row in shared_prompt.passes]), LanguageHead(self, cast_lm_head_to_fp32))

    model.forward = MethodType(forward, model)


def _hidden_states(model: PreTrainedModel, row: PackedRow) -> Tensor:
    # The backbone is looked up on each call, because wrappers replace it. A ready 4-D mask stops it from building one.
    outputs = model.base_model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device),
        use_cache=False,
        shared_prompt_layout=row.layout,
        **({} if row.replaced is None else {"replaced_values": row.replaced}),
        **row.vision,
    )
    return row.scored_tokens(outputs.last_hidden_state)


# Attention


def attend_packed(model: PreTrainedModel) -> None:
    """Let the text part of `model` (not its vision tower) attend over packed rows; everything else stays the same."""
    config: Any = model.config.get_text_config()
    base = config._attn_implementation
    if base.endswith(SUFFIX):
        return
    name = base + SUFFIX
    AttentionInterface.register(name, _attention(base))
    masks = AttentionMaskInterface()
    if base in masks:
        AttentionMaskInterface.register(name, masks[base])
    config._attn_implementation = name


@cache
def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function registered as `base` with the suffix."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        shared_prompt_layout: SharedPromptLayout | None = None,
        replaced_values: ReplacedValues | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if replaced_values is not None:
            value = replaced_values.of(query, key, value, kwargs.get("scaling"))
        if shared_prompt_layout is None:
            return _base_function(module, base)(_BaseModule(module, base), query, key, value, attention_mask, **kwargs)
        dropout = kwargs.get("dropout", 0.0)
        return packed_attention(query, key, value, shared_prompt_layout, kwargs.get("scaling"), dropout), None

    return attention


def _base_function(module: torch.nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    # Transformers keeps eager attention in each model's own file, not in the table.
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]


class _BaseModule:
    """An attention module with its original implementation: flash attention reads its name from the config."""

    def __init__(self, module: torch.nn.Module, base: str) -> None:
        self._module = module
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @property
    def config(self) -> Any:
        config: Any = copy.copy(self._module.config)
        config._attn_implementation = self._base
        return config


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention in which each segment sees its prompt and itself, and each prompt sees itself.

    query: [1, heads, N, D]; key, value: [1, key heads, N, D]. Returns [1, N, heads, D].
    """
    query, key, value = (at_kernel_precision(tensor)[0].transpose(0, 1) for tensor in (query, key, value))
    if not dropout and no_varlen_reason(query.device, query.dtype, query.shape[-1]) is None:
        key, value = (tensor.index_select(0, layout.keys) for tensor in (key, value))
        ends, longest = (layout.cu_seqlens_q, layout.cu_seqlens_k), (layout.max_seqlen_q, layout.max_seqlen_k)
        return varlen_attention(query, key, value, *ends, longest, scaling, causal=True).unsqueeze(0)
    return _padded_attention(query, key, value, layout, scaling, dropout).unsqueeze(0)


def at_kernel_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast would inside the kernel; float32 rotary embeddings would choose another kernel and mask."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float
) -> Tensor:
    """Prompts and segments as two padded batches; all tensors [N, heads, D]."""
    prompts, prompt_key, prompt_value = (layout.padded_prompts(tensor) for tensor in (query, key, value))
    if prompts.numel():
        prompts = _sdpa(prompts, prompt_key, prompt_value, scaling, dropout, is_causal=True)
    segments = _sdpa(
        layout.padded_segments(query),
        torch.cat([prompt_key.index_select(0, layout.prompt_of_segment), layout.padded_segments(key)], dim=1),
        torch.cat([prompt_value.index_select(0, layout.prompt_of_segment), layout.padded_segments(value)], dim=1),
        scaling,
        dropout,
        attn_mask=layout.bias(query.dtype),
    )
    return layout.packed(prompts, segments)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, **mask: Any) -> Tensor:
    """Inputs and result: [prompts or segments, tokens, heads, D]."""
    groups = query.shape[2] // key.shape[2]
    # On other devices a mask with grouped heads falls back to a kernel that keeps all scores.
    grouped = groups > 1 and query.device.type == "cpu"
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    outputs = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=grouped, **mask
    )
    return outputs.transpose(1, 2)


# Head


def chunk_logits(device: torch.device) -> int:
    """How many logits are held at once in a computation over full distributions.

    Each chunk reads the whole output layer and adds to its whole gradient; a GPU takes chunks of 512 MiB in float32.
    """
    return 2**27 if device.type == "cuda" else 2**24


class LanguageHead:
    """Scores hidden states [n, H] of n tokens with a model's output projection, inside the model's forward.

    Args:
        model: a transformers model with a language-model head; its output is the logits, without soft cap or scale.
        float32: compute the head in float32, outside autocast (TRL's `cast_lm_head_to_fp32`).
    """

    def __init__(self, model: PreTrainedModel, float32: bool = False) -> None:
        self._projection = model.get_output_embeddings()
        self._float32 = float32
        # An adapter on the head is a module of another class; its weight alone would leave the adapter out. FSDP2
        # replaces the module's class by a subclass.
        kind = type(self._projection)
        self._plain = torch.nn.Linear in (kind.__bases__ if issubclass(kind, FSDPModule) else (kind,))
        parameters = (self._projection.weight, self._projection.bias) if self._plain else ()
        self._parameters: tuple[Any, ...] = tuple(_whole(parameter) for parameter in parameters)

    def scores(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets [n] and entropies, [n] each, nats; both with gradients.

        float32, or float64 for a float64 model.
        """
        hidden = self._prepared(hidden)
        device = hidden.device.type
        if self._plain and hidden.dtype != torch.float64 and failure(probe_chunked_head, device) is None:
            with self._precision(hidden):
                weight, bias = self._parameters
                return chunked_head(hidden, weight, bias, targets, temperature)

        # TRL's kernel computes in float32 and supports only plain projections.
        def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._logits(hidden, temperature)
            logps = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
            return logps, entropy_from_logits(logits)

        logps, entropies = self._in_chunks(chunk, hidden, targets)
        return logps, entropies

    def divergence(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        hidden: Tensor,
        view_hidden: Tensor,
        temperature: float = 1.0,
        *,
        anchor_gradients: bool = True,
        view_gradients: bool = True,
    ) -> Tensor:
        """`function` of the anchor's and a view's logits, [chunk, V] each, such as `kl_divergence`, at n tokens, [n].

        Without `anchor_gradients` the anchor's distribution is a constant; without `view_gradients` the view's is.
        """

        def logits(hidden: Tensor, gradients: bool) -> Tensor:
            with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
                return self._logits(hidden, temperature)

        def chunk(hidden: Tensor, view_hidden: Tensor) -> tuple[Tensor]:
            return (function(logits(hidden, anchor_gradients), logits(view_hidden, view_gradients)),)

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
        """`function` over chunks of tokens; the backward pass recomputes their logits."""
        size = max(1, chunk_logits(hidden.device) // self._projection.out_features)
        pieces = zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True)
        results = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def chunked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TRL's kernel: log-probabilities of the targets and entropies, [n] each, one tile of the vocabulary at a time."""
    no_soft_cap, no_scale = None, 1.0
    logps, entropies, *_ = chunked_logprob_function().apply(
        hidden, weight, bias, targets, temperature, VOCABULARY_TILE, no_soft_cap, no_scale, ("entropy",)
    )
    return logps, entropies


def probe_chunked_head(device: str = "cpu") -> None:
    """Raise unless TRL's kernel gives the log-probabilities, entropies and gradients of full logits.

    On a GPU it is another kernel, which Triton compiles there with the machine's C compiler.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).to(device).requires_grad_() for size in ((3, 4), (7, 4)))
    targets = torch.tensor([0, 3, 6], device=device)
    logits = hidden @ weight.T / 0.7
    logps = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
    expected, found = (logps, entropy_from_logits(logits)), chunked_head(hidden, weight, None, targets, 0.7)
    for name, one, other in zip(("log-probabilities", "entropies"), expected, found, strict=True):
        expect(torch.allclose(one, other, rtol=0, atol=PROBE_TOLERANCE), f"TRL's chunked head gives other {name}")
        gradients = (torch.autograd.grad(values.sum(), (hidden, weight), retain_graph=True) for values in (one, other))
        agree = [torch.allclose(a, b, rtol=0, atol=PROBE_TOLERANCE) for a, b in zip(*gradients, strict=True)]
        expect(all(agree), f"TRL's chunked head gives other gradients of the {name}")


def _whole(parameter: Tensor | None) -> Tensor | None:
    """The parameter itself, gathered where FSDP2 shards it; its gradient is then the mean over the ranks' gradients."""
    if not isinstance(parameter, DTensor):
        return parameter
    # By default a gradient counts as equal on all ranks, and each rank would keep its own for its shard.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


Readout = Callable[[Tensor, LanguageHead], dict[str, Tensor]]
"""(hidden states of the scored tokens [n, H], head) -> the caller's result."""
