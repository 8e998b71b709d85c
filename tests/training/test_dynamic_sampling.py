"""Prompts with equal rewards in all rollouts are replaced: which, how often, and the same in a resumed run."""

import pytest
import torch
from rollout_stubs import flat_weights, inject, make_rows, step_logs, token_reward

from cppo.errors import UserError

HARD = {"0", "1", "3"}
"""Answers of the rows with equal rewards in all rollouts."""


def partial_reward(completion_ids, answer, **kwargs):
    rewards = token_reward(completion_ids)
    return [0.9 if row in HARD else reward for reward, row in zip(rewards, answer, strict=True)]


class Seen:
    """The rows of the reward calls, and those of the trained batches."""

    def __init__(self, trainer):
        self.asked, self.trained, self.calls = [], [], []
        begin, calculate = trainer._samples.begin, trainer._calculate_rewards

        def begun(rows, prompts):
            self.trained.append([row["answer"] for row in rows])
            begin(rows, prompts)

        def calculated(inputs, *rest):
            if trainer._made is None:
                self.asked.append([row["answer"] for row in inputs])
            return calculate(inputs, *rest)

        trainer._samples.begin, trainer._calculate_rewards = begun, calculated


def train(make_trainer, rows, rounds, resume=None, folder="out", **options):
    given = {"method": "grpo", "max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    given |= {"reward_funcs": partial_reward, "dynamic_sampling_rounds": rounds, **options}
    trainer = make_trainer(rows, folder=folder, **given)
    seen = Seen(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def test_prompts_of_equal_rewards_give_way(make_trainer):
    rows = make_rows([1, 0, 2, 1, 1, 0])
    trainer, seen = train(make_trainer, rows, 6, max_steps=6)
    logs = [log for log in step_logs(trainer) if "dynamic_sampling/rounds" in log]
    assert len(seen.trained) == len(logs) == 3
    at = 0
    for batch, log in zip(seen.trained, logs, strict=True):
        rounds = int(log["dynamic_sampling/rounds"])
        asked = seen.asked[at : at + rounds]
        at += rounds
        assert log["dynamic_sampling/equal"] == log["frac_reward_zero_std"] == 0
        assert not HARD & set(batch)
        assert log["dynamic_sampling/rollouts"] == sum(map(len, asked))
        assert log["dynamic_sampling/redrawn"] == len(HARD & set(asked[0])) / 2
        # Only missing rollouts are generated, and no row twice.
        missing = [len(HARD & set(asked[0]))]
        for rows_of_round in asked[1:]:
            assert len(rows_of_round) == 4 * missing[-1]
            missing.append(missing[-1] - len(set(rows_of_round) - HARD))
        drawn = [row for rows_of_round in asked[1:] for row in rows_of_round[::4]]
        assert len(drawn) == len(set(drawn))
    assert at == len(seen.asked) > 3
    assert {len(rollout) for rollout in [sample["completion_tokens"] for sample in trainer.last_samples]}


def test_the_last_round_is_used_as_it_is(make_trainer):
    trainer, seen = train(
        make_trainer, make_rows([1, 0]), 5, reward_funcs=lambda completion_ids, **_: [1.0] * len(completion_ids)
    )
    logs = [log for log in step_logs(trainer) if "dynamic_sampling/rounds" in log]
    # After both rows of the data were drawn, there are no others.
    assert [log["dynamic_sampling/rounds"] for log in logs] == [2, 2]
    assert all(log["dynamic_sampling/equal"] == 1 and log["dynamic_sampling/redrawn"] == 0 for log in logs)
    assert all(sorted(batch) == ["0"] * 4 + ["1"] * 4 for batch in seen.trained)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "cppo", "perception_gate": "none", "rollout_views": ["diffusion_noise"], "rollout_view_mode": "mix"},
    ],
)
def test_a_run_resumes_exactly(make_trainer, tmp_path, options):
    rows = make_rows([1, 0, 2, 1, 1, 0])
    whole, seen = train(make_trainer, rows, 4, **options)
    assert len(seen.asked) > len(seen.trained) == 2
    logs = [(log["loss"], log["reward"]) for log in step_logs(whole) if "reward" in log]
    for stop in (1, 2, 3):
        resumed, again = train(
            make_trainer, rows, 4, str(tmp_path / "out" / f"checkpoint-{stop}"), f"from-{stop}", **options
        )
        assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model)), stop
        assert again.trained == seen.trained[(stop - 1) // 2 if stop % 2 else stop // 2 :], stop
        assert [(log["loss"], log["reward"]) for log in step_logs(resumed) if "reward" in log] == logs
        assert resumed.last_samples[0]["completion_tokens"] == whole.last_samples[0]["completion_tokens"]
        assert resumed.last_samples[0]["answer"] == whole.last_samples[0]["answer"]


def test_the_rollouts_that_are_trained_on_have_their_own_rewards(make_trainer):
    trainer = inject(
        make_trainer(
            make_rows([1, 0, 2, 1, 1, 0]), method="grpo", reward_funcs=partial_reward, dynamic_sampling_rounds=6
        )
    )
    trainer.train()
    decode = trainer.processing_class.decode
    assert len(trainer.last_samples) == 4
    for sample in trainer.last_samples:
        ids = [i for i in range(300) if decode([i]) in sample["completion_tokens"]]
        assert ids
        assert sample["answer"] not in HARD
    (log,) = step_logs(trainer)
    rewards = trainer._logs["rewards"]["partial_reward"]
    assert log["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert log["num_tokens"] > 0
    assert trainer._generating is trainer._made is None


def test_what_draws_no_prompts_is_refused(make_trainer):
    given = {"rollout_func": lambda prompts, trainer: None, "method": "grpo"}
    with pytest.raises(UserError, match="dynamic_sampling_rounds makes rollouts without tools"):
        make_trainer(make_rows([1, 1]), dynamic_sampling_rounds=2, **given)
