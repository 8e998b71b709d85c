"""What a run on a CPU uses if its recipe leaves it to TRL, which computes in bfloat16 by default."""

from collections.abc import Mapping
from typing import Any

import torch

from cppo.errors import tell
from cppo.runs.checks import launched_processes
from cppo.training.config import cpu_precision_line, float32_on_cpu


def lacks_gpu(config: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for bfloat16 on a GPU, and this machine has none."""
    return bool(config.get("bf16")) and not (config.get("use_cpu") or torch.accelerator.is_available())


def cpu_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the CPU that the configuration does not set: float32, and `use_cpu` for several processes.

    Empty if it asks for bfloat16 or float16, or trains on a GPU.
    """
    here = not torch.accelerator.is_available()
    if config.get("bf16") or config.get("fp16") or not (here or config.get("use_cpu")):
        return {}
    several = {"use_cpu": True} if here and launched_processes() > 1 else {}
    return {**several, **({"bf16": False} if float32_on_cpu(config) else {})}


def say_cpu_precision(config: Mapping[str, Any]) -> None:
    """Print a line if `cpu_options` decides the precision."""
    if "bf16" in cpu_options(config):
        tell(cpu_precision_line(config))
