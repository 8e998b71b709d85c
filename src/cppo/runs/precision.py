"""The precision of a run if its recipe leaves it to TRL, which computes in bfloat16 by default."""

from collections.abc import Mapping
from typing import Any

import torch

from cppo.errors import tell


def lacks_gpu(config: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for bfloat16 on a GPU, and this machine has none."""
    return bool(config.get("bf16")) and not (config.get("use_cpu") or torch.accelerator.is_available())


def cpu_precision(config: Mapping[str, Any]) -> dict[str, Any]:
    """`bf16: false` if training runs on the CPU and the configuration sets no precision; else nothing."""
    asks = config.get("bf16") is not None or config.get("fp16")
    on_cpu = config.get("use_cpu") or not torch.accelerator.is_available()
    return {"bf16": False} if on_cpu and not asks else {}


def say_cpu_precision(config: Mapping[str, Any]) -> None:
    """Print a line if `cpu_precision` decides."""
    if cpu_precision(config):
        tell("training runs on the CPU, in float32; --use_cpu true --bf16 true would use bfloat16")
