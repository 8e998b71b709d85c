"""Attention over packed rows, as an attention implementation of transformers.

`share_prompts` sets `NAME_shared_prompt` on a model's text part, NAME being what it used before. Called with the
keyword argument `shared_prompt_layout` it computes attention over a packed row; called without it, it is NAME. The
layout travels as an argument, so recomputation under gradient checkpointing sees the row it belongs to.
"""

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from cppo.policy.layout import SharedPromptLayout
from cppo.probing import expect, failure

SUFFIX = "_shared_prompt"
MAX_VARLEN_HEAD_DIM = 256
BF16_TOLERANCE = 0.05
"""Largest difference of two attention kernels in bfloat16 on values of about 1."""


def share_prompts(model: PreTrainedModel) -> None:
    """Let the text part of `model` (not its vision tower) attend over packed rows; all else stays as it was."""
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
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if shared_prompt_layout is None:
            return _base_function(module, base)(_BaseModule(module, base), query, key, value, attention_mask, **kwargs)
        dropout = kwargs.get("dropout", 0.0)
        return packed_attention(query, key, value, shared_prompt_layout, kwargs.get("scaling"), dropout), None

    return attention


def _base_function(module: torch.nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    # Transformers keeps the eager attention in each model's own file, not in the table.
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]


class _BaseModule:
    """An attention module as its original implementation must see it: flash attention finds its name in the config."""

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
    """Causal attention in which each segment sees its prompt and itself, and each prompt itself.

    query: [1, heads, N, D]; key, value: [1, key heads, N, D]. Returns [1, N, heads, D].
    """
    query, key, value = (_at_kernel_precision(tensor)[0].transpose(0, 1) for tensor in (query, key, value))
    if not dropout and padding_reason(query) is None:
        return _varlen_attention(query, key, value, layout, scaling).unsqueeze(0)
    return _padded_attention(query, key, value, layout, scaling, dropout).unsqueeze(0)


def _at_kernel_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast would inside the kernel: rotary embeddings are float32, which decides kernel and mask before."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def padding_reason(query: Tensor) -> str | None:
    """Why packed rows are padded for these queries [..., D] instead of running torch's flash attention of variable
    length, which needs half precision on an NVIDIA GPU since Ampere; None where it runs."""
    if not query.is_cuda or torch.version.hip is not None:
        return f"{query.device} is no NVIDIA GPU"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in {query.dtype}".replace("torch.", "")
    if query.shape[-1] % 8 or query.shape[-1] > MAX_VARLEN_HEAD_DIM:
        return f"its heads of {query.shape[-1]} numbers are not at most {MAX_VARLEN_HEAD_DIM} in eights"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than Ampere"
    return failure(probe_varlen_attention, "cuda")


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None
) -> Tensor:
    """[N, heads, D] each. Flash attention aligns causal masks to the last key, as segments after a prompt are."""
    from torch.nn.attention.varlen import varlen_attn  # a prototype: it may go, and the probe then says so

    outputs = varlen_attn(
        query.contiguous(),
        key.index_select(0, layout.keys),
        value.index_select(0, layout.keys),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, outputs)


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float
) -> Tensor:
    """[N, heads, D] each; prompts and segments as two padded batches."""
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
    """[prompts or segments, tokens, heads, D] each, and so the result."""
    groups = query.shape[2] // key.shape[2]
    # Elsewhere a mask together with grouped heads falls back to a kernel that keeps all scores.
    grouped = groups > 1 and query.device.type == "cpu"
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    outputs = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=grouped, **mask
    )
    return outputs.transpose(1, 2)


def probe_varlen_attention(device: str) -> None:
    """Raise unless torch's attention of variable length agrees with the padded one."""
    layout = SharedPromptLayout.of([3], [2, 4], [0, 0], device)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(9, heads, 64, generator=generator).to(device, torch.bfloat16) for heads in (4, 2, 2)
    )
    scaling = 64**-0.5
    found = _varlen_attention(query, key, value, layout, scaling)
    expected = _padded_attention(query, key, value, layout, scaling, 0.0)
    difference = (found - expected).abs().max().item()
    expect(difference <= BF16_TOLERANCE, f"torch's varlen_attn differs from padded attention by {difference:.2g}")
