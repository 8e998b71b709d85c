"""Stages of the data: the rows of each batch, the same in a resumed run, and with replaced prompts."""

import math
from itertools import chain

import pytest
from datasets import IterableDataset
from rollout_stubs import inject, make_rows, step_logs, token_reward

from cppo.errors import UserError
from cppo.training.config import CPPOConfig
from cppo.training.stages import StagedSampler
from cppo.trl_surface import RepeatSampler

HARD = {"0", "1", "5"}
"""Answers of the rows with equal rewards in all rollouts."""


def partial_reward(completion_ids, answer, **kwargs):
    rewards = token_reward(completion_ids)
    return [0.9 if row in HARD else reward for reward, row in zip(rewards, answer, strict=True)]


def sampler(rows, stages, epochs=1.0, batches=None, **options):
    plain = RepeatSampler(range(rows), **{"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, **options})
    return StagedSampler(plain, stages, epochs, batches)


def batches_of(indices, mini_repeat_count=2, batch_size=3, repeat_count=2):
    """The rows of each generation batch, after a look at the repetitions."""
    size = mini_repeat_count * batch_size
    parts = [indices[start : start + size] for start in range(0, len(indices), size)]
    assert all(part[place] == part[place - place % mini_repeat_count] for part in parts for place in range(size))
    again = [parts[start : start + repeat_count] for start in range(0, len(parts), repeat_count)]
    assert all(part == one[0] for one in again for part in one)
    return [one[0][::mini_repeat_count] for one in again]


@pytest.mark.parametrize(("rows", "stages"), [(12, 1), (12, 2), (20, 3), (23, 4)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_one_stage_follows_the_other(rows, stages, epochs):
    made = sampler(rows, stages, epochs, seed=1)
    cut = [range(rows * stage // stages, rows * (stage + 1) // stages) for stage in range(stages)]
    passes = [list(made) for _ in range(epochs)]
    assert {len(one) for one in passes} == {len(made)}
    found = batches_of(list(chain(*passes)))
    expected = [stage for stage in cut for _ in range(epochs * (len(stage) // 3))]
    assert len(found) == len(expected)
    for number, (batch, stage) in enumerate(zip(found, expected, strict=True)):
        assert set(batch) <= set(stage) == set(made.rows(number))
        assert cut[made.stage(number)] == stage
    for stage in cut:
        own = [batch for batch, of in zip(found, expected, strict=True) if of == stage]
        size = len(stage) // 3
        turns = [list(chain(*own[turn * size : (turn + 1) * size])) for turn in range(epochs)]
        # None twice before all whole batches are used, and another order each time.
        assert all(len(turn) == len(set(turn)) for turn in turns)
        assert len({tuple(turn) for turn in turns}) >= min(epochs, 2)


def test_stages_share_the_batches_of_a_run():
    """For any `max_steps`: by the number of whole batches of each stage, here from 4 of 8 to 5 of 10."""
    for total in (2, 7, 20, 64):
        made = sampler(24, 2, batches=total, seed=0)
        of_run = [made.stage(number) for number in range(total)]
        assert of_run == sorted(of_run)
        assert abs(of_run.count(0) - total / 2) <= 0.5
    assert [sampler(7, 2, batches=9).stage(number) for number in range(9)] == [0] * 4 + [1] * 5


def test_a_seed_decides_and_no_shuffle_keeps_the_order():
    one, same, other = (list(sampler(12, 2, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    plain = batches_of(list(sampler(12, 2, shuffle=False)))
    assert plain == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_passes_begun_before_are_passed_over():
    whole, resumed = sampler(14, 2, 4, seed=3), sampler(14, 2, 4, seed=3)
    passes = [list(whole) for _ in range(4)]
    resumed.passes = 2
    assert [list(resumed) for _ in range(2)] == passes[2:]


def train(make_trainer, rows, resume=None, folder="out", **options):
    """A run of eight generation batches of two rows; returns the answers of each batch's rows."""
    given = {"method": "grpo", "max_steps": 8, "save_strategy": "steps", "save_steps": 1, "data_stages": 2, **options}
    trainer = inject(make_trainer(rows, folder=folder, **given), same_each_time=True)
    trained, begin = [], trainer._samples.begin

    def begun(shown, prompts):
        trained.append([row["answer"] for row in shown][:: trainer.num_generations])
        begin(shown, prompts)

    trainer._samples.begin = begun
    trainer.train(resume_from_checkpoint=resume)
    return trained, step_logs(trainer)


@pytest.mark.parametrize("rounds", [1, 6])
def test_a_run_resumes_exactly(make_trainer, tmp_path, rounds):
    """Nine rows make stages of four and five, with two batches per pass; eight batches are two passes of a stage."""
    options = {"dynamic_sampling_rounds": rounds, "reward_funcs": partial_reward}
    rows = make_rows([1, 0] * 4 + [1])
    trained, logs = train(make_trainer, rows, **options)
    assert [log["data_stage"] for log in logs] == [1] * 4 + [2] * 4
    assert all(set(batch) <= {"0", "1", "2", "3"} for batch in trained[:4])
    assert all(set(batch) <= {"4", "5", "6", "7", "8"} for batch in trained[4:])
    if rounds == 1:
        assert {row for batch in trained[:2] for row in batch} == {"0", "1", "2", "3"}
    else:
        assert sum(log["dynamic_sampling/redrawn"] > 0 for log in logs) > 2
        assert not {row for batch in trained for row in batch} & HARD
    assert len(set(map(str, trained))) > 4
    for stop in (1, 4, 5):
        again, rest = train(make_trainer, rows, str(tmp_path / "out" / f"checkpoint-{stop}"), f"from-{stop}", **options)
        assert again == trained[stop:]
        for ours, theirs in zip(rest[stop:], logs[stop:], strict=True):
            assert (ours["loss"], ours["reward"], ours["data_stage"]) == (
                theirs["loss"],
                theirs["reward"],
                theirs["data_stage"],
            )


def test_stages_that_cannot_be(make_trainer, monkeypatch):
    with pytest.raises(UserError, match="data_stages = 3 cuts 5 rows into stages of 1, fewer than the 2 prompts of a"):
        train(make_trainer, make_rows([0] * 5), data_stages=3)
    stream = IterableDataset.from_generator(lambda: iter(make_rows([0, 0])))
    monkeypatch.setattr("rollout_stubs.lazy_dataset", lambda rows: stream)
    with pytest.raises(UserError, match="data_stages cuts rows into stages, but a stream of data"):
        make_trainer([], data_stages=2)


def test_epochs_decide_where_no_steps_are_given(make_trainer):
    trained, logs = train(make_trainer, make_rows([1, 0] * 4), max_steps=-1, num_train_epochs=1.5)
    assert len(trained) == math.ceil(1.5 * 4)
    assert [log["data_stage"] for log in logs] == [1] * 3 + [2] * 3
    assert CPPOConfig("x", use_cpu=True, bf16=False).data_stages == 1
