"""Two processes learn what one learns from the whole batch, also where one of them has no image at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).with_name("rank_job.py")


def result(tiny, folder, processes, options):
    folder.mkdir()
    job = [str(JOB), tiny, str(folder), str(8 // processes), json.dumps(options)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *job],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {"scorer": "shared", "perception_rollouts_per_group": 1},
        {"scorer": "shared", "perception_normalization": "token", "perception_memory": "sequential"},
        {"scorer": "kernel"},
        {"scorer": "kernel", "perception_normalization": "token", "perception_view_gradients": False},
    ],
    ids=["shared", "sequential tokens", "kernel", "kernel tokens without view gradients"],
)
def test_two_processes_equal_one(tiny, tmp_path, options):
    one = result(tiny, tmp_path / "one", 1, options)
    two = result(tiny, tmp_path / "two", 2, options)
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).abs().max() <= 1e-6, name
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        for name in ("perception/cpl", "perception/gated_fraction", "perception/grad_norm_share", "reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
