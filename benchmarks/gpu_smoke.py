"""Prove the CUDA path in a few minutes: the same numbers as on the CPU, then training as it is done on a GPU.

    python benchmarks/gpu_smoke.py [--steps 20] [--json FILE] [--device cuda]

1. One set of rollouts, made on the CPU in float32, is scored by CPU and device: loss and gradients must agree.
2. The embedded micro VLM trains in bfloat16 with gradient checkpointing, with every divergence: losses must be
   finite and the perception term must take part.
Exit status 0 only if all of it holds; 2 if there is no such device.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

from cppo import CPPOConfig, CPPOTrainer
from cppo.assets import resolve_model
from cppo.data import load_records, to_dataset
from cppo.rewards import accuracy_reward, format_reward

LOSS_TOLERANCE = 1e-4
"""Relative; float32 sums in another order, amplified tenfold by the temperature 0.1."""
GRADIENT_TOLERANCE = 1e-3
"""Of the gradient's norm."""


def make_trainer(folder: str, *, cpu: bool, **options: Any) -> CPPOTrainer:
    """A trainer of the micro VLM on the generated digits, 4 prompts x 8 rollouts."""
    args = CPPOConfig(
        folder,
        use_cpu=cpu,
        per_device_train_batch_size=32,
        num_generations=8,
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


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a micro-batch moved; views stay on the CPU, from where the trainer takes them."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def loss_and_gradient(trainer: CPPOTrainer, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Loss of one micro-batch and all gradients as one float64 vector on the CPU."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    grads = [p.grad.detach().double().cpu().flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def compare_with_cpu(folder: str, device: torch.device) -> dict[str, float]:
    """Relative difference of loss and gradient between the CPU and the device on the same rollouts, in float32."""
    exact = {"bf16": False, "gradient_checkpointing": False, "max_steps": 1, "perception_weight": 1.0}
    reference = make_trainer(folder, cpu=True, **exact)
    rows = [reference.train_dataset[i // 8] for i in range(32)]
    set_seed(0)
    reference.model.train()
    inputs = reference._generate_and_score_completions(rows)
    loss, gradient = loss_and_gradient(reference, inputs)
    other = make_trainer(folder, cpu=device.type == "cpu", **exact)
    other.model.to(device)
    moved = {key: to_device(value, device) for key, value in inputs.items()}
    other_loss, other_gradient = loss_and_gradient(other, moved)
    return {
        "loss_cpu": loss,
        "loss_device": other_loss,
        "loss_difference": abs(other_loss - loss) / max(abs(loss), 1e-12),
        "gradient_difference": ((other_gradient - gradient).norm() / gradient.norm()).item(),
    }


def train(folder: str, device: torch.device, divergence: str, steps: int) -> dict[str, Any]:
    """A short run in bfloat16 with gradient checkpointing; the last log, seconds per step and peak memory in MiB."""
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": steps, "learning_rate": 1e-4}
    trainer = make_trainer(folder, cpu=device.type == "cpu", perception_divergence=divergence, **options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - started) / steps
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "divergence": divergence,
        "losses_finite": all(math.isfinite(entry["loss"]) for entry in logs),
        "steps_with_perception": sum(entry.get("perception/cpl") is not None for entry in logs),
        "seconds_per_step": seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps a divergence (default 20)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu checks this script itself")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-smoke: no CUDA device is visible to torch; run this on a machine with a GPU", file=sys.stderr)
        return 2
    # By default cuDNN convolves float32 with ten bits of precision, as the CPU does not.
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"device: {name}, torch {torch.__version__}")
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "training": []}
    with tempfile.TemporaryDirectory() as folder:
        agreement = compare_with_cpu(folder, device)
        results["agreement"] = agreement
        print("same rollouts, float32:", ", ".join(f"{key} {value:.3g}" for key, value in agreement.items()))
        passed = agreement["loss_difference"] < LOSS_TOLERANCE and agreement["gradient_difference"] < GRADIENT_TOLERANCE
        for divergence in ("k3", "kl", "js"):
            run = train(folder, device, divergence, options.steps)
            results["training"].append(run)
            print("training, bfloat16:", ", ".join(f"{key} {value}" for key, value in run.items()))
            passed = passed and run["losses_finite"] and run["steps_with_perception"] > 0
    results["passed"] = passed
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
