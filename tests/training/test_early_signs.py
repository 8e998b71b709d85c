"""Warnings from a run's first steps, by their logged metrics."""

import math
from types import SimpleNamespace

import pytest

from cppo.reports.signs import equal_rewards, far_out
from cppo.training.early_signs import FIRST_STEPS, EarlySigns


def row(accuracy=0.0, spread=0.0, flat=1.0, cpl=0.5, **others):
    return {
        "reward": accuracy,
        "rewards/accuracy_reward/mean": accuracy,
        "rewards/accuracy_reward/std": spread,
        "rewards/format_reward/mean": 1.0,
        "rewards/format_reward/std": 0.0,
        "frac_reward_zero_std": flat,
        "perception/cpl": cpl,
        **others,
    }


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([row(), row()], ["accuracy 0 for every rollout; equal rewards in every group", "`cppo sft`", "--responses"]),
        ([row(flat=0.5), row(flat=0.5)], ["accuracy 0 for every rollout: the model cannot do this task yet"]),
        ([row(1.0), row(1.0)], ["equal rewards in every group", "harder rows", "num_generations"]),
        ([row(), row(0.1, 0.3, 0.9)], None),
        ([row(0.5, 0.5, 0.0)], None),
    ],
)
def test_rewards_that_teach_nothing(rows, parts):
    found = equal_rewards(rows, 7)
    assert (found is None) == (parts is None)
    for part in parts or ():
        assert part in found
    assert found is None or (found.startswith("in the first 7 steps: ") and "\n" not in found and "format" not in found)


def test_a_far_contrast_is_reported_in_nats():
    def softplus(nats, temperature):  # the loss of tokens that I+ changes by this many nats more than I-
        return math.log1p(math.exp(nats / temperature))

    assert far_out([row(cpl=softplus(0.0, 0.1))], 0.1) is None
    assert far_out([row(cpl=math.nan), row(cpl=None), {"reward": 1.0}], 0.1) is None
    one_step = [row(cpl=cpl) for cpl in (3.474, 0.498, 1.94, 50.355, 0.356)]  # of a run with few selected tokens
    assert far_out(one_step, 0.1) is None
    found = far_out([row(cpl=softplus(2.0, 0.1)), row(cpl=softplus(3.6, 0.1)), {"reward": 1.0}], 0.1)
    assert "the median CPL of the latest steps is 28.0" in found
    assert "by about 2.8 nats more than I-, at perception_temperature 0.1" in found


def told(capsys, rows, *, temperature=0.1, already=False, last=100, first=True):
    signs = EarlySigns(temperature, lambda: already)
    state = SimpleNamespace(global_step=0, max_steps=last, is_world_process_zero=first)
    steps = []
    for state.global_step, logs in enumerate(rows, 1):
        signs.on_log(None, state, None, logs=logs)
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("cppo: warning: ") for line in lines)
        steps += [state.global_step] * len(lines)
    return steps


def test_warnings_appear_once_after_the_first_steps(capsys):
    assert told(capsys, [row(cpl=30.0)] * 20) == [FIRST_STEPS, FIRST_STEPS]
    assert told(capsys, [row(cpl=30.0)] * 20, temperature=None) == [FIRST_STEPS]
    assert told(capsys, [row(cpl=30.0)] * 20, already=True) == [FIRST_STEPS]  # of its rewards it knows
    assert told(capsys, [row()] * 3, last=3) == [3]
    assert told(capsys, [row(0.5, 0.5, 0.0)] * 20) == []
    assert told(capsys, [row()] * 20, first=False) == []
    assert told(capsys, [{"eval_reward": 0.0}, {"loss": 1.0}] * 20) == []
