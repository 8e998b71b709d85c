"""A model's vision tower: its parameters, and how a frozen tower stays out of the backward pass."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.nn import Module, ModuleList, Parameter

from cppo.errors import UserError
from cppo.policy.families import family_of


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
