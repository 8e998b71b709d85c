"""Part A: card, driver and versions, and whether packed rows run on attention of variable length."""

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu.part import Part

from cppo.policy.varlen import no_varlen_reason

LIBRARIES = ("transformers", "trl", "accelerate", "flash-attn")
HEAD_SIZE = 128
"""Of Qwen2.5-VL-3B and 7B."""


def versions(part: Part) -> None:
    """Versions of the measured libraries. Varlen must be usable, else every other part measures padded rows."""
    part.found("libraries", torch=torch.__version__, **{name: _installed(name) for name in LIBRARIES})
    reason = no_varlen_reason(part.device, torch.bfloat16, HEAD_SIZE)
    if part.device.type != "cuda":
        part.found("card", card=None, varlen=reason)
        return
    card = torch.cuda.get_device_properties(part.device)
    part.found(
        "card",
        card=card.name,
        capability=f"{card.major}.{card.minor}",
        memory_gib=card.total_memory / 2**30,
        driver=_driver(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )
    part.require("packed rows run on varlen_attn", reason)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(question, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
