"""A model's vision tower: how a frozen one stays out of the backward pass, and one attention call per layer.

Towers for patches (Qwen's) call SDPA once per window, and once per image in layers without windows: several hundred
calls per layer for a micro-batch. They call flash attention once for everything, with the ends of the windows, if the
attention's name contains "flash".
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from cppo.errors import UserError
from cppo.policy.families import family_of
from cppo.policy.packed import at_kernel_precision
from cppo.policy.varlen import no_varlen_reason, varlen_attention

AT_ONCE = "flash_varlen_of_torch"
"""Name of `window_attention` in transformers' table."""


# A frozen tower


def vision_tower_parameters(model: Any) -> list[Parameter]:
    """The parameters of a vision-language model's vision tower, without its projector into the language model.

    model: a transformers model without wrappers; adapters in the tower count as part of it.

    Raises:
        UserError: it has no vision tower.
    """
    tower = _tower(model)
    if tower is None:
        raise UserError(f"freeze_vision_tower = True, but a model of type {model.config.model_type!r} has none")
    projector = _projector(model)
    return [parameter for name, parameter in tower.named_parameters() if projector.isdisjoint(name.split("."))]


def leave_out_frozen_tower(model: Any) -> None:
    """Make a fully frozen vision tower keep nothing for the backward pass.

    With gradient checkpointing, transformers makes the embeddings of tower and text require gradients, for adapters
    under reentrant checkpointing. Gradients would then flow down to the pixels, through the whole tower, for nothing.

    Args:
        model: a transformers model without wrappers, with the `requires_grad` flags of training. A tower with a trained
            parameter outside its projector, such as an adapter, stays unchanged, as does a model without a tower.
    """
    tower = _tower(model)
    if tower is None or any(parameter.requires_grad for parameter in vision_tower_parameters(model)):
        return
    for part in _frozen_parts(tower, _projector(model)):
        vars(part)["forward"] = torch.no_grad()(part.forward)


def _tower(model: Any) -> Module | None:
    tower: Module = model.get_encoder(modality="image")
    return None if tower is model or tower is model.base_model else tower


def _projector(model: Any) -> set[str]:
    return set(family_of(model.config).projector_parts)


def _frozen_parts(module: Module, projector: Collection[str]) -> Iterator[Module]:
    """The largest modules with only frozen parameters, outside a trained projector."""
    weights = list(module.parameters())
    if not any(weight.requires_grad for weight in weights) and not isinstance(module, ModuleList):
        if weights:
            yield module
        return
    for name, child in module.named_children():
        if name not in projector:
            yield from _frozen_parts(child, projector)


# Attention


def tower_of(model: PreTrainedModel) -> Any:
    """The vision tower of a model without wrappers, if it takes images in patches; else None."""
    return model.get_encoder(modality="image") if family_of(model.config).images == "patches" else None


def attend_at_once(model: PreTrainedModel) -> None:
    """Let the vision tower of `model` make one attention call per layer, if it makes one per window by SDPA."""
    tower = tower_of(model)
    if tower is not None and tower.config._attn_implementation == "sdpa":
        AttentionInterface.register(AT_ONCE, window_attention)
        tower.config._attn_implementation = AT_ONCE


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
