"""The model inside what trainers wrap around it."""

from typing import Any

from transformers import PreTrainedModel


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, `torch.compile` and PEFT wrappers."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    return model
