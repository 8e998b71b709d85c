"""Load a vision-language model and its processor for evaluation; an adapter is merged into its model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from cppo.assets import adapter_base, resolve_model
from cppo.errors import UserError, first_line
from cppo.policy import merged
from cppo.policy.loading import whole_weights, with_adapter
from cppo.progress import Progress

FAILURES = (OSError, ValueError, ImportError)
"""The libraries' errors for an unusable model; some processors need a package of their own."""


def check_vision_model(name: str) -> None:
    """Refuse a model without a vision tower, and an adapter of such a model.

    `name` is a packaged name, a folder or a Hugging Face name. Raises UserError, also if its configuration cannot be
    read.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_model(adapter_base(name) or name), trust_remote_code=False)
    except FAILURES as error:
        raise _refused(name, error) from error
    if getattr(config, "vision_config", None) is None:
        raise UserError(f"model: {name} has no vision tower; choose a vision-language model")


def load_model(name: str, *, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """The model in evaluation mode and its processor.

    Args:
        name: a packaged name, a folder or a Hugging Face name; an adapter's folder gives the merged model.
        device, dtype: see `placement`.

    Raises:
        UserError: it cannot be loaded, or is no vision-language model.
    """
    check_vision_model(name)
    device, dtype = placement(device, dtype)
    processor = load_processor(name)
    base = adapter_base(name)
    try:
        with Progress(desc=f"load {name}"), whole_weights():
            model: Any = AutoModelForImageTextToText.from_pretrained(resolve_model(base or name), dtype=dtype)
        if base is not None:
            model = merged(with_adapter(model, name))
    except UserError:
        raise
    except (*FAILURES, RuntimeError) as error:
        raise _refused(name, error) from error
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: cannot use {device}: {first_line(error)}") from error


def placement(device: str | None, dtype: str | None) -> tuple[str, str]:
    """The given device and dtype; by default CUDA if available, float32 on CPU and bfloat16 elsewhere.

    Args:
        device: e.g. "cpu" or "cuda".
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or ("float32" if device == "cpu" else "bfloat16")


def load_processor(name: str) -> Any:
    """The processor of a model, padding on the left. Raises UserError if it cannot be loaded."""
    base = adapter_base(name)
    own = base is None or (Path(name) / "processor_config.json").is_file()
    try:
        return AutoProcessor.from_pretrained(resolve_model(name if own else str(base)), padding_side="left")
    except FAILURES as error:
        raise _refused(name, error) from error


def _refused(name: str, error: Exception) -> UserError:
    return UserError(f"model: {name} cannot be loaded: {first_line(error)}")
