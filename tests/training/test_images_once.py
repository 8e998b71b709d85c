"""Equal images of a call are processed once, with unchanged results."""

import numpy as np
import pytest
import torch
from pixel_moves import PixelMoves
from rollout_stubs import generation_batch, inject, make_rows, picture
from tiny_families import build_processor

from cppo.policy.images_once import images_once


@pytest.fixture
def seen(monkeypatch):
    """Records each image that an image processor of this type converts to a tensor."""

    def watch(processor):
        images, kind = [], type(processor.image_processor)
        original = kind.process_image
        monkeypatch.setattr(
            kind, "process_image", lambda self, image, **given: images.append(image) or original(self, image, **given)
        )
        return images

    return watch


def processed(processor, images):
    mark = processor.image_token
    text = ["".join(f"<|vision_start|>{mark}<|vision_end|>" for _ in row) + "what" for row in images]
    return processor(images=images, text=text, padding=True, return_tensors="pt")


def test_equal_images_are_processed_once_and_come_out_alike(processor, seen):
    """Equal by their pixels; sizes differ, and rows have one image or two."""
    one, other, wide = picture(1), picture(2), picture(3, 48, 32)
    images = [[one], [wide, one.copy()], [other], [one], [wide.copy(), other]]
    expected = processed(processor, images)
    count = seen(processor)
    with images_once(processor):
        found = processed(processor, images)
    assert len(count) == 3
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "preprocess" not in vars(processor.image_processor)


def test_other_images_and_other_processors_are_left_alone(processor, seen):
    count = seen(processor)
    with images_once(processor):
        processed(processor, [[np.asarray(picture(1))], [np.asarray(picture(1))]])
    assert len(count) == 2
    other = build_processor("llava")
    with images_once(other):
        assert "preprocess" not in vars(other.image_processor)


def test_a_generation_batch_processes_each_group_once(make_trainer, processor, seen):
    """TRL processes the prompts twice, to generate and to score; the views of each image are additional."""
    rows = make_rows([1, 2])
    trainer = inject(make_trainer(rows, perception_gate="none"))
    count = seen(processor)
    generation_batch(trainer, rows)
    assert len(count) == 2 * 3 + 2 * 3


@pytest.mark.parametrize("shares", [True, False], ids=["prompts prefilled once", "each prefilled"])
@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["generated", "and scored by a reference"])
def test_pixels_come_to_the_device_with_the_rollouts_that_need_them(make_trainer, shares, beta):
    rows = make_rows([1, 2])
    options = {"per_device_generation_batch_size": 4, "per_device_train_batch_size": 2, "steps_per_generation": 4}
    options["gradient_accumulation_steps"] = 4  # so that no old log-probabilities are needed
    trainer = make_trainer(rows, method="grpo", beta=beta, **options)
    trainer._shares_rollouts = shares
    patch = trainer.model.model.visual.patch_embed.proj.weight[0].numel()
    with PixelMoves(patch) as moves:
        generation_batch(trainer, rows)
    # Of 32 x 32 and 48 x 32 pixels in patches of 8: 16 and 24. Both groups of 4 are scored 2 rollouts at a time.
    generated = [16, 40] if shares else [4 * 16, 4 * 40]
    assert moves.patches == generated + ([16, 16, 40, 40] if beta else [])
