"""torch's flash attention of variable length: the queries that it supports, and one call for many sequences."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cppo.probing import expect, failure

MAX_HEAD_SIZE = 256
BF16_TOLERANCE = 0.05
"""Largest difference of two attention kernels in bfloat16 on values of about 1."""


@cache
def no_varlen_reason(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why torch's flash attention of variable length does not support these queries; None if it does.

    It needs half precision and an NVIDIA GPU of the Ampere generation or later.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} is not an NVIDIA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in {dtype}".replace("torch.", "")
    if head_size % 8 or head_size > MAX_HEAD_SIZE:
        return f"its heads of {head_size} numbers are not at most {MAX_HEAD_SIZE} in eights"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return failure(probe_varlen_attention, "cuda")


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest: tuple[int, int],
    scaling: float | None,
    *,
    causal: bool,
) -> Tensor:
    """Attention of consecutive sequences, each to its own keys, [N, heads, D] as the queries.

    Args:
        query: [N, heads, D].
        key, value: [M, key heads, D]; several heads may share a key head.
        query_ends, key_ends: ends of the sequences, in queries and in keys, with a leading 0; int32.
        longest: queries and keys of the longest sequences.
        causal: whether a query sees no later key. Flash attention aligns the last query to the last key, as for
            segments after a prompt.
    """
    from torch.nn.attention.varlen import varlen_attn  # a prototype; if it is removed, the probe reports it

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    if groups > 1 and _takes_grouped_heads(varlen_attn):
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    outputs = varlen_attn(query, key, value, query_ends, key_ends, *longest, scale=scaling, **options)
    return cast(Tensor, outputs)


@cache
def _takes_grouped_heads(varlen_attn: Callable[..., Any]) -> bool:
    """Whether several query heads may share a key head; torch 2.11 does not support it."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def probe_varlen_attention(device: str) -> None:
    """Raise unless torch's attention of variable length agrees with one call per sequence, causal and not."""
    generator, scaling = torch.Generator().manual_seed(0), 64**-0.5
    lengths = ([3, 2, 4], [3, 5, 7])
    query, key, value = tensors = [
        torch.randn(sum(lengths[part]), heads, 64, generator=generator).to(device, torch.bfloat16)
        for part, heads in ((0, 4), (1, 2), (1, 2))
    ]
    ends = [torch.tensor([0, *part], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32) for part in lengths]
    for causal in (True, False):
        found = varlen_attention(query, key, value, ends[0], ends[1], (4, 7), scaling, causal=causal)
        pieces = [tensor.split(lengths[part > 0]) for part, tensor in enumerate(tensors)]
        one_by_one = zip(*pieces, strict=True)
        expected = torch.cat([_one_sequence(query, key, value, scaling, causal) for query, key, value in one_by_one])
        difference = (found - expected).abs().max().item()
        what = "causal attention" if causal else "attention"
        expect(difference <= BF16_TOLERANCE, f"torch's varlen_attn differs from {what} by {difference:.2g}")


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Tensor:
    visible = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
    visible = visible.tril(len(key) - len(query)) if causal else visible
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(len(query) // len(key), dim=0) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, visible, scale=scaling).transpose(0, 1)
