"""Attention over packed rows, as an attention implementation of transformers.

`share_prompts` sets `NAME_shared_prompt` on a model's text part, NAME being what it used before. Called with the
keyword argument `shared_prompt_layout` it computes attention over a packed row; called without it, it is NAME. The
layout travels as an argument, so recomputation under gradient checkpointing sees the row it belongs to.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cppo.policy.layout import SharedPromptLayout

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]
else:
    # In its first releases it had no scale, window or grouped heads.
    if not inspect.signature(varlen_attn).parameters.keys() >= {"scale", "window_size", "enable_gqa"}:
        varlen_attn = None  # type: ignore[assignment]

SUFFIX = "_shared_prompt"
MAX_VARLEN_HEAD_DIM = 256


def share_prompts(model: PreTrainedModel) -> None:
    """Let the text part of `model` (not its vision tower) attend over packed rows; all else stays as it was."""
    config: Any = model.config.get_text_config()
    base = config._attn_implementation
    if base.endswith(SUFFIX):
        return
    name = base + SUFFIX
    AttentionInterface.register(name, _attention(base))
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation_internal = name


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention in which each segment sees its prompt and itself, and each prompt itself.

    query: [1, heads, N, D]; key, value: [1, key heads, N, D]. Returns [1, N, heads, D].
    """
    query, key, value = (_at_kernel_precision(tensor)[0].transpose(0, 1) for tensor in (query, key, value))
    if not dropout and _varlen_usable(query):
        return _varlen_attention(query, key, value, layout, scaling).unsqueeze(0)
    return _padded_attention(query, key, value, layout, scaling, dropout).unsqueeze(0)


def _at_kernel_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast would inside the kernel: rotary embeddings are float32, which decides kernel and mask before."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _varlen_usable(query: Tensor) -> bool:
    """Whether torch's variable-length flash attention takes these tensors: half precision, CUDA, Ampere or later."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= MAX_VARLEN_HEAD_DIM
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None
) -> Tensor:
    """[N, heads, D] each. Flash attention aligns causal masks to the last key, as segments after a prompt are."""
    outputs = varlen_attn(
        query.contiguous(),
        key.index_select(0, layout.keys),
        value.index_select(0, layout.keys),
        layout.query_starts,
        layout.key_starts,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, outputs)


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float
) -> Tensor:
    """[N, heads, D] each; prompts and segments as two padded batches."""
    prompt_key, prompt_value = layout.prompt_rows(key), layout.prompt_rows(value)
    prompt_query = layout.prompt_rows(query)
    prompts = prompt_query
    if prompt_query.numel():
        prompts = _sdpa(prompt_query, prompt_key, prompt_value, scaling, dropout, is_causal=True)
    segments = _sdpa(
        layout.segment_rows(query),
        torch.cat([prompt_key.index_select(0, layout.prompt_of_segment), layout.segment_rows(key)], dim=1),
        torch.cat([prompt_value.index_select(0, layout.prompt_of_segment), layout.segment_rows(value)], dim=1),
        scaling,
        dropout,
        attn_mask=layout.bias(query.dtype),
    )
    return layout.packed(prompts, segments)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, **mask: Any) -> Tensor:
    """[rows, tokens, heads, D] each, and so the result."""
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
    return ALL_ATTENTION_FUNCTIONS[base]


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
        config._attn_implementation_internal = self._base
        return config
