"""Views that rollouts are made from: the rollouts that see them, the draws, and the fading noise."""

import math

import numpy as np
import pytest
import torch
from rollout_stubs import drawn_completions, generation_batch, make_rows

from cppo.training.rollouts import GenerationBatch
from cppo.training.view_maker import RolloutViews, shown_image
from cppo.views import ViewStrengths


def test_half_of_a_group_sees_noise_and_the_update_does_not(make_trainer, monkeypatch):
    rows = make_rows([1, 2])
    shown = {}
    for method in ("grpo", "noisyrollout"):
        trainer = make_trainer(rows, method=method, folder=method)
        trainer.state.max_steps = 3
        images = watch_images(trainer, monkeypatch)
        shown[method] = images, generation_batch(trainer, rows)
    clean, noisy = shown["grpo"], shown["noisyrollout"]
    for own, other in zip(clean[1]["prompt_images"], noisy[1]["prompt_images"], strict=True):
        assert torch.equal(own["pixel_values"], other["pixel_values"])
    for place, (own, seen) in enumerate(zip(clean[0], noisy[0], strict=True)):
        changed = [a.tobytes() != b.tobytes() for a, b in zip(own, seen, strict=True)]
        assert changed == [place % 4 >= 2] * len(own)
        assert [image.size for image in own] == [image.size for image in seen]
    assert [image.tobytes() for image in noisy[0][2]] == [image.tobytes() for image in noisy[0][3]]


def test_the_noise_is_gone_at_the_end(make_trainer, monkeypatch):
    """At two thirds of the run half of the 500 steps are left, in its last batch none: the images are the rows' own."""
    rows = make_rows([1, 2])
    clean = make_trainer(rows, method="grpo", folder="grpo")
    own = watch_images(clean, monkeypatch)
    generation_batch(clean, rows)
    trainer = make_trainer(rows, method="noisyrollout", max_steps=3)
    seen = watch_images(trainer, monkeypatch)
    distances = []
    for step in (0, 1, 2):
        seen.clear()
        trainer.state.max_steps, trainer.state.global_step = 3, step
        generation_batch(trainer, rows)
        pairs = [(a[0], b[0]) for a, b in zip(own, seen, strict=True)]
        distances.append(max(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs))
    assert distances[0] > distances[1] > 5
    assert distances[2] == 0


def test_augmented_prompts_show_the_view_in_rollouts_and_update(make_trainer, monkeypatch):
    rows = make_rows([1] * 8)
    own = make_trainer(rows, method="grpo", folder="grpo")
    images_of = watch_images(own, monkeypatch)
    clean = generation_batch(own, rows)
    trainer = make_trainer(rows, method="grpo+views", folder="views")
    shown = watch_images(trainer, monkeypatch)
    batch = generation_batch(trainer, rows)
    changed = [a[0].tobytes() != b[0].tobytes() for a, b in zip(images_of, shown, strict=True)]
    assert changed == [changed[place - place % 4] for place in range(32)]
    assert 1 <= sum(changed[::4]) <= 7
    pixels = zip(clean["prompt_images"], batch["prompt_images"], strict=True)
    assert [not torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in pixels] == changed
    # A pure function of seed, row and epoch: another trainer shows the same.
    again = make_trainer(rows, method="grpo+views", folder="again")
    shown_again = watch_images(again, monkeypatch)
    generation_batch(again, rows)
    assert [a[0].tobytes() for a in shown] == [b[0].tobytes() for b in shown_again]


def noisy(fraction, seed=1):
    return RolloutViews(seed, ["diffusion_noise"], ViewStrengths(), fraction)


def rollouts(rows, group_size=1, first=0):
    return GenerationBatch.of(rows, first, group_size, alone=False)


def changed_rows(views, rows, epoch=0):
    """The rows that `augmented` changes."""
    shown = views.augmented(rollouts(rows), epoch, 0.0)
    return [new["images"] != old["images"] for new, old in zip(shown, rows, strict=True)]


def mixed_images(views, rows, group_size, epoch=0, first=0):
    """The images that each rollout of `mixed` is made from."""
    shown = views.mixed(rollouts(rows, group_size, first), group_size, epoch, 0.0)
    return [[shown_image(image) for image in row["images"]] for row in shown]


def test_the_fraction_is_that_of_the_views():
    rows = make_rows([2]) * 8
    own = rows[0]["images"]
    assert [seen != own for seen in mixed_images(noisy(0.25), rows, 4)] == [False, False, False, True] * 2
    assert [seen != own for seen in mixed_images(noisy(0.25), rows[:4], 4, first=2)] == [False, True, False, False]
    # Four standard deviations of 160 draws with probability 1/4 are 22.
    assert abs(sum(changed_rows(noisy(0.25), make_rows([1] * 160))) - 40) <= 22


def test_rollout_views_are_drawn_by_seed_epoch_and_place_of_the_image():
    (row,) = make_rows([1])
    twice = [{**row, "images": row["images"] * 2}]

    def augmented(seed, epoch):
        return noisy(1.0, seed).augmented(rollouts(twice), epoch, 0.0)[0]["images"]

    def mixed(seed, epoch):
        return mixed_images(noisy(1.0, seed), twice, 1, epoch)[0]

    for shown in (augmented, mixed):
        pictures = [image.tobytes() for key in ((1, 0), (2, 0), (1, 1)) for image in shown(*key)]
        assert len(set(pictures)) == 6
        assert [image.tobytes() for image in shown(1, 0)] == pictures[:2]
    rows = make_rows([1] * 40)
    chosen = [changed_rows(noisy(0.5, seed), rows, epoch) for seed, epoch in ((1, 0), (2, 0), (1, 1))]
    assert chosen[0] not in chosen[1:]
    assert chosen[1] != chosen[2]


def watch_images(trainer, monkeypatch):
    """Record the images that TRL's generation gets, and draw the completions.

    vLLM takes the images, transformers the processor's output; both get the same.
    """
    seen = []

    def generate(self, prompt_ids, images, multimodal_fields, *rest, **more):
        if self is trainer:
            seen.extend(images)
            flat = [image for row_images in images for image in row_images]
            processed = self.processing_class.image_processor(flat, return_tensors="pt")
            assert torch.equal(multimodal_fields["pixel_values"], processed["pixel_values"])
        return drawn_completions(prompt_ids), None

    monkeypatch.setattr("trl.GRPOTrainer._generate_single_turn", generate)
    return seen


@pytest.mark.parametrize(("steepness", "midpoint"), [(30.0, 40 / 60), (10.0, 0.5)])
def test_the_noise_fades_as_published(steepness, midpoint):
    """floor(500 (1 - sigmoid(steepness (t / 60 - midpoint)))) at step t of 60: NoisyRollout's, and DVRP's."""
    strengths = ViewStrengths(diffusion_steps=500, diffusion_decay=(steepness, midpoint))
    for t in range(1, 61):
        left = math.floor(500 * (1 - 1 / (1 + math.exp(-steepness * (t / 60 - midpoint)))))
        assert strengths.at(t / 60).diffusion_steps == left
    assert strengths.at(midpoint).diffusion_steps == 250
    assert ViewStrengths(diffusion_steps=500).at(0.9).diffusion_steps == 500


def test_progress_counts_generation_batches_from_one(make_trainer):
    """Of 60 optimizer steps, with one step a batch: the batch after 39 steps is the 40th. With four, batch 10 of 15."""
    for steps, iterations, done, progress in ((1, 1, 39, 40 / 60), (1, 1, 59, 1.0), (2, 2, 36, 40 / 60)):
        options = {"steps_per_generation": steps, "num_iterations": iterations, "gradient_accumulation_steps": 1}
        trainer = make_trainer(make_rows([1] * 4), method="noisyrollout", folder=f"{done}", **options)
        trainer.state.max_steps = 60
        assert trainer._progress(done) == progress
    strengths = trainer.args.view_sampler().strengths
    assert strengths.at(40 / 60).diffusion_steps == 250
