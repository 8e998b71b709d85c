"""A training: splits of a step, gradients, logs, samples, evaluation, adapters."""

import math
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from rollout_stubs import (
    cut,
    flat_weights,
    generation_batch,
    inject,
    lazy_dataset,
    make_rows,
    parity_reward,
    step_logs,
    term_of,
    token_reward,
)
from transformers import TrainerCallback

from cppo.perception import METRICS
from cppo.policy import pack
from cppo.training.config import CPPOConfig
from cppo.training.trainer import CPPOTrainer

SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
CUTS = [
    {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts} for batch, parts in ((8, 1), (1, 8))
]
"""The same step as one micro-batch and as eight."""


@pytest.mark.parametrize(
    ("loss_type", "normalization"),
    [(name, "rollout") for name in ("dapo", "grpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")]
    + [("dapo", "token"), ("grpo", "token")],
)
def test_the_cut_into_micro_batches_does_not_matter(make_trainer, loss_type, normalization):
    options = {**SGD, "loss_type": loss_type, "perception_normalization": normalization, "perception_weight": 0.5}
    weights = []
    for cut_so in CUTS:
        trainer = inject(make_trainer(make_rows([1, 2]), **options, **cut_so))
        before = flat_weights(trainer.model)
        trainer.train()
        weights.append(flat_weights(trainer.model))
        assert (weights[-1] - before).abs().max() > 1e-3
    assert (weights[0] - weights[1]).abs().max() <= 1e-5


def test_the_logged_means_do_not_depend_on_the_cut(make_trainer):
    logs = []
    for cut_so in CUTS:
        trainer = inject(make_trainer(make_rows([1, 2]), perception_gate="none", **cut_so))
        trainer.train()
        logs.append([step_logs(trainer)[0][f"perception/{name}"] for name in METRICS])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_the_published_normalization_depends_on_the_cut(make_trainer):
    options = {**SGD, "perception_normalization": "microbatch", "perception_weight": 0.5}
    weights = []
    for cut_so in CUTS:
        trainer = inject(make_trainer(make_rows([1, 2]), **options, **cut_so))
        trainer.train()
        weights.append(flat_weights(trainer.model))
    assert (weights[0] - weights[1]).abs().max() > 1e-4


def test_the_tokens_of_every_step_are_counted_anew(make_trainer):
    """Where a step is one micro-batch, the mean over the step's tokens is the mean over the micro-batch's."""
    weights = []
    for normalization in ("token", "microbatch"):
        options = {"perception_normalization": normalization, "perception_weight": 0.5, "max_steps": 3}
        trainer = inject(make_trainer(make_rows([1, 2, 1]), **SGD, **options))
        trainer.train()
        weights.append(flat_weights(trainer.model))
    assert (weights[0] - weights[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_logged_share_is_that_of_the_gradient_norms(make_trainer, checkpointing):
    batches = []

    class Recording(CPPOTrainer):
        def _compute_loss(self, model, inputs):
            batches.append(inputs)
            return super()._compute_loss(model, inputs)

    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    options |= {"log_perception_grad_share": True, "perception_weight": 0.3, "gradient_checkpointing": checkpointing}
    trainer = inject(make_trainer(make_rows([1, 1]), Recording, CPPOConfig, **options))
    trainer.train()
    (log,) = step_logs(trainer)
    assert len(batches) == 2
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    term = whole = 0.0
    for inputs in list(batches):
        loss = trainer._compute_loss(trainer.model, inputs)
        whole = whole + flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
        weighted = 0.3 * term_of(trainer, inputs)
        term = term + flat(torch.autograd.grad(weighted, parameters, allow_unused=True), parameters)
    share = term.norm() / (term.norm() + (whole - term).norm())
    assert 0.01 < share < 0.99
    assert log["perception/grad_norm_share"] == pytest.approx(share.item(), rel=1e-4)
    assert log["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-4)


def flat(grads, parameters):
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for grad, p in pairs]).double()


def test_gradient_checkpointing_changes_nothing(make_trainer):
    weights = []
    for checkpointing in (False, True):
        trainer = inject(make_trainer(make_rows([1, 0]), **SGD, gradient_checkpointing=checkpointing))
        trainer.train()
        weights.append(flat_weights(trainer.model))
    assert (weights[0] - weights[1]).abs().max() <= 1e-5


def test_bf16_autocast_trains(make_trainer):
    trainer = inject(make_trainer(make_rows([1, 2]), bf16=True, perception_divergence="js", perception_score="kl"))
    trainer.train()
    (log,) = step_logs(trainer)
    assert math.isfinite(log["grad_norm"])
    assert log["perception/cpl"] > 0


def test_autocast_keeps_no_cast_weights(make_trainer, monkeypatch):
    """Neither in accelerate's wrapped forward nor where packed rows are built; the numbers hardly change."""
    kept, found = [], []

    def see(*_):
        kept.append(torch.is_autocast_cache_enabled())

    for cache_enabled in (False, True):
        trainer = inject(make_trainer(make_rows([1, 2]), **SGD, bf16=True))
        if cache_enabled:
            trainer.accelerator.autocast_handler.cache_enabled = True
        trainer.model.model.visual.register_forward_pre_hook(see)
        monkeypatch.setattr("cppo.training.scoring.pack", lambda *args, **options: see() or pack(*args, **options))
        kept.clear()
        trainer.train()
        found.append((flat_weights(trainer.model), step_logs(trainer)[0]["perception/cpl"]))
        assert len(kept) >= 2
        assert set(kept) == {cache_enabled}
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-3


def test_two_iterations_reuse_rollouts_and_views(make_trainer):
    seen = []

    class Recording(CPPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append((inputs["completion_ids"], inputs["perception_views"], loss.item()))
            return loss

    trainer = inject(make_trainer(make_rows([1, 1]), Recording, CPPOConfig, num_iterations=2, max_steps=3))
    trainer.train()
    first, second, third = seen
    assert first[0] is second[0]
    assert first[1] is second[1]
    assert first[2] != second[2]
    assert not torch.equal(first[0], third[0])


class LogKeeper(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def test_callbacks_get_the_perception_logs(make_trainer):
    keeper = LogKeeper()
    inject(make_trainer(make_rows([1, 1]), callbacks=[keeper], max_steps=2)).train()
    for log in keeper.logs[:2]:
        perception = {name.removeprefix("perception/"): log[name] for name in log if name.startswith("perception/")}
        assert set(perception) == {*METRICS, "gated_fraction"}
        assert all(math.isfinite(value) and value >= 0 for value in perception.values())
        assert 0 < perception["selected_fraction"] <= 0.5
        assert 0 < perception["gated_fraction"] < 1


@pytest.mark.parametrize("off", [{"method": "grpo"}, {"perception_weight": 0.0}])
def test_without_perception_nothing_of_it_is_logged_and_samples_have_no_selected_tokens(make_trainer, off):
    trainer = inject(make_trainer(make_rows([1, 1]), **off))
    trainer.train()
    assert not any(name.startswith("perception/") for name in step_logs(trainer)[0])
    assert len(trainer.last_samples) == 4
    for sample in trainer.last_samples:
        assert len(sample["completion_tokens"]) == len(sample["perception"]) == len(sample["score"]) > 0
        assert not any(sample["perception"])
        assert not any(sample["score"])


def test_a_step_without_gated_in_rollouts_has_samples_too(make_trainer):
    trainer = inject(
        make_trainer(make_rows([1, 1]), reward_funcs=lambda completions, **kwargs: [1.0] * len(completions))
    )
    trainer.train()
    assert step_logs(trainer)[0]["perception/gated_fraction"] == 0
    assert len(trainer.last_samples) == 4
    assert not any(any(sample["perception"]) for sample in trainer.last_samples)


@pytest.mark.parametrize(("last", "kept"), [(1, 1), (3, 2)])
def test_samples_are_kept_of_the_first_step_and_of_those_that_are_logged(make_trainer, last, kept):
    trainer = inject(make_trainer(make_rows([1, 1]), logging_steps=2, max_steps=last))
    trainer.train()
    assert {sample["step"] for sample in trainer.last_samples} == {kept}


def test_last_samples_are_rollouts_of_the_batch(make_trainer, processor):
    rollouts = []

    def reward(prompts, completion_ids, **kwargs):
        values, parities = token_reward(completion_ids), parity_reward(completion_ids)
        for prompt, ids, value, parity in zip(prompts, completion_ids, values, parities, strict=True):
            tokens = [processor.decode([i]) for i in ids]
            rollouts.append((prompt[0]["content"][-1]["text"], tokens, 0.75 * value + 0.25 * parity))
        return values

    rows = make_rows([1, 0, 2])
    options = {"perception_gate": "none", "per_device_train_batch_size": 12}
    options |= {"reward_funcs": [reward, parity_reward], "reward_weights": [0.75, 0.25]}
    trainer = inject(make_trainer(rows, **options))
    trainer.train()
    by_text = {row["prompt"][0]["content"]: row for row in rows}
    assert len(trainer.last_samples) == 4
    assert len({sample["prompt"][0]["content"] for sample in trainer.last_samples}) == 2
    for sample in trainer.last_samples:
        text = sample["prompt"][0]["content"]
        assert (text, sample["completion_tokens"], sample["reward"]) in rollouts
        assert sample["answer"] == by_text[text]["answer"]
        images = by_text[text]["images"]
        assert [image.tobytes() for image in sample["images"]] == [image.tobytes() for image in images] != []
        assert len(sample["perception"]) == len(sample["score"]) == len(sample["completion_tokens"])
        candidates = sum(score > 0 for score in sample["score"])
        assert sum(sample["perception"]) == (max(1, candidates // 2) if candidates else 0)
        pairs = list(zip(sample["score"], sample["perception"], strict=True))
        chosen, rest = ([score for score, picked in pairs if picked is kind] for kind in (True, False))
        assert min(chosen, default=1.0) >= max(rest, default=0.0)


@pytest.mark.parametrize("method", ["cppo", "vppo"])
def test_last_samples_are_of_the_last_logged_step(make_trainer, method):
    """Also where a generation batch begins with another step."""
    options = {"method": method, "steps_per_generation": 2, "logging_steps": 2, "max_steps": 6}
    trainer = inject(make_trainer(make_rows([1, 1, 1, 1]), **options))
    trainer.train()
    assert {sample["step"] for sample in trainer.last_samples} == {6}
    assert any(any(sample["perception"]) for sample in trainer.last_samples)


def test_evaluation_keeps_the_best_checkpoint(make_trainer, tmp_path):
    """The evaluation reward is best after step 2 of 3, so the final model must have that step's weights."""
    quality = {0: 0.0, 1: 1.0, 2: 3.0, 3: 2.0}

    def reward(completion_ids, answer, trainer_state, **kwargs):
        if answer[0] == "77":
            return [quality[trainer_state.global_step]] * len(answer)
        return [float(sum(ids) % 11) for ids in completion_ids]

    class WeightKeeper(TrainerCallback):
        kept = {}  # noqa: RUF012

        def on_step_end(self, args, state, control, model, **kwargs):
            self.kept[state.global_step] = flat_weights(model)

    keeper = WeightKeeper()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "save_total_limit": 1}
    trainer = inject(
        make_trainer(
            make_rows([1, 0]),
            reward_funcs=reward,
            eval_dataset=lazy_dataset(make_rows([1, 2], first=77)[:1] * 2),
            per_device_eval_batch_size=4,
            callbacks=[keeper],
            **options,
        )
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    assert trainer.state.best_metric == 3.0
    assert torch.equal(flat_weights(trainer.model), keeper.kept[2])
    assert not torch.equal(keeper.kept[2], keeper.kept[3])
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert [log["eval_reward"] for log in evaluations] == [1.0, 3.0, 2.0]
    assert not any(name.startswith("eval_perception") for name in evaluations[0])
    assert len(step_logs(trainer)) == 3
    assert all(log["perception/cpl"] > 0 for log in step_logs(trainer))


def test_the_model_card_cites_the_method(make_trainer, tmp_path):
    make_trainer(make_rows([1, 1])).create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"```bibtex\n(.*?)```", readme, flags=re.DOTALL)
    assert entry.strip() in card
    assert card.index("arXiv:2601.00501") < card.index("DeepSeekMath")  # the method, then what it builds on


def test_adapters_train_alone_and_resume(make_trainer, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"peft_config": lora, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 0.01}
    trainer = make_trainer(make_rows([1, 0]), **options)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name for name in before if "lora_B" in name} <= changed
    assert all(log["perception/cpl"] > 0 for log in step_logs(trainer))
    resumed = make_trainer(make_rows([1, 0]), folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, after[name]), name


def test_cut_is_what_the_trainer_does(make_trainer):
    """The tests' own split of a batch is the one of `_prepare_inputs`, except for the order."""
    rows = make_rows([1, 2])
    trainer = inject(make_trainer(rows, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    parts = cut(trainer, generation_batch(trainer, rows), 2)
    torch.manual_seed(0)
    trainer._step, trainer._buffered_inputs = 0, None
    inject(trainer)._prepare_inputs([row for row in rows for _ in range(4)])
    made = trainer._buffered_inputs
    assert [part.keys() for part in made] == [part.keys() for part in parts]
    ours, theirs = (
        {tuple(ids) for part in batch for ids in part["completion_ids"].tolist()} for batch in (parts, made)
    )
    assert ours == theirs
