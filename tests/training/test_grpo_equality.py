"""Without the perception term, CPPO equals TRL's GRPO, weight for weight; with it, TRL's losses gain only that term."""

import pytest
import torch
from rollout_stubs import cut, flat_weights, generation_batch, inject, make_rows, step_logs
from trl import GRPOConfig, GRPOTrainer

from cppo.training.config import CPPOConfig
from cppo.training.trainer import CPPOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
STEPS = {
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}


def trained_weights(trainer):
    inject(trainer).train()
    return flat_weights(trainer.model)


SETTINGS = {
    "plain": {},
    "minibatches": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "two iterations": {"num_iterations": 2},
    "reference policy": {"beta": 0.04},
    "images of two sizes": {},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_weight_zero_and_method_grpo_are_trls_grpo(make_trainer, setting):
    rows = make_rows([1, 2, 1, 3] if setting == "images of two sizes" else [1, 1, 1, 1])
    options = STEPS | SETTINGS[setting]
    trl = make_trainer(rows, GRPOTrainer, GRPOConfig, **options)
    start = flat_weights(trl.model)
    expected = trained_weights(trl)
    assert (expected - start).abs().max() > 1e-3
    for ours in [{"perception_weight": 0.0}] + ([{"method": "grpo"}] if setting == "plain" else []):
        unshared = make_trainer(rows, CPPOTrainer, CPPOConfig, **options, **ours, scorer="kernel")
        assert torch.equal(trained_weights(unshared), expected)
    variants = [("kernel", 1e-9), ("shared", 1e-9), ("shared", 0.0)]
    # Whole groups are shuffled, so a step on part of the rollouts takes others than TRL's.
    for scorer, weight in variants[:1] if setting == "minibatches" else variants:
        trainer = make_trainer(rows, CPPOTrainer, CPPOConfig, **options, perception_weight=weight, scorer=scorer)
        assert (trained_weights(trainer) - expected).abs().max() <= 1e-6


def test_the_published_weight_is_not_trls_grpo(make_trainer):
    rows = make_rows([1, 1, 1, 1])
    expected = trained_weights(make_trainer(rows, GRPOTrainer, GRPOConfig, **STEPS))
    ours = trained_weights(make_trainer(rows, CPPOTrainer, CPPOConfig, **STEPS))
    assert (ours - expected).abs().max() > 1e-4


def test_rows_without_images_train_as_in_trl(make_trainer):
    """TRL accepts text-only rows where no row of the dataset has an image."""
    rows = make_rows([0, 0, 0, 0])
    expected = trained_weights(make_trainer(rows, GRPOTrainer, GRPOConfig, **STEPS))
    unshared = make_trainer(rows, CPPOTrainer, CPPOConfig, **STEPS, scorer="kernel")
    assert torch.equal(trained_weights(unshared), expected)
    shared = trained_weights(make_trainer(rows, CPPOTrainer, CPPOConfig, **STEPS))
    assert (shared - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_of_trl_gains_the_weighted_term(make_trainer, loss_type):
    rows = make_rows([1, 0])
    weight = 0.25
    trainer = inject(
        make_trainer(rows, loss_type=loss_type, perception_weight=weight, beta=0.01, perception_normalization="token")
    )
    batch = generation_batch(trainer, rows)
    for inputs in cut(trainer, batch, 2):
        loss = trainer._compute_loss(trainer.model, inputs).item()
        term = trainer._perception_means.take(trainer.accelerator)["cpl"]
        plain = {key: value for key, value in inputs.items() if not key.startswith("perception_")}
        without = trainer._compute_loss(trainer.model, plain).item()
        if "pixel_values" in inputs["prompt_images"][0]:
            assert loss - without == pytest.approx(weight * term, abs=1e-6)
            assert weight * term > 0.01
        else:
            assert loss == without


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_of_trl_trains_a_step(make_trainer, loss_type):
    trainer = make_trainer(make_rows([1, 0]), loss_type=loss_type, perception_weight=0.25, max_steps=1)
    before = trainer.model.model.visual.merger.mlp[0].weight.detach().clone()
    inject(trainer).train()
    (logged,) = step_logs(trainer)
    assert abs(logged["loss"]) < 100
    assert 0 < logged["grad_norm"] < 1e4
    assert logged["perception/cpl"] > 0
    after = trainer.model.model.visual.merger.mlp[0].weight.detach()
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
