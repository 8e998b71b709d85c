"""`flash_attn_varlen_func` in plain torch, for verl's packed rows of Qwen2.5-VL; importing this module installs it."""

from itertools import pairwise
from typing import Any

import torch
import verl.models.transformers.qwen2_vl as qwen2_vl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    **ignored: Any,
) -> Tensor:
    """Causal attention within each of the rows that lie behind one another, [tokens, heads, width]."""
    bounds = cu_seqlens_q.tolist()
    rows = []
    for start, end in pairwise(bounds):
        own = [tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v)]
        rows.append(scaled_dot_product_attention(*own, is_causal=True, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(rows)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: None, length: int, **ignored: Any) -> Tensor:
    """Causal attention of rows of one length, [rows, tokens, heads, width]."""
    own = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return scaled_dot_product_attention(*own, is_causal=True).transpose(1, 2)


qwen2_vl.flash_attn_varlen_func = varlen_attention
qwen2_vl._flash_attention_forward = dense_attention
qwen2_vl._flash_supports_window_size = qwen2_vl._flash_supports_deterministic = False
qwen2_vl._flash_use_top_left_mask = False
qwen2_vl.fa_peft_integration_check = lambda query, key, value, target_dtype=None: (query, key, value)
