"""Every method's full loss against its formula in float64, on the plain and the shared scoring path."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from float64_reference import (
    JITTER,
    best,
    chosen_tokens,
    drawn_rollouts,
    k3,
    reference_logits,
    reference_rollouts,
    view_images,
)
from method_reference import (
    CFPO_WEIGHT,
    TERMS,
    VIEWS_OF,
    cppo,
    float64_trainer,
    mean,
    pgpo_weights,
    rl_loss,
    vppo_loss,
)
from rollout_stubs import (
    cut,
    generation_batch,
    make_rows,
)

from cppo.methods import METHODS
from cppo.methods.published import PUBLISHED
from cppo.methods.rewarded import REWARDED
from cppo.methods.reweighting import REWEIGHTING
from cppo.training import scoring


@pytest.fixture(scope="module")
def rows():
    """One image, two of different size, text only, one."""
    return make_rows([1, 2, 0, 1])


GIVEN = {"cppo-correct-gate": {"perception_gate_reward": "parity_reward"}, "cfpo": {"perception_weight": CFPO_WEIGHT}}


@pytest.fixture(scope="module")
def trainer_of(tiny, tmp_path_factory, rows):
    """A trainer in float64 by method and scorer, with drawn, not sampled rollouts."""

    @cache
    def make(method, scorer):
        folder = tmp_path_factory.mktemp("run")
        return float64_trainer(tiny, folder, rows, method=method, scorer=scorer, **GIVEN.get(method, {}))

    return make


@pytest.fixture(scope="module")
def seen(trainer_of, processor, rows):
    """The rollouts under a method's views, each set of views once."""
    trainer = trainer_of("grpo", "plain")

    @cache
    def under(views, own_views):
        return reference_rollouts(trainer.model, processor, rows, trainer.args.seed, views, own_views)

    return lambda method: under(VIEWS_OF.get(method, JITTER), method == "vppo")


def losses(trainer, rows, parts=1):
    """The step's loss, in this many micro-batches."""
    trainer.args.steps_per_generation = 1
    micro_batches = cut(trainer, generation_batch(trainer, rows), parts)
    trainer._score_before_updates(micro_batches)
    return [trainer._compute_loss(trainer.model, inputs) for inputs in micro_batches]


@pytest.mark.parametrize("scorer", ["plain", "shared"])
@pytest.mark.parametrize("method", TERMS)
def test_losses(trainer_of, seen, rows, method, scorer):
    (loss,) = losses(trainer_of(method, scorer), rows)
    rl = 0.0 if method == "cppo-cpl-only" else rl_loss(seen(method))
    term = TERMS[method](seen(method))
    assert loss.item() == pytest.approx(rl + term, abs=2e-7)
    assert method in ("grpo", "dapo") or abs(term) > 1e-4


@pytest.mark.parametrize("method", ["grpo", "cppo"])
def test_the_rl_weight_scales_trls_loss_alone_and_in_training_alone(trainer_of, seen, rows, monkeypatch, method):
    trainer, rl = trainer_of(method, "plain"), rl_loss(seen(method))
    monkeypatch.setattr(trainer.args, "rl_weight", 0.5)
    (loss,) = losses(trainer, rows)
    assert loss.item() == pytest.approx(0.5 * rl + TERMS[method](seen(method)), abs=2e-7)
    assert abs(rl) > 1e-3
    if method == "grpo":
        (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
        trainer.model.eval()
        assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(rl, abs=2e-7)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("scorer", ["plain", "shared"])
@pytest.mark.parametrize("scope", ["minibatch", "batch"])
def test_vppo(trainer_of, seen, rows, monkeypatch, scorer, parts, scope):
    trainer = trainer_of("vppo", scorer)
    monkeypatch.setattr(trainer.args, "perception_advantage_scope", scope)
    found = math.fsum(loss.item() for loss in losses(trainer, rows, parts))
    assert found == pytest.approx(vppo_loss(seen("vppo"), parts, together=scope == "batch"), abs=2e-7)


def test_vppo_compares_the_rollouts_of_one_optimizer_step(trainer_of, seen, rows):
    """Two steps per generation batch: the two prompts of the first step and the others are scaled separately."""
    trainer = trainer_of("vppo", "plain")
    trainer.args.steps_per_generation = 1
    micro_batches = cut(trainer, generation_batch(trainer, rows), 4, steps=2)
    trainer._shape_advantages(micro_batches)
    for step in (0, 1):
        rollouts = seen("vppo")[8 * step : 8 * (step + 1)]
        shaped = [row for inputs in micro_batches[2 * step : 2 * step + 2] for row in inputs["advantages"].tolist()]
        found = math.fsum(math.fsum(row[: r.tokens]) for row, r in zip(shaped, rollouts, strict=True))
        penalty = math.fsum(0.06 * mean(h for r in rollouts[i : i + 4] for h in r.surprisals) / 2 for i in (0, 4))
        expected = (penalty - vppo_loss(rollouts, 2)) * sum(r.tokens for r in rollouts)
        assert found == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_pgpo(trainer_of, seen, rows, scorer, parts):
    """Every token's advantage is the rollout's times the token's weight; at ratio 1 the loss is their mean."""
    trainer = trainer_of("pgpo", scorer)
    trainer.args.steps_per_generation = 1
    micro_batches = cut(trainer, generation_batch(trainer, rows), parts)
    trainer._shape_advantages(micro_batches)
    rollouts, weights = seen("pgpo"), pgpo_weights(seen("pgpo"))
    found = [row for inputs in micro_batches for row in inputs["advantages"].tolist()]
    for shaped, rollout, own in zip(found, rollouts, weights, strict=True):
        assert shaped[: rollout.tokens] == pytest.approx([rollout.advantage * weight for weight in own], abs=2e-6)
    loss = math.fsum(trainer._compute_loss(trainer.model, inputs).item() for inputs in micro_batches)
    assert loss == pytest.approx(rl_loss(rollouts), abs=2e-6)
    assert max(map(max, weights)) > 1.5


def test_every_methods_loss_is_compared():
    """Other methods have their own tests: shaped advantages, random tokens, other images.

    `test_reweighting.py` covers token-weighting methods; methods that bring rewards have GRPO's loss.
    """
    elsewhere = {"vppo", "pgpo", "cppo-random-tokens", "grpo+views", "noisyrollout", "saei"}
    assert METHODS.keys() - TERMS.keys() - REWEIGHTING.keys() - REWARDED.keys() == elsewhere
    assert {METHODS[name].options["perception_sink"] for name in REWARDED} == {"none"}


@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_the_entropy_under_the_preserving_view_counts_at_every_token(trainer_of, seen, rows, monkeypatch, scorer):
    """Also where only the selected tokens have a divergence."""
    trainer = trainer_of("cppo", scorer)
    monkeypatch.setattr(trainer.args, "perception_preserving_entropy_weight", 0.05)
    (loss,) = losses(trainer, rows)
    rollouts = seen("cppo")
    penalty = 0.05 * mean(mean(r.entropies[1]) for r in rollouts if r.gates["advantage"])
    assert loss.item() == pytest.approx(rl_loss(rollouts) + cppo(rollouts) + penalty, abs=2e-7)


PAPERS_FORM = {
    "perception_view_policy": "current",
    "perception_view_gradients": True,
    "entropy_estimator": "exact",
}


@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_the_form_of_papos_paper(trainer_of, seen, rows, monkeypatch, scorer):
    """Exact entropies and the same divergence; the masked image's pass also gets gradients."""
    trainer = trainer_of("papo", scorer)
    for name, value in PAPERS_FORM.items():
        monkeypatch.setattr(trainer.args, name, value)
    (loss,) = losses(trainer, rows)
    masked = [pair for r in seen("papo") if r.has_images for pair in zip(r.removing["k3"], r.entropies[2], strict=True)]
    expected = rl_loss(seen("papo")) + mean(-0.02 * d + 0.05 * h for d, h in masked)
    assert loss.item() == pytest.approx(
        expected + 0.05 * mean(h for r in seen("papo") for h in r.entropies[0]), abs=2e-7
    )


@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_papos_masked_image_is_scored_once_by_the_policy_of_the_rollouts(trainer_of, seen, processor, rows, scorer):
    """After an update, the mask's log-probabilities are still the earlier ones, without gradient."""
    trainer = trainer_of("papo-3b", scorer)
    trainer.args.steps_per_generation = 1
    (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
    trainer._score_before_updates([inputs])
    assert all(views in (None, {}) for views in inputs["perception_views"])
    before, weight = (
        seen("papo-3b"),
        next(p for n, p in trainer.model.named_parameters() if n.endswith("q_proj.weight")),
    )
    own = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.3)
    try:
        after = reference_rollouts(trainer.model, processor, rows, trainer.args.seed, VIEWS_OF["papo-3b"])
        terms, moved = [], 0.0
        for then, now in zip(before, after, strict=True):
            if now.has_images:
                logps = zip(then.removing["nll"], now.surprisals, strict=True)
                terms += [-0.02 * k3(-surprisal, -mask) for mask, surprisal in logps]
                moved += sum(abs(a - b) for a, b in zip(then.removing["nll"], now.removing["nll"], strict=True))
        loss = trainer._compute_loss(trainer.model, inputs)
        assert loss.item() == pytest.approx(rl_loss(after) + mean(terms), abs=2e-7)
        assert moved > 0.1
    finally:
        with torch.no_grad():
            weight.copy_(own)


def test_papos_gradient_takes_the_masked_image_for_a_constant(trainer_of, processor, rows):
    """Autograd in float64, rollout by rollout, with detached log-probabilities under the mask."""
    trainer = trainer_of("papo", "shared")
    (loss,) = losses(trainer, rows)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    total, masked, counts = 0.0, 0.0, [0, 0]
    for row in rows:
        images, _, removing = view_images(row, trainer.args.seed, VIEWS_OF["papo"])
        for completion, advantage, _ in drawn_rollouts(processor, row):
            place = list(range(len(completion)))
            logps = reference_logits(trainer.model, processor, row, images, completion).log_softmax(-1)[
                place, completion
            ]
            # The ratio is 1, so that the policy loss has the gradient of -A log pi; 0.05 is the entropy's weight.
            total = total - ((advantage + 0.05) * logps).sum()
            counts[0] += len(completion)
            if images:
                with torch.no_grad():
                    view = reference_logits(trainer.model, processor, row, removing, completion).log_softmax(-1)
                ratio = view[place, completion] - logps
                masked = masked - 0.02 * (ratio.exp() - ratio - 1).clamp(max=10).sum()
                counts[1] += len(completion)
    expected = torch.autograd.grad(total / counts[0] + masked / counts[1], trained, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-10


@pytest.mark.parametrize("scorer", ["plain", "shared"])
@pytest.mark.parametrize(
    ("method", "upper"), [("grpo", 1.2), ("dapo", 1.28), ("papo", 1.3), ("papo-dapo", 1.28), ("vppo", 1.28)]
)
def test_the_clip_of_ratios_beyond_it(trainer_of, rows, monkeypatch, method, upper, scorer):
    """Rollouts from an earlier policy: relative to ratio 1, the loss gains min(r A, clip(r) A) - A per token.

    A dual clip takes min(r, 3) instead of r.
    """
    trainer = trainer_of(method, scorer)
    (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
    trainer._score_before_updates([inputs])
    score, scored = trainer._get_per_token_logps_and_entropies, []

    def keep(*args, **kwargs):
        scored.append(score(*args, **kwargs))
        return scored[-1]

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", keep)
    at_one = trainer._compute_loss(trainer.model, inputs).item()
    mask = inputs["completion_mask"]
    ratios = torch.from_numpy(np.exp(np.random.default_rng(0).uniform(-0.6, 1.6, mask.shape)))
    highest = 3.0 if "delta" in METHODS[method].options else math.inf
    earlier = {**inputs, "old_per_token_logps": scored[0][0].detach() - ratios.log()}
    found = trainer._compute_loss(trainer.model, earlier).item() - at_one
    gains = []
    for row, kept in enumerate(mask.tolist()):
        advantages = torch.atleast_1d(inputs["advantages"][row]).tolist()
        for place in range(sum(kept)):
            advantage, ratio = advantages[place % len(advantages)], ratios[row, place].item()
            clipped = min(max(ratio, 0.8), upper)
            gains.append(min(min(ratio, highest) * advantage, clipped * advantage) - advantage)
    assert found == pytest.approx(-math.fsum(gains) / len(gains), abs=2e-7)
    assert abs(found) > 1e-3


@pytest.mark.parametrize("scorer", ["plain", "shared"])
@pytest.mark.parametrize("method", ["vppo", "pgpo"])
def test_metrics_of_shaped_advantages(trainer_of, seen, rows, method, scorer):
    """The share of the selected tokens, and the mean dependency of rollouts with an image."""
    trainer = trainer_of(method, scorer)
    trainer._metrics["train"].clear()
    losses(trainer, rows, 4)
    shown = [r for r in seen(method) if r.has_images]
    selected = [math.ceil(0.4 * r.tokens) if method == "vppo" else r.tokens for r in shown]
    expected = {
        "selected_fraction": sum(selected) / sum(r.tokens for r in shown),
        "dependency": mean(mean(r.removing["k3"]) for r in shown),
    }
    for name, value in expected.items():
        assert trainer._metrics["train"][f"perception/{name}"] == [pytest.approx(value, rel=1e-6)], name


@pytest.mark.parametrize("scorer", ["plain", "shared"])
def test_random_tokens_are_as_many_and_drawn_from_all(trainer_of, seen, rows, scorer):
    trainer = trainer_of("cppo-random-tokens", scorer)
    batch = generation_batch(trainer, rows)
    draws = batch["perception_draws"].tolist()
    rollouts = seen("cppo")
    published = {id(r): chosen_tokens(r.scores["entropy_shift"], 0.5) for r in rollouts}
    chosen = {id(r): best(draws[i][: r.tokens], len(published[id(r)])) for i, r in enumerate(rollouts)}
    term = cppo(rollouts, places=lambda r: chosen[id(r)])
    (inputs,) = cut(trainer, batch, 1)
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(rl_loss(rollouts) + term, abs=2e-7)
    assert any(set(chosen[id(r)]) != set(published[id(r)]) for r in rollouts if r.has_images)


@pytest.mark.parametrize(
    "method",
    [
        "cppo-async",
        "papo",
        "dvrp",
        "vppo",
        "pgpo",
        "cppo-positive-only",
        "cppo-negative-only",
        "cppo-cpl-only",
        "cppo-likelihood",
        "cppo-likelihood-all-tokens",
    ],
)
def test_the_shared_path_has_the_plain_gradients(trainer_of, rows, method):
    gradients = []
    for scorer in ("plain", "shared"):
        trainer = trainer_of(method, scorer)
        loss = sum(losses(trainer, rows, 2))
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    plain, shared = gradients
    assert plain.norm() > 1e-3
    assert (plain - shared).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("method", [name for name in PUBLISHED if name not in ("cppo", "grpo", "papo-3b")])
def test_training(make_trainer, method):
    """Real rollouts and three optimizer steps."""
    trainer = make_trainer(make_rows([1, 1, 0, 2]), method=method, max_steps=3, max_completion_length=6)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    logged = trainer.state.log_history[0]
    has_term = METHODS[method].options["perception_sink"] != "none"
    assert ("perception/selected_fraction" in logged) == has_term


def test_whole_logits_are_kept_only_for_a_score_that_is_taken(trainer_of):
    methods = ("cppo", "cppo-likelihood", "cppo-likelihood-all-tokens")
    assert [trainer_of(method, "shared").args.needs_logits for method in methods] == [False, True, False]


def test_scores_without_entropies_take_no_whole_logits(make_trainer, monkeypatch):
    """Those of the reference and the old policy; the exact divergence needs the policy's own."""
    seen = []
    plain = scoring.plain_scores
    monkeypatch.setattr(scoring, "plain_scores", lambda *args: seen.append(1) or plain(*args))
    trainer = make_trainer(make_rows([1, 1]), scorer="kernel", perception_divergence="js", beta=0.1, max_steps=1)
    batch = generation_batch(trainer, make_rows([1, 1]))
    assert "ref_per_token_logps" in batch
    assert not seen
    trainer._compute_loss(trainer.model, cut(trainer, batch, 1)[0])
    assert seen


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("cppo", {"removing", "preserving"}),
        ("papo", {"removing"}),
        ("vppo", {"removing"}),
        ("pgpo", {"removing"}),
        ("cfpo", {"removing"}),
        ("dvrp", None),
        ("cppo-likelihood", None),
        ("cppo-likelihood-all-tokens", {"preserving"}),
    ],
)
def test_only_the_views_that_count_are_processed(trainer_of, rows, method, kinds):
    batch = generation_batch(trainer_of(method, "plain"), rows)
    made = [set(views) for views in batch["perception_views"] if views is not None]
    assert made
    assert all(views == (kinds or {"removing", "preserving"}) for views in made)
