"""Baselines of prompts: MSSR's closed forms, the pass before the first step, and runs that resume exactly."""

import math

import pytest
import torch
from datasets import Dataset
from rollout_stubs import flat_weights, inject, make_rows, parity_reward, step_logs

from cppo import CPPOConfig
from cppo.errors import UserError
from cppo.methods import METHODS
from cppo.training.baseline import PromptBaseline, memory_factor, normalized

MEMORY = (0.875, 0.96)
OF_ONE = {"method": "mssr", "num_generations": 1, "per_device_train_batch_size": 4}


def test_counts_begin_with_the_first_answer_and_forget():
    baseline = PromptBaseline(0.01, 10, MEMORY)
    baseline.begin({"a": 1.0})
    assert baseline.counts == {"a": (8.0, 0.0)}
    assert baseline.value("a") == 1.0
    assert baseline.value("unseen") == 0.5
    # The baselines from before this batch: 1 for a, 0.5 for the other.
    raw = torch.tensor([0.0 - 1.0, 1.0 - 0.5], dtype=torch.float64)
    expected = (raw - raw.mean()) / raw.std(correction=0)
    assert baseline.advantages(["a", "unseen"], torch.tensor([0.0, 1.0])).tolist() == pytest.approx(expected.tolist())
    assert baseline.counts["a"] == pytest.approx((7.34, 1.0))
    assert baseline.value("a") == pytest.approx(0.8801, abs=5e-5)
    assert baseline.counts["unseen"] == pytest.approx((4 * 0.9175 + 1, 4 * 0.9175))


def test_advantages_have_variance_1_over_the_batch():
    found = normalized(torch.tensor([0.5, -0.5, 0.75, -0.75], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.784, -0.784, 1.177, -1.177], abs=5e-4)
    alike = normalized(torch.tensor([0.3, 0.3, math.nan], dtype=torch.float64))
    assert alike.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert normalized(torch.tensor([math.nan])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("drift", "factor"), [(None, 0.9175), (0.0, 0.875), (0.005, 0.9175), (0.01, 0.96), (0.02, 0.875)]
)
def test_the_factor_rises_to_the_target_and_drops_beyond(drift, factor):
    assert memory_factor(drift, 0.01, MEMORY) == pytest.approx(factor)


def test_rewards_that_are_missing_count_nothing_and_several_of_a_prompt_all_do():
    baseline = PromptBaseline(0.01, 10, MEMORY)
    baseline.begin({"a": 0.5, "b": 0.25})
    found = baseline.advantages(["a", "a", "b"], torch.tensor([1.0, 0.0, math.nan]))
    assert found.tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert baseline.counts["a"] == pytest.approx((4 * 0.9175 + 1, 4 * 0.9175 + 1))
    assert baseline.counts["b"] == (2.0, 6.0)


def test_the_kl_is_of_the_policy_that_made_the_rollouts_over_the_latest_batches():
    baseline = PromptBaseline(0.01, 2, MEMORY)
    mask = {"completion_mask": torch.tensor([[1, 1, 0]])}
    logps, reference, old = (torch.tensor([row]) for row in ([-1.0, -2.0, 5.0], [-1.1, -2.2, 0.0], [-1.0, -2.1, 0.0]))
    k3 = [math.exp(d) - d - 1 for d in (-0.1, -0.2, -0.1, -0.1)]
    baseline.see({**mask, "ref_per_token_logps": reference}, logps)
    baseline.see({**mask, "ref_per_token_logps": reference, "old_per_token_logps": old}, logps)
    baseline.see(mask, logps)
    total, tokens = baseline.sums_so_far()
    assert tokens == 4
    assert total == pytest.approx(sum(k3), rel=1e-5)
    for kl in (0.5, 0.1, 0.3):
        baseline.close(kl * 8, 8)
    baseline.close(0, 0)
    assert baseline.recent == pytest.approx([0.1, 0.3])
    assert baseline.sums_so_far() == [0.0, 0.0]


def train(make_trainer, rows, resume=None, folder="out", **options):
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "beta": 0.05, "num_iterations": 2}
    trainer = make_trainer(rows, folder=folder, reward_funcs=parity_reward, **{**OF_ONE, **given, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_of_single_rollouts_resumes_exactly(make_trainer, tmp_path, capfd):
    rows = make_rows([1, 0, 2, 1, 1, 0])
    whole = train(make_trainer, rows)
    assert "initial pass: 6 responses to 6 prompts in" in capfd.readouterr().err
    assert whole.args.num_generations == 1
    assert set(whole.baseline.counts) == {row["sample_id"] for row in rows}
    assert len(whole.baseline.recent) == 1
    assert whole.baseline.recent[0] >= 0
    logs = step_logs(whole)
    assert any(log["frac_reward_zero_std"] < 1 for log in logs if "frac_reward_zero_std" in log)
    for stop in (1, 2, 3):
        resumed = train(make_trainer, rows, str(tmp_path / "out" / f"checkpoint-{stop}"), f"from-{stop}")
        assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model)), stop
        assert resumed.baseline.state() == whole.baseline.state(), stop
        assert [log["loss"] for log in step_logs(resumed)] == [log["loss"] for log in logs], stop
    assert "initial pass" not in capfd.readouterr().err
    assert train(make_trainer, rows, folder="group", method="grpo", num_generations=2, max_steps=1).baseline is None
    with pytest.raises(UserError, match="has no baselines of prompts"):
        train(make_trainer, rows, str(tmp_path / "group" / "checkpoint-1"), "late")


def test_the_pass_before_the_first_step_leaves_the_run_as_it_is(make_trainer):
    """It answers every row as often as requested, in its own random stream, and logs nothing."""
    rows = make_rows([1, 0, 2, 1, 1])
    trainers = [make_trainer(rows, reward_funcs=parity_reward, baseline_init_samples=n, **OF_ONE) for n in (0, 3)]
    seen = []
    for trainer in trainers:
        generate = trainer._generate_single_turn
        answered = []

        def recorded(prompt_ids, *rest, generate=generate, answered=answered, trainer=trainer):
            found = generate(prompt_ids, *rest)
            answered.append((trainer.model.training, [len(prompt_ids), *map(tuple, found[0])]))
            return found

        trainer._generate_single_turn = recorded
        torch.manual_seed(5)
        trainer.train()
        seen.append(answered)
    alone, behind = seen
    assert [made for training, made in behind if training] == [made for _, made in alone]
    assert [made[0] for training, made in behind if not training] == [4, 4, 4, 3]
    assert trainers[0].state.num_input_tokens_seen == trainers[1].state.num_input_tokens_seen
    counts = trainers[1].baseline.counts
    assert all(name in counts for name in (row["sample_id"] for row in rows))


def test_a_baseline_holds_for_groups_and_for_methods_with_a_gate(make_trainer):
    given = {"method": "cppo", "advantage_baseline": "prompt", "baseline_init_samples": 0, "max_steps": 2}
    trainer = inject(make_trainer(make_rows([1, 1]), reward_funcs=parity_reward, **given))
    trainer.train()
    assert all(log["perception/gated_fraction"] > 0 for log in step_logs(trainer))
    assert {round(sum(counts), 9) for counts in trainer.baseline.counts.values()} == {
        round((8 * 0.9175 + 4) * 0.9175 + 4, 9)
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_generations": 1}, "advantage_baseline = 'prompt'"),
        ({**OF_ONE, "per_device_train_batch_size": 1}, "of at least 2"),
        ({"method": "mssr", "baseline_memory": [0.9]}, "give two factors"),
        ({"method": "mssr", "multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
        ({"trained_answers": "asked", "dynamic_sampling_rounds": 3}, "asks about other"),
        ({"method": "mssr", "dynamic_sampling_rounds": 3}, "set dynamic_sampling_rounds = 1"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)


def test_a_stream_has_no_initial_pass(make_trainer):
    trainer = make_trainer(make_rows([1]), method="grpo")
    trainer.train_dataset = Dataset.from_dict({"prompt": ["?"]}).to_iterable_dataset()
    with pytest.raises(UserError, match="baseline_init_samples draws rows by index"):
        trainer._check_answers_alone("baseline_init_samples", 0)


def test_single_rollouts_are_accepted_with_any_batch_options(tmp_path):
    for sizes in (
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 1, "steps_per_generation": 2},
        {"per_device_train_batch_size": 3, "generation_batch_size": 9},
    ):
        made = CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, method="mssr", num_generations=1, **sizes)
        assert made.num_generations == made.num_generations_eval == 1
        assert made.generation_batch_size == made.per_device_train_batch_size * made.steps_per_generation
    assert METHODS["mssr"].options["advantage_baseline"] == "prompt"
