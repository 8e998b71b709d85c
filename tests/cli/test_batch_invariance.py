"""Cutting the batch differently must not change what is learned, shown through the real command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 2


def train(output: Path, batch: int, accumulation: int, *options: str) -> dict[str, torch.Tensor]:
    """The weights after `STEPS` plain SGD steps on the same 8 rollouts, cut into `accumulation` micro-batches."""
    command = [sys.executable, "-m", "cppo", "train", "--config", "micro", "--output_dir", str(output)]
    command += ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    command += ["--num_generations", "4", "--max_steps", str(STEPS), "--final_eval_samples", "0"]
    command += ["--optim", "sgd", "--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
    command += ["--save_strategy", "no", "--perception_weight", "1", "--perception_gate", "none", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return load_file(output / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("options", [("--loss_type", "dapo"), ("--loss_type", "grpo")], ids=lambda options: options[1])
def test_one_batch_of_eight_equals_eight_of_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    whole = train(tmp_path / "whole", 8, 1, *options)
    cut = train(tmp_path / "cut", 1, 8, *options)
    assert largest_difference(whole, cut) <= 5e-6


def test_the_published_normalisation_depends_on_the_cut(tmp_path: Path) -> None:
    """The control: with a mean per micro-batch the same comparison fails, so the test above can."""
    options = ("--loss_type", "grpo", "--perception_normalization", "microbatch")
    whole = train(tmp_path / "whole", 8, 1, *options)
    cut = train(tmp_path / "cut", 1, 8, *options)
    assert largest_difference(whole, cut) > 1e-5
