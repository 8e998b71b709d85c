"""`python -m cppo.verl` from data to a checkpoint, on the CPU: Ray, rollouts, rewards, update, weight sync."""

import math
import re

import pytest
from cpu_bed.launch import launch
from curve import write_data
from safetensors.torch import load_file
from torch import equal

from cppo.assets import MICRO_DIR

PROMPTS, ROLLOUTS, STEPS = 4, 4, 3
SECONDS = 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps of four prompts, the third saved."""
    folder = tmp_path_factory.mktemp("verl")
    options = {
        "data.train_batch_size": PROMPTS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.checkpoint.save_contents": "[model,hf_model]",
        "actor_rollout_ref.rollout.n": ROLLOUTS,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": STEPS,
    }
    run = launch(folder / "run", "sync", {**write_data(folder, STEPS * PROMPTS), **options}, seconds=SECONDS)
    assert run.status == 0, run.log
    assert len(run.metrics) == len(run.rollouts) == STEPS
    return run


def test_rollouts_earn_our_rewards(run):
    for metrics, rollouts in zip(run.metrics, run.rollouts, strict=True):
        assert len(rollouts) == PROMPTS * ROLLOUTS
        for rollout in rollouts:
            formed = re.fullmatch(r"<think>.*</think>.*\\boxed\{(.+)\}.*", rollout["output"], re.DOTALL)
            is_right = formed is not None and formed[1] == rollout["gts"]
            assert rollout["score"] == pytest.approx(0.9 * is_right + 0.1 * (formed is not None), abs=1e-6)
        mean = sum(rollout["score"] for rollout in rollouts) / len(rollouts)
        assert metrics["critic/score/mean"] == pytest.approx(mean, abs=1e-6)


def test_rollouts_follow_the_updated_weights(run):
    """The rollouts' probabilities of their tokens equal the policy's, before its first update and after one."""
    for metrics in run.metrics:
        assert metrics["training/rollout_probs_diff_max"] < 2e-5
    assert any(metrics["actor/grad_norm"] > 0 for metrics in run.metrics[:-1])  # none where all rewards are equal


def test_the_log_has_the_perception_metrics(run):
    for metrics in run.metrics:
        assert 0 <= metrics["perception/gated_fraction"] <= 1
        if metrics["perception/gated_fraction"]:
            assert metrics["perception/cpl"] > 0
            assert 0 < metrics["perception/selected_fraction"] <= 0.5
            assert math.isfinite(metrics["perception/d_removing"])
    assert any(metrics["perception/gated_fraction"] for metrics in run.metrics)
    assert not any(name.startswith("actor/perception") for metrics in run.metrics for name in metrics)


def test_the_checkpoint_is_a_trained_model(run):
    saved = load_file(
        run.folder / "checkpoints" / f"global_step_{STEPS}" / "actor" / "huggingface" / "model.safetensors"
    )
    start = load_file(MICRO_DIR / "model.safetensors")
    assert saved.keys() == start.keys()
    changed = [name for name, tensor in start.items() if not equal(saved[name], tensor)]
    assert len(changed) > len(start) / 2
