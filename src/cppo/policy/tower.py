"""One attention call per layer for all images and windows of a vision tower.

Towers for patches (Qwen's) call SDPA once per window, and once per image in layers without windows: several hundred
calls per layer for a micro-batch. They call flash attention once for everything, with the ends of the windows, if the
attention's name contains "flash".
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from cppo.policy.families import family_of
from cppo.policy.packed import at_kernel_precision
from cppo.policy.varlen import no_varlen_reason, varlen_attention

AT_ONCE = "flash_varlen_of_torch"
"""Name of `window_attention` in transformers' table."""


def window_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within consecutive windows; by SDPA, once per window, where varlen does not run.

    query, key, value: [1, heads, N, D]. cu_seq_lens_q: ends of the windows, with a leading 0. Returns [1, N, heads, D].
    """
    query, key, value = (at_kernel_precision(tensor)[0].transpose(0, 1) for tensor in (query, key, value))
    if not dropout and no_varlen_reason(query.device, query.dtype, query.shape[-1]) is None:
        ends, longest = cu_seq_lens_q, int(max_length_q)
        outputs = varlen_attention(query, key, value, ends, ends, (longest, longest), scaling, causal=False)
        return outputs[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    cut = [tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)]
    pieces = [
        scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=scaling)
        for queries, keys, values in zip(*cut, strict=True)
    ]
    return torch.cat(pieces, dim=1).transpose(0, 1)[None], None


def tower_of(model: PreTrainedModel) -> Any:
    """The vision tower of a model without wrappers, if it takes images in patches; else None."""
    return model.get_encoder(modality="image") if family_of(model.config).images == "patches" else None


def attend_at_once(model: PreTrainedModel) -> None:
    """Let the vision tower of `model` make one attention call per layer, if it makes one per window by SDPA."""
    tower = tower_of(model)
    if tower is not None and tower.config._attn_implementation == "sdpa":
        AttentionInterface.register(AT_ONCE, window_attention)
        tower.config._attn_implementation = AT_ONCE
