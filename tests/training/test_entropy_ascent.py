"""The view that depends on the policy: closed forms, a rise of the entropy, and the rollouts that see it."""

import math

import pytest
import torch
from rollout_stubs import build_trainer, generation_batch, make_rows

from cppo import CPPOConfig
from cppo.errors import UserError
from cppo.perception import entropy_from_logits
from cppo.policy.ascent import PixelSteps, ascended, band_entropy
from cppo.training import generation


def entropy_at(x):
    """Entropy of a token with the logits (x, 0), by hand."""
    p = 1 / (1 + math.exp(-x))
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def one_token(band):
    """The objective of one rollout of one token, with the pixel and 0 as logits."""

    def entropy(pixel):
        logits = torch.stack([pixel, torch.zeros_like(pixel)], dim=-1)
        return band_entropy(entropy_from_logits(logits), torch.ones(1, 1), band)

    return entropy


@pytest.mark.parametrize("x", [1.0, -1.0])
def test_a_sign_step_raises_the_entropy_of_two_logits(x):
    pixel, whole = torch.full((1, 1), x, dtype=torch.float64), one_token([0.0, 1.0])
    moved = PixelSteps(1, 0.1, 1.0).taken(pixel, whole)
    assert moved.item() == pytest.approx(0.9 * x, abs=1e-12)
    found = [whole(pixel).item(), whole(moved).item()]
    assert found == [pytest.approx(0.5822, abs=5e-5), pytest.approx(0.6013, abs=5e-5)]
    assert found == [pytest.approx(entropy_at(x)), pytest.approx(entropy_at(0.9 * x))]
    leaf = pixel.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(whole(leaf), leaf)
    assert gradient.item() == pytest.approx(-0.1966 * x, abs=5e-5)


@pytest.mark.parametrize("direction", ["sign", "normalized"])
def test_an_empty_band_leaves_every_pixel(direction):
    pixel = torch.full((1, 1), 1.0)
    assert torch.equal(PixelSteps(2, 0.1, 1.0, direction).taken(pixel, one_token([0.5, 0.5])), pixel)


def test_steps_stay_within_the_bound():
    pixel = torch.full((1, 1), 1.0, dtype=torch.float64)
    moved = [PixelSteps(steps, 0.1, 0.25).taken(pixel, one_token([0.0, 1.0])).item() for steps in (1, 2, 3, 9)]
    assert moved == [pytest.approx(value) for value in (0.9, 0.8, 0.75, 0.75)]


def test_a_normalized_step_has_the_gradients_ratios():
    pixels = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    moved = PixelSteps(1, 0.1, 1.0, "normalized").taken(pixels, lambda x: (x * torch.tensor([4.0, 3.0])).sum())
    size = math.sqrt((16 + 9) / 2)
    assert (moved - pixels).tolist() == [[pytest.approx(0.4 / size), pytest.approx(0.3 / size)]]


def test_the_band_is_of_each_rollouts_own_tokens():
    entropies, mask = torch.tensor([[0.4, 0.1, 0.3, 0.2, 9.0], [1.0, 2.0, 0.0, 0.0, 0.0]]), torch.ones(2, 5)
    mask[0, 4] = mask[1, 2:] = 0
    assert band_entropy(entropies, mask, [0.25, 0.75]).item() == pytest.approx(((0.2 + 0.3) / 2 + 2.0) / 2)


@pytest.fixture
def watched(tiny, tmp_path, monkeypatch):
    """The calls of `generate` and of `ascended` in a method's generation batch, and the batch."""

    def watch(method, rows, **given):
        trainer = build_trainer(tiny, tmp_path / method / str(len(given)), rows, method=method, **given)
        calls, views = [], []
        run = trainer._policy.generate

        def watched_ascent(*args):
            after = ascended(*args)
            views.append((args, args[4]["pixel_values"], after["pixel_values"]))
            return after

        def generate(**inputs):
            calls.append(inputs)
            return run(**inputs)

        monkeypatch.setattr(generation, "ascended", watched_ascent)
        monkeypatch.setattr(trainer._policy, "generate", generate)
        return trainer, calls, views, generation_batch(trainer, rows)

    return watch


@pytest.mark.parametrize("scorer", ["shared", "plain"])
def test_half_of_a_group_is_made_from_the_view_and_the_update_is_not(watched, scorer):
    """Text alone has no view, but still gets rollouts."""
    rows = make_rows([1, 0, 2])
    trainer, calls, views, batch = watched("saei", rows, scorer=scorer, view_ascent_step=0.01, view_ascent_bound=0.02)
    assert [len(inputs["input_ids"]) for inputs in calls] == [6, 6]
    assert len(views) == 2
    seen = []
    for args, before, after in views:
        change = (after - before).abs()
        assert change.max() == pytest.approx(0.01, abs=1e-6)
        assert change.ne(0).float().mean() > 0.9
        seen.append(after)
        # The entropy that the step must raise has risen.
        at = [entropy_of(args, pixels) for pixels in (before, after)]
        assert at[1] > at[0] + 1e-5
    shown = calls[1]["pixel_values"]
    expected = torch.cat([seen[0], seen[0], seen[1], seen[1]])
    torch.testing.assert_close(shown, expected, rtol=0, atol=0)
    clean = watched("grpo", rows, scorer=scorer)[3]
    key = "prompt_images" if scorer == "shared" else "pixel_values"
    if scorer == "shared":
        for own, other in zip(batch[key], clean[key], strict=True):
            assert own.keys() == other.keys()
            assert all(torch.equal(own[name], other[name]) for name in own)
    else:
        assert torch.equal(batch[key], clean[key])
    assert batch["completion_ids"].shape[0] == 12
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("scorer", ["shared", "plain"])
def test_a_step_follows_the_gradient_of_each_rollouts_own_pass(watched, scorer):
    """In float64: one rollout at a time without padding, its entropies, and their band by sorting."""
    _, _, views, _ = watched("saei", make_rows([2]), scorer=scorer)
    ((model, ids, mask, length, vision, _, band, temperature, shares), _, _) = views[0]
    model.double()
    mask[0, -(length // 2) :] = 0  # a shorter response
    vision = {**vision, "pixel_values": vision["pixel_values"].double()}
    step = PixelSteps(1, 0.5, 1e6, "normalized")
    after = ascended(model, ids, mask, length, vision, step, band, temperature, shares)
    pixels, means = vision["pixel_values"].clone().requires_grad_(), []
    for row, kept in zip(ids, mask.bool(), strict=True):
        own, tokens = row[kept][None], int(kept[-length:].sum())
        kinds = (own == model.config.image_token_id).long()
        shown = {"pixel_values": pixels, "image_grid_thw": vision["image_grid_thw"], "mm_token_type_ids": kinds}
        logps = (model(input_ids=own, **shown).logits[0, -tokens - 1 : -1] / temperature).log_softmax(dim=-1)
        entropies = -(logps.exp() * logps).sum(dim=-1)
        order = sorted(range(tokens), key=entropies.tolist().__getitem__)
        chosen = [t for rank, t in enumerate(order) if band[0] * tokens <= rank < band[1] * tokens]
        assert 0 < len(chosen) < tokens
        means.append(sum(entropies[t] for t in chosen) / len(chosen))
    (gradient,) = torch.autograd.grad(sum(means) / len(means), pixels)
    expected = 0.5 * gradient / gradient.square().mean().sqrt()
    assert (after["pixel_values"] - vision["pixel_values"] - expected).norm() <= 1e-5 * expected.norm()


def entropy_of(args, pixels):
    """H under these pixels, by `ascended` itself, which takes no step and keeps its last value."""
    kept = []

    class Watching(PixelSteps):
        def taken(self, own, objective):
            kept.append(objective(own).item())
            return own

    model, ids, mask, length, vision, _, *rest = args
    shown = {**vision, "pixel_values": pixels}
    ascended(model, ids, mask, length, shown, Watching(1, 0.0, 0.0), *rest)
    return kept[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rollout_views": ["entropy_ascent", "rotation"]}, "must be the only family in the list"),
        ({"rollout_views": ["entropy_ascent"]}, "set rollout_view_mode = 'mix'"),
        ({"method": "saei", "view_ascent_band": [0.8, 0.2]}, "give two quantiles, [low, high]"),
        ({"method": "saei", "use_transformers_continuous_batching": True}, "set it false"),
        (
            {"method": "saei", "use_vllm": True, "vllm_importance_sampling_correction": False},
            "which use_vllm = true does not allow",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, given, words):
    with pytest.raises(UserError) as caught:
        CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    assert words in str(caught.value)


def test_groups_that_processes_share_are_refused(tmp_path, monkeypatch):
    """Before a model loads. Two processes with half a group each, or with whole groups at every second step."""
    monkeypatch.setattr(CPPOConfig, "world_size", 2)
    given = {"use_cpu": True, "bf16": False, "method": "saei", "per_device_train_batch_size": 4, "num_generations": 8}
    with pytest.raises(UserError, match=r"makes 4 x 1 rollouts at once: .* a multiple of num_generations = 8"):
        CPPOConfig(str(tmp_path), **given)
    with pytest.raises(UserError, match=r"makes 4 x 3 rollouts at once"):
        CPPOConfig(str(tmp_path), steps_per_generation=3, **given, gradient_accumulation_steps=3)
    assert CPPOConfig(str(tmp_path), steps_per_generation=2, **given).method == "saei"
    assert CPPOConfig(str(tmp_path), **{**given, "method": "noisyrollout"}).method == "noisyrollout"


def test_a_tower_without_gradient_is_refused(make_trainer):
    with pytest.raises(UserError, match="a gradient through the vision tower, but nothing in it is trained"):
        make_trainer(make_rows([1, 1]), method="saei", freeze_vision_tower=True)
