"""The warnings of a report on metrics made by hand: each fires where it should, says its numbers, else is silent."""

import numpy as np
import pytest

from cppo.reports import RunData
from cppo.reports.signs import (
    collapse,
    equal_groups,
    lengths_at_limit,
    low_entropy,
    not_finite,
    nothing_selected,
    run_warnings,
)

ACCURACY = "rewards/accuracy_reward/mean"


def run_of(**columns):
    """A run whose metrics have these columns; `None` is what the recorder writes for NaN."""
    names = {"accuracy": ACCURACY, "equal": "frac_reward_zero_std", "clipped": "completions/clipped_ratio"}
    names |= {"gated": "perception/gated_fraction", "selected": "perception/selected_fraction"}
    length = max(len(values) for values in columns.values())
    rows = [
        {"step": step + 1, **{names.get(name, name): values[step] for name, values in columns.items()}}
        for step in range(length)
    ]
    return RunData("run", {"max_completion_length": 80}, rows, [], [], {}, {})


def noisy(means, seed=0, spread=0.08):
    return (np.asarray(means) + np.random.default_rng(seed).normal(0, spread, len(means))).tolist()


def test_a_healthy_run_warns_of_nothing():
    steps = 100
    healthy = run_of(
        loss=noisy(np.zeros(steps)),
        grad_norm=noisy(np.ones(steps)),
        accuracy=noisy(np.linspace(0.4, 0.7, steps)),
        reward=noisy(np.linspace(0.5, 0.8, steps)),
        entropy=noisy(np.linspace(0.06, 0.03, steps), spread=0.005),
        equal=noisy(np.full(steps, 0.5)),
        clipped=[0.0] * steps,
        gated=noisy(np.full(steps, 0.3)),
        selected=noisy(np.full(steps, 0.3), spread=0.02),
    )
    assert run_warnings(healthy) == []


def test_noise_alone_is_no_collapse():
    """The best of many windows is high by chance, and must not count as a height to fall from."""
    fired = [seed for seed in range(300) if collapse(run_of(accuracy=noisy(np.full(100, 0.3), seed, spread=0.1)))]
    assert not fired


def test_a_fall_in_noise_is_seen():
    means = np.concatenate([np.linspace(0.4, 0.6, 50), np.linspace(0.6, 0.2, 20), np.full(30, 0.2)])
    assert all(collapse(run_of(accuracy=noisy(means, seed, spread=0.1))) for seed in range(100))


@pytest.mark.parametrize("column", ["accuracy", "reward"])
def test_a_fall_is_a_collapse_with_its_numbers(column):
    text = collapse(run_of(**{column: [0.3] * 20 + [0.6] * 40 + [0.2] * 40}))
    assert text.startswith(f"Collapse: the training {column} fell from 0.600 around step ")
    assert " to 0.200 (means of 10 steps)" in text


def test_a_reward_below_zero_that_falls_is_a_collapse():
    assert collapse(run_of(reward=[-0.5] * 50 + [-0.9] * 50)) is not None
    assert collapse(run_of(reward=[-0.5] * 50 + [-0.6] * 50)) is None
    assert collapse(run_of(reward=[-0.9] * 50 + [-0.5] * 50)) is None


def test_a_fall_that_was_made_good_is_no_collapse():
    assert collapse(run_of(accuracy=[0.6] * 40 + [0.1] * 30 + [0.6] * 30)) is None


def test_accuracy_decides_where_there_is_one():
    assert collapse(run_of(accuracy=[0.5] * 60, reward=[1.0] * 30 + [0.1] * 30)) is None


def test_a_few_steps_tell_no_trend():
    assert run_warnings(run_of(accuracy=[0.9] * 3 + [0.0] * 3, entropy=[0.0] * 6)) == []


def test_low_entropy():
    assert "0.0010 nats (0.5000 at the start)" in low_entropy(run_of(entropy=[0.5] * 20 + [0.001] * 20))
    assert low_entropy(run_of(entropy=[0.5] * 20 + [0.006] * 20)) is None


def test_groups_of_equal_rewards():
    assert "80% of the groups in the latest" in equal_groups(run_of(equal=[0.0] * 90 + [0.8] * 10))
    assert equal_groups(run_of(equal=[0.9] * 90 + [0.7] * 10)) is None


def test_nothing_selected():
    text = nothing_selected(run_of(gated=[0.0] * 2 + [0.5] * 8, selected=[None] * 2 + [0.0] * 2 + [0.3] * 6))
    assert text.startswith("In 4 of 10 logged steps no perception token was selected (2 of them let no rollout")
    assert nothing_selected(run_of(gated=[0.0] * 2 + [0.5] * 8, selected=[None] * 2 + [0.3] * 8)) is None
    assert nothing_selected(run_of(reward=[0.5] * 10)) is None  # plain GRPO logs no perception


def test_lengths_at_the_limit():
    text = lengths_at_limit(run_of(clipped=[0.0] * 90 + [0.2] * 10))
    assert "20% of the responses in the latest 10 logged steps reach the limit" in text
    assert "raise max_completion_length (now 80)" in text
    assert lengths_at_limit(run_of(clipped=[0.5] * 90 + [0.05] * 10)) is None


def test_a_loss_that_is_not_finite():
    assert "in 2 step(s), first in step 3" in not_finite(run_of(loss=[0.1, 0.1, None, 0.1], grad_norm=[1, 1, 1, None]))
    assert not_finite(run_of(loss=[0.1], grad_norm=[0.0])) is None


def test_a_contrast_that_is_far_out():
    assert any("about 2.8 nats more" in text for text in run_warnings(run_of(**{"perception/cpl": [28.0] * 20})))
    assert run_warnings(run_of(**{"perception/cpl": [28.0] * 9 + [0.7] * 11})) == []
