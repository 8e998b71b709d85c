"""Cutting the batch differently must not change what is learned, shown through the real command line."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file


def train(output: Path, batch: int, accumulation: int) -> Path:
    """The weights after two plain SGD steps on the same 8 rollouts, cut into `accumulation` micro-batches."""
    command = [sys.executable, "-m", "cppo", "train", "--config", "micro", "--output_dir", str(output)]
    command += ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    command += ["--num_generations", "4", "--max_steps", "2", "--final_eval_samples", "0"]
    command += ["--optim", "sgd", "--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
    command += ["--save_strategy", "no", "--perception_weight", "1", "--perception_gate", "none"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output / "model.safetensors"


def test_one_batch_of_eight_equals_eight_of_one(tmp_path: Path) -> None:
    whole, cut = load_file(train(tmp_path / "whole", 8, 1)), load_file(train(tmp_path / "cut", 1, 8))
    assert max((whole[name] - cut[name]).abs().max() for name in whole) <= 5e-6
