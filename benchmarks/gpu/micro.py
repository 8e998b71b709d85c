"""Parts C and G, with the embedded micro VLM: the same numbers as on the CPU, then training as on a GPU."""

import math
import tempfile
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from gpu.part import Part, relative_difference
from transformers import PrinterCallback, set_seed

from cppo import CPPOConfig, CPPOTrainer
from cppo.assets import resolve_model
from cppo.data import load_records, to_dataset
from cppo.policy import packed
from cppo.rewards import accuracy_reward, format_reward

GENERATIONS = 8
LOSS_BOUND, GRADIENT_BOUND = 1e-4, 1e-3
"""Relative, in float32: another order of sums, amplified tenfold by the temperature 0.1."""
ROUNDING_RATIO = 3.0
"""Bound: the device's bfloat16 distance from the CPU's float32, over that of the CPU's bfloat16."""


def make_trainer(folder: str, *, cpu: bool, prompts: int, **options: Any) -> CPPOTrainer:
    """A trainer of the micro VLM on the generated digits, with 8 rollouts per prompt."""
    args = CPPOConfig(
        folder,
        use_cpu=cpu,
        per_device_train_batch_size=prompts * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=80,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        reward_weights=[0.9, 0.1],
        disable_tqdm=True,
        **options,
    )
    data = to_dataset(load_records("tasks:digits?noise=150&n=400"))
    trainer = CPPOTrainer(resolve_model("micro"), [accuracy_reward, format_reward], args, data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def same_rollouts(part: Part) -> None:
    """Loss and gradient of rollouts made once on the CPU: float32 and bfloat16, varlen and padded, against the CPU."""
    prompts = 2 if part.tiny else 4
    exact = {
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "perception_weight": 1.0,
        "perception_gate": "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, cpu=True, prompts=prompts, **exact)
        rows = [trainer.train_dataset[i // GENERATIONS] for i in range(prompts * GENERATIONS)]
        set_seed(0)
        trainer.model.train()
        inputs = trainer._generate_and_score_completions(rows)
        # For any answers of the model, both terms must have something to compare.
        inputs["advantages"] = torch.linspace(-1.0, 1.0, len(rows))
        loss, gradient = loss_and_gradient(trainer, inputs, torch.float32)
        rounded_loss, rounded_gradient = loss_and_gradient(trainer, inputs, torch.bfloat16)
        trainer = make_trainer(folder, cpu=part.device.type == "cpu", prompts=prompts, **exact)
    scale = max(abs(loss), 1e-12)
    loss_rounding, gradient_rounding = abs(rounded_loss - loss) / scale, relative_difference(rounded_gradient, gradient)
    part.found("cpu", loss=loss, bfloat16_loss=loss_rounding, bfloat16_gradient=gradient_rounding)
    trainer.model.to(part.device)
    moved = {key: value.to(part.device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    # Varlen needs half precision.
    for name, dtype, pads in (
        ("float32, padded", torch.float32, True),
        ("bfloat16, padded", torch.bfloat16, True),
        ("bfloat16, varlen where it runs", torch.bfloat16, False),
    ):
        padding = patch.object(packed, "no_varlen_reason", return_value="padding is measured")
        with padding if pads else nullcontext():
            other_loss, other_gradient = loss_and_gradient(trainer, moved, dtype)
        loss_bound, gradient_bound = LOSS_BOUND, GRADIENT_BOUND
        if dtype == torch.bfloat16:
            loss_bound += ROUNDING_RATIO * max(loss_rounding, gradient_rounding)
            gradient_bound += ROUNDING_RATIO * gradient_rounding
        part.found(name, loss=other_loss)
        part.check(f"{name}: loss", abs(other_loss - loss) / scale, loss_bound)
        part.check(f"{name}: gradient", relative_difference(other_gradient, gradient), gradient_bound)


def loss_and_gradient(trainer: CPPOTrainer, inputs: dict[str, Any], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Loss of one micro-batch and all gradients as one vector on the CPU; float32 weights compute in `dtype`."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    device = trainer.model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    grads = [p.grad.detach().cpu().flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def divergences(part: Part) -> None:
    """Short runs in bfloat16 with gradient checkpointing: finite losses, and an active perception term."""
    steps, prompts = (1, 1) if part.tiny else (20, 4)
    for divergence in ("k3", "kl", "js"):
        options = {"bf16": True, "gradient_checkpointing": True, "max_steps": steps, "learning_rate": 1e-4}
        if part.tiny:
            options["perception_gate"] = "none"  # one group may have no advantage
        with tempfile.TemporaryDirectory() as folder:
            cpu = part.device.type == "cpu"
            trainer = make_trainer(folder, cpu=cpu, prompts=prompts, perception_divergence=divergence, **options)
            run: dict[str, float] = {}
            peak = part.peak_bytes(lambda trainer=trainer, run=run: run.update(seconds=part.seconds(trainer.train)))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        finite = all(math.isfinite(entry["loss"]) for entry in logs)
        took_part = sum(entry.get("perception/cpl") is not None for entry in logs)
        part.found(
            divergence,
            seconds_per_step=run["seconds"] / steps,
            peak_mib=None if peak is None else peak / 2**20,
            steps_with_perception=took_part,
        )
        part.require(f"{divergence}: losses are finite", None if finite else "one is not")
        part.require(f"{divergence}: the perception term takes part", None if took_part else "in no step")
