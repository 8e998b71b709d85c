"""The attention kernel of each part of a run, and one line that names them."""

from typing import Any

import torch

from cppo.errors import tell
from cppo.policy import unwrapped
from cppo.policy.packed import SUFFIX
from cppo.policy.varlen import no_varlen_reason
from cppo.policy.vision_tower import attend_at_once, tower_of
from cppo.training.setup import Trainer, go_without
from cppo.upstream import CHUNKED_HEAD, TOWER_ATTENTION, VARLEN_ATTENTION

VARLEN = "torch's varlen_attn"


def choose_kernels(trainer: Trainer, shares_prompts: bool) -> str:
    """Let vision towers attend once per layer where the device can, and name the attention kernel of each part.

    The line is logged on a GPU. A slower kernel than CPPO's best on a GPU is recorded as a fallback.
    """
    policy, device = unwrapped(trainer.model), trainer.accelerator.device
    if shares_prompts and (line := CHUNKED_HEAD.missing(device.type)) is not None:
        go_without(trainer, line)
    text = policy.config.get_text_config()
    plain = text._attn_implementation.removesuffix(SUFFIX)
    parts = {"packed rows": _packed_rows(trainer, policy)} if shares_prompts else {"updates": plain}
    continuous = trainer.use_transformers_continuous_batching
    parts["rollouts"] = "vLLM's own" if trainer.use_vllm else f"paged {plain}" if continuous else plain
    parts["vision tower"] = _vision_tower(trainer, policy)
    line = ", ".join(f"{part}: {kernel}" for part, kernel in parts.items())
    if device.type == "cuda":
        tell(f"attention of {line}")
    return line


def _packed_rows(trainer: Trainer, policy: Any) -> str:
    text = policy.config.get_text_config()
    reason = _no_varlen(
        trainer, policy, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    if reason is None:
        return VARLEN
    if trainer.accelerator.device.type == "cuda":
        go_without(trainer, f"{VARLEN_ATTENTION.lost}: {reason}")
    return f"padded SDPA ({reason})"


def _vision_tower(trainer: Trainer, policy: Any) -> str:
    tower = tower_of(policy)
    if tower is None or tower.config._attn_implementation != "sdpa":
        config = getattr(policy.config, "vision_config", policy.config) if tower is None else tower.config
        return str(config._attn_implementation)
    size = next(module.head_dim for module in tower.modules() if hasattr(module, "head_dim"))
    reason = _no_varlen(trainer, policy, size) or TOWER_ATTENTION.missing(policy.config.model_type)
    if reason is not None:
        if trainer.accelerator.device.type == "cuda":
            go_without(trainer, f"{TOWER_ATTENTION.lost}: {reason}")
        return f"sdpa, one call per window ({reason})"
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            attend_at_once(unwrapped(model))
    return f"{VARLEN}, one call per layer"


def _no_varlen(trainer: Trainer, policy: Any, head_size: int) -> str | None:
    """Why `varlen_attn` does not support this run's queries in training; None if it does."""
    half = torch.bfloat16 if trainer.args.bf16 else torch.float16
    dtype = half if trainer.args.bf16 or trainer.args.fp16 else policy.dtype
    return no_varlen_reason(trainer.accelerator.device, dtype, head_size)
