"""The trainer's perception term against a float64 reference: one rollout and view at a time, no padding, loops."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from float64_reference import (
    DIVERGENCES,
    GROUP,
    SCORES,
    TAU,
    TEMPERATURE,
    TOP_FRACTION,
    chosen_tokens,
    reference_gradient,
    reference_rollouts,
    reference_term,
)
from rollout_stubs import (
    build_trainer,
    cut,
    generation_batch,
    inject,
    make_rows,
    parity_reward,
    term_of,
    token_reward,
)

from cppo.perception import ResponseScores, ViewScores, detect

OPTIONS = {
    "reward_funcs": [token_reward, parity_reward],
    "temperature": TEMPERATURE,
    "perception_temperature": TAU,
    "perception_top_fraction": TOP_FRACTION,
    "perception_gate_reward": "parity_reward",
}


@pytest.fixture(scope="module")
def rows():
    """One image, two of different size, text only, one."""
    return make_rows([1, 2, 0, 1])


@pytest.fixture(scope="module", params=[False, True], ids=["unshared", "shared"])
def sharing(request):
    """Whether prompts and images are shared in a group; every test here covers both."""
    return request.param


@pytest.fixture(scope="module")
def exact(tiny, tmp_path_factory, rows, sharing):
    """A trainer in float64, with the plain scorer or with shared prompts."""
    scorer = "shared" if sharing else "plain"
    trainer = build_trainer(tiny, tmp_path_factory.mktemp("exact"), rows, scorer=scorer, **OPTIONS)
    trainer.model.double()
    assert trainer._shares_prompts == sharing
    return inject(trainer, same_each_time=True)


@pytest.fixture(scope="module")
def quick(tiny, tmp_path_factory, rows, sharing):
    """A trainer in float32, with TRL's kernel or with shared prompts."""
    scorer = "shared" if sharing else "kernel"
    trainer = build_trainer(tiny, tmp_path_factory.mktemp("quick"), rows, scorer=scorer, **OPTIONS)
    return inject(trainer, same_each_time=True)


@pytest.fixture(scope="module")
def reference(exact, processor, rows):
    return reference_rollouts(exact.model, processor, rows, exact.args.seed)


@pytest.fixture(autouse=True)
def _published_options(exact, quick):
    for trainer in (exact, quick):
        trainer.pad_to_multiple_of = None
        for name, value in (("score", "entropy_shift"), ("divergence", "k3"), ("gate", "advantage")):
            setattr(trainer.args, f"perception_{name}", value)
        trainer.args.perception_normalization, trainer.args.perception_temperature = "rollout", TAU
        trainer.args.perception_view_gradients = trainer.args.perception_anchor_gradients = True
        trainer.args.perception_rollouts_per_group = None


def total_term(trainer, batch, parts=1):
    return sum(term_of(trainer, inputs).item() for inputs in cut(trainer, batch, parts))


def test_the_example_is_worth_testing(reference):
    """Every gate passes some rollouts and stops others; margins and selections are not trivial."""
    for gate in ("advantage", "correct"):
        open_gates = [rollout.gates[gate] for rollout in reference if rollout.has_images]
        assert 2 <= sum(open_gates) < len(open_gates)
    for score in SCORES:
        chosen = [chosen_tokens(rollout.scores[score]) for rollout in reference if rollout.has_images]
        assert len({len(places) for places in chosen} - {0}) >= 2
        assert any(sorted(places) != list(range(len(places))) for places in chosen)
    terms = {name: reference_term(reference, divergence=name) for name in DIVERGENCES}
    assert all(abs(term - math.log(2)) > 1e-3 for term in terms.values())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("score", SCORES)
def test_scores_and_divergences(exact, reference, rows, score, divergence):
    exact.args.perception_score, exact.args.perception_divergence = score, divergence
    term = total_term(exact, generation_batch(exact, rows))
    assert term == pytest.approx(reference_term(reference, score, divergence), abs=1e-7)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("entropy_shift", [1 / 2, 1 / 3, 0.0]),
        ("entropy_shift_absolute", [1.0, 1.5, 0.0]),
        ("logp_shift", [0.0, 0.25, 2.0]),
    ],
)
def test_scores_that_rank_tokens_differently(score, expected):
    """Entropies 1, 3, 4 become 2, 4.5, 3.5 under I-; the tokens' log-probabilities change by +1, -0.25, -2."""
    anchor = ResponseScores(torch.tensor([[-3.0, -2.0, -1.0]]), torch.tensor([[1.0, 3.0, 4.0]]))
    removing = ResponseScores(torch.tensor([[-2.0, -2.25, -3.0]]), torch.tensor([[2.0, 4.5, 3.5]]))
    args = SimpleNamespace(
        perception_score=score,
        perception_top_fraction=0.5,
        perception_top_rounding="floor",
        perception_selector="top_positive",
        perception_selector_scope="rollout",
    )
    found = detect(ViewScores(anchor, removing, None, torch.ones(1, 3)), args)
    assert found.score[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.token_mask[0].tolist() == [value == max(expected) for value in expected]


@pytest.mark.parametrize("gate", ["advantage", "correct", "none"])
@pytest.mark.parametrize("normalization", ["rollout", "token", "microbatch"])
@pytest.mark.parametrize("parts", [1, 8])
def test_gates_and_normalizations(exact, reference, rows, gate, normalization, parts):
    exact.args.perception_gate, exact.args.perception_normalization = gate, normalization
    term = total_term(exact, generation_batch(exact, rows), parts)
    options = {"gate": gate, "normalization": normalization}
    assert term == pytest.approx(reference_term(reference, **options, parts=parts), abs=1e-7)
    if parts == 8 and normalization == "microbatch":
        assert abs(term - reference_term(reference, **options)) > 1e-3


def test_a_generation_batch_that_serves_two_steps(exact, reference, rows):
    """Equal parts of its mean over rollouts for each step; the mean over the step's own tokens."""
    micro_batches = cut(exact, generation_batch(exact, rows), 4, steps=2)
    total = math.fsum(term_of(exact, inputs).item() for inputs in micro_batches)
    assert total == pytest.approx(2 * reference_term(reference), abs=1e-7)
    exact.args.perception_normalization = "token"
    for first in (0, 2):
        exact._step, exact._step_tokens = 4 + first, None  # the steps of the second generation batch
        term = math.fsum(term_of(exact, inputs).item() for inputs in micro_batches[first : first + 2])
        own = reference[first * GROUP : (first + 2) * GROUP]
        assert term == pytest.approx(reference_term(own, normalization="token"), abs=1e-7)


@pytest.mark.parametrize("gate", ["advantage", "none"])
@pytest.mark.parametrize("parts", [1, 8])
def test_a_bounded_number_of_rollouts_a_group(exact, reference, rows, gate, parts):
    """The m drawn of a group's k are scored, each with weight k / m."""
    exact.args.perception_gate, exact.args.perception_rollouts_per_group = gate, 1
    term_at = {i: reference_term([r], gate="none") for i, r in enumerate(reference) if r.gates["none"]}
    groups = [range(start, start + GROUP) for start in range(0, len(reference), GROUP)]
    gated = [[i for i in group if reference[i].gates[gate]] for group in groups]
    drawn = set()
    for step in range(6):
        exact._step = step * exact.args.steps_per_generation
        batch = generation_batch(exact, rows)
        chosen = [i for i, views in enumerate(batch["perception_views"]) if views is not None]
        expected = 0.0
        for group in gated:
            mine = [i for i in group if i in chosen]
            assert len(mine) == min(1, len(group))
            expected += sum(term_at[i] for i in mine) * len(group) / max(len(mine), 1)
        assert total_term(exact, batch, parts) == pytest.approx(expected / sum(map(len, gated)), abs=1e-7)
        assert exact._metrics["train"]["perception/gated_fraction"][-1] == sum(map(len, gated)) / len(reference)
        drawn.add(tuple(chosen))
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("name", "normalization", "tolerance"),
    [("exact", "rollout", 1e-7), ("exact", "token", 1e-7), ("quick", "rollout", 1e-5), ("quick", "token", 1e-5)],
)
def test_padding_order_and_text_only_rows_change_nothing(request, reference, rows, name, normalization, tolerance):
    trainer = request.getfixturevalue(name)
    trainer.args.perception_normalization, trainer.args.perception_temperature = normalization, 0.1
    term = total_term(trainer, generation_batch(trainer, rows))
    expected = reference_term(reference, normalization=normalization, tau=0.1)
    assert term == pytest.approx(expected, abs=tolerance, rel=1e-4 if name == "quick" else 0)
    changed = {
        "order": total_term(trainer, generation_batch(trainer, [rows[i] for i in (3, 2, 0, 1)])),
        "without text": total_term(trainer, generation_batch(trainer, [rows[i] for i in (0, 1, 3)])),
        "more text": total_term(trainer, generation_batch(trainer, rows + make_rows([0, 0], first=8)), 2),
    }
    trainer.pad_to_multiple_of = 64
    batch = generation_batch(trainer, rows)
    assert batch["completion_ids"].shape[1] == batch["prompt_ids"].shape[1] == 64
    changed["padding"] = total_term(trainer, batch)
    assert changed == pytest.approx(dict.fromkeys(changed, term), abs=tolerance)


@pytest.mark.parametrize("view_gradients", [True, False])
def test_metrics(exact, reference, rows, view_gradients):
    exact.args.perception_view_gradients = view_gradients
    exact._metrics["train"].clear()
    (inputs,) = cut(exact, generation_batch(exact, rows), 1)
    exact._perception_means.take(exact.accelerator)
    exact._compute_loss(exact.model, inputs)
    found = exact._perception_means.take(exact.accelerator)
    gated = [rollout for rollout in reference if rollout.gates["advantage"]]
    tokens = sum(len(rollout.scores["kl"]) for rollout in gated)
    chosen = [(rollout, place) for rollout in gated for place in chosen_tokens(rollout.scores["entropy_shift"])]
    preserving = [rollout.preserving["k3"][place] for rollout, place in chosen]
    removing = [rollout.removing["k3"][place] for rollout, place in chosen]
    losses = [math.log1p(math.exp((a - b) / TAU)) for a, b in zip(preserving, removing, strict=True)]
    entropies = [
        math.fsum(rollout.entropies[view][place] for rollout, place in chosen) / len(chosen) for view in range(3)
    ]
    expected = {
        "gated_fraction": len(gated) / len(reference),
        "selected_fraction": len(chosen) / tokens,
        "cpl": math.fsum(losses) / len(chosen),
        "d_preserving": math.fsum(preserving) / len(chosen),
        "d_removing": math.fsum(removing) / len(chosen),
        "entropy": entropies[0],
        "entropy_preserving": entropies[1],
        "entropy_removing": entropies[2],
    }
    (found["gated_fraction"],) = exact._metrics["train"]["perception/gated_fraction"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_tokens_of_a_tool_are_never_selected(exact, reference, rows):
    batch = generation_batch(exact, rows)
    batch["tool_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["tool_mask"][:, 1::2] = 1
    own = [
        replace(
            rollout,
            scores={
                name: [score if place % 2 else 0.0 for place, score in enumerate(scores)]
                for name, scores in rollout.scores.items()
            },
        )
        for rollout in reference
    ]
    term = total_term(exact, batch)
    assert term == pytest.approx(reference_term(own), abs=1e-7)
    assert abs(term - reference_term(reference)) > 1e-3


@pytest.mark.parametrize(("name", "tolerance"), [("exact", 1e-6), ("quick", 1e-4)])
def test_gradients_through_image_and_views(request, exact, processor, rows, name, tolerance):
    trainer = request.getfixturevalue(name)
    gradients = []
    for flows in ((True, True), (True, False), (False, True)):
        expected, used = reference_gradient(exact.model, processor, rows, exact.args.seed, *flows)
        trainer.args.perception_anchor_gradients, trainer.args.perception_view_gradients = flows
        (inputs,) = cut(trainer, generation_batch(trainer, rows), 1)
        parameters = [p for p, use in zip(trainer.model.parameters(), used, strict=True) if use]
        grads = torch.autograd.grad(term_of(trainer, inputs), parameters)
        gradient = torch.cat([grad.flatten() for grad in grads]).double()
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()
    assert (gradients[0] - gradients[1] - gradients[2]).norm() <= tolerance * gradients[0].norm()
