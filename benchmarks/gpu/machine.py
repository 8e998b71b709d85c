"""Part A: card, driver and versions, and whether the two kernels of a GPU run: packed attention and output layer."""

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu.part import Part

from cppo.policy.packed import probe_chunked_head
from cppo.policy.varlen import no_varlen_reason
from cppo.probing import failure

LIBRARIES = ("transformers", "trl", "accelerate", "flash-attn")
HEAD_SIZE = 128
"""Of Qwen2.5-VL-3B and 7B."""


def versions(part: Part) -> None:
    """Versions of the measured libraries. Both kernels must run, else all other parts measure what replaces them."""
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
    part.require("the output layer runs on TRL's Triton kernel", failure(probe_chunked_head, "cuda"))


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
