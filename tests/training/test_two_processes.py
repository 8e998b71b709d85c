"""Two processes learn the same as one from the whole batch, also where one of them has no image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cppo.methods import METHODS, SHAPING_SINKS

JOB = Path(__file__).with_name("rank_job.py")
OWN = {
    "perception_score": "own_functions:lost",
    "perception_selector": "own_functions:above_mean",
    "perception_sink": "own_functions:turned",
}
OWN_SHAPING = {"perception_sink": "own_functions:moved_most", "perception_gate": "none"}
CASES = {
    "shared": {"scorer": "shared", "perception_rollouts_per_group": 1},
    "sequential tokens": {"perception_normalization": "token", "perception_memory": "sequential"},
    "kernel": {"scorer": "kernel"},
    "kernel tokens without view gradients": {
        "scorer": "kernel",
        "perception_normalization": "token",
        "perception_view_gradients": False,
    },
    # TRL's mean of the entropies depends on the micro-batches.
    "advantages": {"method": "vppo", "perception_advantage_scope": "batch", "entropy_coef": 0.0},
    "weights": {"method": "pgpo"},
    # Tokens of all processes are compared; each process pads only to its own responses.
    "over the batch": {"method": "tor"},
    "over the selected": {"method": "vepo", "entropy_coef": 0.0, "freeze_vision_tower": False},
    "within groups": {"method": "vgpo"},
    "advantages kernel": {
        "method": "vppo",
        "perception_advantage_scope": "batch",
        "entropy_coef": 0.0,
        "scorer": "kernel",
    },
    "divergence and entropy": {"method": "dvrp"},
    "views of the rollout policy": {"method": "papo", "entropy_coef": 0.0, "scorer": "kernel"},
    "weighted": {"method": "cppo-likelihood", "perception_rollouts_per_group": 1},
    "correct": {"perception_gate": "correct", "perception_gate_reward": "parity_reward", "reward": "parity_reward"},
    # The first process has the rows with equal rewards.
    "equal rewards": {"reward": "uneven_reward"},
    # The second process asks nothing, or finishes its answers at another time.
    "asking": {"reward": "asking_reward", "brief": True},
    "answers": {"reward": "asking_reward", "brief": True, "trained_answers": "asking_reward"},
    # The second process has the replaced prompts; both generate the others.
    "drawn again": {"reward": "uneven_reward", "dynamic_sampling_rounds": 2},
    # Each step has its own stage; both processes share its rows.
    "stages": {"data_stages": 2},
    "baselines": {
        "method": "mssr",
        "reward": "parity_reward",
        "num_generations": 2,
        "beta": 0.1,
        "baseline_init_samples": 0,
        "max_steps": 4,
        "entropy_coef": 0.0,
    },
    # One rollout per prompt; each prompt is answered twice before the first step.
    "initial pass": {
        "method": "mssr",
        "reward": "parity_reward",
        "num_generations": 1,
        "beta": 0.1,
        "baseline_init_samples": 2,
        "max_steps": 4,
        "entropy_coef": 0.0,
        "resumed": True,
    },
    # The policy's own answers, half of them to pixels that it moved. In each step with this seed, the first prompt
    # drawn replaces one; two processes draw two, because each makes whole groups.
    "entropy ascent": {
        "method": "saei",
        "greedy": True,
        "view_ascent_step": 3.0,
        "view_ascent_bound": 3.0,
        "reward": "uneven_reward",
        "dynamic_sampling_rounds": 2,
        "seed": 8,
    },
    "one view": {"method": "cppo-likelihood-all-tokens", "perception_memory": "sequential"},
    # In the middle of a buffer; each process keeps its own part.
    "resumed": {"resumed": True, "num_iterations": 2},
    # Only the last process has a non-finite loss, or gets a signal, in the second step.
    "not finite": {"poisoned": True},
    "stopped": {"stopped": True, "num_iterations": 2, "max_steps": 3},
    "own functions": OWN,
    "own functions kernel": {**OWN, "scorer": "kernel"},
    "own shaping": OWN_SHAPING,
    "sharded": {"sharded": True, "beta": 0.1},
    "sharded own functions": {**OWN, "sharded": True},
    "sharded own shaping": {**OWN_SHAPING, "sharded": True},
    "sharded views of the rollout policy": {"sharded": True, "method": "papo", "entropy_coef": 0.0},
    "sharded asking": {"sharded": True, "reward": "asking_reward", "brief": True},
    "sharded answers": {"sharded": True, "reward": "asking_reward", "brief": True, "trained_answers": "asking_reward"},
    "sharded untied": {"sharded": True, "untied": True},
    "sharded untied exact tokens": {
        "sharded": True,
        "untied": True,
        "perception_divergence": "kl",
        "perception_normalization": "token",
    },
    "sharded similarity": {"sharded": True, "method": "pepo", "freeze_vision_tower": False},
    "sharded frozen tower": {"sharded": True, "freeze_vision_tower": True, "gradient_checkpointing": True},
    "sharded kernel": {"sharded": True, "scorer": "kernel", "perception_view_gradients": False},
    "sharded untied plain": {"sharded": True, "untied": True, "scorer": "plain"},
}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """{processes: {case: weights and logs}}."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("processes")
        job = [str(JOB), tiny, str(folder), str(8 // processes), json.dumps(CASES)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        run = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), *job],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found[processes] = torch.load(folder / "results.pt", weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    one, two = results[1][case], results[2][case]
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).abs().max() <= 1e-5, name
    sink = CASES[case].get("perception_sink", METHODS[CASES[case].get("method", "cppo")].options["perception_sink"])
    shapes = sink in (*SHAPING_SINKS, OWN_SHAPING["perception_sink"])
    measured = "perception/dependency" if shapes else "perception/cpl"
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        assert theirs["grad_norm" if sink == "none" else measured] != 0
        for name, value in theirs.items():
            if name.startswith(("perception/", "baseline/")) or name == "reward":
                # Metrics that a method does not measure are None.
                assert ours[name] == (value if value is None else pytest.approx(value, rel=1e-4)), name
