"""Token-weighting methods: advantages and losses against their formulas in float64, on both scoring paths."""

import math
from functools import cache

import family_reference as reference
import numpy as np
import pytest
import torch
from float64_reference import JITTER, reference_rollouts
from method_reference import float64_trainer, rl_loss
from rollout_stubs import (
    cut,
    flat_weights,
    generation_batch,
    make_rows,
    parity_reward,
    step_logs,
    token_reward,
)

from cppo.errors import UserError
from cppo.methods.reweighting import REWEIGHTING
from cppo.training.config import CPPOConfig

METHODS = ("mssr", "tor", "vepo", "pepo", "vgpo", "prpo")
VALUES = (0.25, 0.5, 0.75, 1.0)
"""MSSR's expected share of right answers to each prompt."""
PART = 0.25
"""Of PEPO's weights after a quarter of the run."""


@pytest.fixture(scope="module")
def rows():
    """One image, two of different size, text only, one."""
    return make_rows([1, 2, 0, 1])


@pytest.fixture(scope="module")
def trainer_of(tiny, tmp_path_factory, rows):
    """A trainer in float64 by method and scorer, with drawn rollouts, after a quarter of its run."""

    @cache
    def make(method, scorer):
        return float64_trainer(tiny, tmp_path_factory.mktemp("run"), rows, method=method, scorer=scorer)

    return make


@pytest.fixture(scope="module")
def seen(trainer_of, processor, rows):
    """The rollouts under a method's views, each set of views once."""
    trainer = trainer_of("pepo", "plain")

    @cache
    def under(views):
        return reference_rollouts(trainer.model, processor, rows, trainer.args.seed, views)

    return lambda method: under(reference.VIEWS_OF.get(method, JITTER))


@pytest.fixture(scope="module")
def advantages_of(trainer_of, seen, processor, rows):
    """The advantage of every token of every rollout by a method's formula, as lists."""
    model = trainer_of("pepo", "plain").model
    near = reference.cosines(model, processor, rows)

    def shape(method):
        rollouts = seen(method)
        if method == "mssr":
            drawn = [[completion] for _, completion in reference.completions(processor, rows)]
            rewards = [token_reward(one)[0] + parity_reward(one)[0] for one in drawn]
            return reference.mssr(rollouts, rewards, np.repeat(VALUES, len(rollouts) // len(rows)).tolist())
        weights = {
            "tor": lambda: reference.tor(rollouts, reference.nucleus_entropies(model, processor, rows, 0.95)),
            "pepo": lambda: reference.pepo(rollouts, near, PART),
            "vgpo": lambda: reference.vgpo(rollouts, near),
            "vepo": lambda: reference.vepo(rollouts),
            "prpo": lambda: reference.prpo(rollouts),
        }[method]()
        return [[r.advantage * weight for weight in own] for r, own in zip(rollouts, weights, strict=True)]

    return shape


def shaped(trainer, rows, parts):
    """The micro-batches of a generation batch with shaped advantages, after a quarter of the run."""
    trainer.args.steps_per_generation = 1
    trainer.state.global_step = 0
    if trainer.baseline is not None:
        trainer.baseline.begin(dict(zip([row["sample_id"] for row in rows], VALUES, strict=True)))
    micro_batches = cut(trainer, generation_batch(trainer, rows), parts)
    trainer.state.global_step = 1
    trainer._score_before_updates(micro_batches)
    return micro_batches


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("scorer", ["plain", "shared"])
@pytest.mark.parametrize("method", METHODS)
def test_advantages(trainer_of, advantages_of, rows, method, scorer, parts):
    """With 8 micro-batches, every group is split in two."""
    micro_batches = shaped(trainer_of(method, scorer), rows, parts)
    found = [row for inputs in micro_batches for row in inputs["advantages"].tolist()]
    expected = advantages_of(method)
    for row, own in zip(found, expected, strict=True):
        assert row[: len(own)] == pytest.approx(own, abs=3e-6)
    spread = max(max(own) - min(own) for own in expected)
    assert spread > (0.002 if method in ("mssr", "pepo") else 0.4)


@pytest.mark.parametrize("method", METHODS)
def test_the_shared_path_has_the_plain_gradients(trainer_of, rows, method):
    gradients = []
    for scorer in ("plain", "shared"):
        trainer = trainer_of(method, scorer)
        loss = sum(trainer._compute_loss(trainer.model, inputs) for inputs in shaped(trainer, rows, 2))
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found if gradient is not None]))
    plain, packed = gradients
    assert plain.norm() > 1e-3
    assert (plain - packed).norm() <= 1e-6 * plain.norm()


def old_logps_of(rollouts, shape):
    """Those of an earlier policy, padded, and as lists."""
    draws = np.random.default_rng(1).uniform(-0.4, 0.4, shape)
    rows = [[-s + draws[i, t] for t, s in enumerate(r.surprisals)] for i, r in enumerate(rollouts)]
    padded = torch.zeros(shape, dtype=torch.float64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return padded, rows


@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_sent(trainer_of, seen, rows, scorer):
    """Ratios far from 1 are not clipped, and the penalty is on two tokens; text-only rows count too."""
    trainer, rollouts = trainer_of("sent", scorer), seen("sent")
    trainer.args.steps_per_generation = 1
    (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
    assert all(views == {} for views in inputs["perception_views"])
    padded, old = old_logps_of(rollouts, inputs["completion_mask"].shape)
    loss = trainer._compute_loss(trainer.model, {**inputs, "old_per_token_logps": padded})
    tokens = sum(r.tokens for r in rollouts)
    ratios = (
        r.advantage * math.exp(-surprisal - before)
        for r, row in zip(rollouts, old, strict=True)
        for surprisal, before in zip(r.surprisals, row, strict=True)
    )
    penalty = reference.sent_penalty(rollouts, old)
    assert loss.item() == pytest.approx(penalty - math.fsum(ratios) / tokens, abs=2e-7)
    assert penalty > 1e-4
    on_policy = trainer._compute_loss(trainer.model, inputs).item()
    assert on_policy == pytest.approx(rl_loss(rollouts), abs=2e-7)


@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_the_papers_form_of_sent(trainer_of, seen, rows, monkeypatch, scorer):
    """k3 to the reference: the high weight above a covariance, the low one on the rest, all below an entropy."""
    trainer, rollouts = trainer_of("sent", scorer), seen("sent")
    bound = math.fsum(sorted(h for r in rollouts for h in r.entropies[0])[40:42]) / 2
    changes = {
        "perception_selector": "band_values",
        "perception_band": [0.0, bound],
        "perception_kl_target": "reference",
        "perception_covariance_threshold": 0.1,
    }
    for name, value in changes.items():
        monkeypatch.setattr(trainer.args, name, value)
    trainer.args.steps_per_generation = 1
    (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
    padded, reference_logps = old_logps_of(rollouts, inputs["completion_mask"].shape)
    loss = trainer._compute_loss(trainer.model, {**inputs, "ref_per_token_logps": padded}).item()
    low = [(i, t) for i, r in enumerate(rollouts) for t in range(r.tokens) if r.entropies[0][t] <= bound]
    logps, advantages = [-rollouts[i].surprisals[t] for i, t in low], [rollouts[i].advantage for i, _ in low]
    means = [math.fsum(values) / len(low) for values in (logps, advantages)]
    total, high = 0.0, 0
    for (i, t), logp, advantage in zip(low, logps, advantages, strict=True):
        above = (logp - means[0]) * (advantage - means[1]) > 0.1
        high += above
        x = reference_logps[i][t] - logp
        total += (2.0 if above else 0.5) * (math.exp(x) - x - 1)
    assert 0 < high < len(low) == 41
    penalty = 0.1 * total / sum(r.tokens for r in rollouts)
    assert loss == pytest.approx(rl_loss(rollouts) + penalty, abs=2e-7)


@pytest.mark.parametrize("method", ["mssr", "pepo", "vgpo", "sent"])
def test_no_second_pass(trainer_of, rows, monkeypatch, method):
    """No view is drawn, and the model only runs over the images."""
    trainer = trainer_of(method, "shared")
    monkeypatch.setattr(trainer._views, "_views", None)
    batches = []
    run = trainer.model.forward

    def recorded(*args, shared_prompt=None, **kwargs):
        batches.append(set(shared_prompt.tokens))
        return run(*args, shared_prompt=shared_prompt, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", recorded)
    for inputs in shaped(trainer, rows, 2):
        trainer._compute_loss(trainer.model, inputs)
    assert batches == [{"anchor"}] * (2 if method == "sent" else 4)


@pytest.mark.parametrize("method", REWEIGHTING)
def test_training(make_trainer, method):
    """Real rollouts and three optimizer steps of two each a generation batch."""
    given = {"max_completion_length": 6, "max_steps": 3, "steps_per_generation": 2, "per_device_train_batch_size": 4}
    trainer = make_trainer(make_rows([1, 1]), method=method, gradient_accumulation_steps=1, **given)
    before = flat_weights(trainer.model)
    trainer.train()
    after = flat_weights(trainer.model)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    logs = step_logs(trainer)
    assert len(logs) == 3
    name = "cpl" if method == "sent" else "dependency"
    assert all(math.isfinite(log[f"perception/{name}"]) for log in logs if f"perception/{name}" in log)
    assert f"perception/{name}" in logs[0]


def test_weights_follow_their_schedules_through_a_resume(make_trainer):
    """beta (1 + cos(pi e)) / 2 at the step, and the same weights where the run resumes in the middle."""
    given = {
        "schedules": ["beta=cosine", "perception_weight=linear:0:2"],
        "beta": 0.04,
        "perception_weight": 0.5,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    seen = []

    def followed(trainer):
        step = trainer._compute_loss

        def compute(model, inputs):
            now = trainer._options_now()
            seen.append((trainer.state.global_step, trainer.beta, now.perception_weight, now.beta))
            return step(model, inputs)

        trainer._compute_loss = compute
        return trainer

    whole = followed(make_trainer(make_rows([1, 1]), folder="whole", **given))
    whole.train()
    expected = [
        (step, pytest.approx(0.02 * (1 + math.cos(math.pi * step / 4))), pytest.approx(step / 4)) for step in range(4)
    ]
    assert [values[:3] for values in seen] == expected
    assert all(values[1] == values[3] for values in seen)
    seen.clear()
    resumed = followed(make_trainer(make_rows([1, 1]), folder="whole", **given))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert [values[:3] for values in seen] == expected[2:]
    assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))


def test_a_weight_of_trls_that_begins_at_0_is_there(make_trainer):
    """TRL leaves out terms without a weight when rollouts are made; the reference is scored then."""
    trainer = make_trainer(make_rows([1, 1]), method="grpo", schedules=["beta=linear:0:1"], beta=0.04, max_steps=2)
    trainer.train()
    assert [log["kl"] is not None for log in step_logs(trainer)] == [True, True]
    assert trainer.beta == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schedules": ["learning_rate=linear"]}, "schedules: 'learning_rate' is not a weight"),
        ({"schedules": ["perception_weight"]}, "write perception_weight=linear or perception_weight=cosine"),
        ({"schedules": ["perception_weight=step"]}, "write perception_weight=linear"),
        ({"schedules": ["perception_weight=linear:1"]}, "FIRST and LAST are factors of at least 0"),
        ({"schedules": ["perception_weight=linear:-1:0"]}, "FIRST and LAST are factors of at least 0"),
        ({"schedules": ["perception_weight=linear", "perception_weight=cosine"]}, "perception_weight appears twice"),
        ({"schedules": ["beta=cosine"]}, "schedules: beta = 0"),
        ({"schedules": ["entropy_coef=cosine"], "entropy_coef": 0.1, "use_adaptive_entropy": True}, "choose one"),
        ({"method": "tor", "perception_set_weights": [1.0]}, "give two weights"),
        ({"perception_selector": "two_sets"}, "perception_sink = 'contrast' does not use"),
        ({"perception_selector": "band", "perception_band": [0.5, 2.0]}, "takes quantiles, from 0 to 1"),
        ({"perception_band": [0.5, 0.2]}, "give two numbers, [low, high]"),
        ({"method": "sent", "perception_kl_target": "reference"}, "needs a reference, which TRL loads for beta > 0"),
        ({"method": "sent", "perception_normalization": "token"}, "averages over all response tokens"),
        ({"method": "sent", "perception_removing_entropy_weight": 0.1}, "uses none: set 0"),
        ({"method": "vepo", "loss_type": "grpo"}, "needs a mean over tokens, not loss_type = 'grpo'"),
        ({"method": "vgpo", "perception_selector": "top"}, "weights every token: choose 'all'"),
    ],
)
def test_what_does_not_go_together(tmp_path, given, words):
    with pytest.raises(UserError) as caught:
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    assert words in str(caught.value)
