"""The views of prompts inside verl: equal to the trainer's, made once per prompt, on the image's own path."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from injected import EPOCH, METHODS, SEED, digest, read
from PIL import Image
from transformers import AutoProcessor

from cppo.assets import MICRO_DIR
from cppo.errors import UserError
from cppo.verl.options import options_from
from cppo.verl.views import Prompt, PromptViews, check_processor, stable_id
from cppo.views import stable_sample_id


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MICRO_DIR)


def row_of(processor, images, text="How many?", **entries):
    """A row of verl's batch."""
    parts = [{"type": "image", "image": image} for image in images]
    made = processor(text=[processor.image_token * len(images)], images=images, return_tensors="pt")
    return {
        "uid": "uid",
        "raw_prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "multi_modal_inputs": {name: made[name] for name in ("pixel_values", "image_grid_thw")},
        **entries,
    }


def picture(seed=0, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("method", METHODS)
def test_they_are_the_trainers(processor, method):
    groups, found = read()
    views = PromptViews(options_from({"method": method, "seed": SEED, **METHODS[method]}), processor, steps_per_epoch=5)
    for place, digests in found[method].views.items():
        group = groups[int(place)]
        messages = row_of(processor, group.images, group.text)["raw_prompt"]
        name = group.sample_id or stable_id(messages)
        pairs = views.images(messages, name, 0, 5 * EPOCH + 1)
        assert [[digest(preserving), digest(removing)] for preserving, removing in pairs] == digests


def test_a_groups_rollouts_share_one_pair_unless_each_has_its_own(processor):
    row = row_of(processor, [picture()])
    shared = PromptViews(options_from({}), processor)
    first, second = (shared.of(Prompt.of({**row, "session_id": number})) for number in (0, 1))
    assert first is second
    assert first["removing"]["pixel_values"].shape == row["multi_modal_inputs"]["pixel_values"].shape
    assert not torch.equal(first["removing"]["pixel_values"], first["preserving"]["pixel_values"])
    own = PromptViews(options_from({"view_draws": "rollout"}), processor)
    first, second = (own.of(Prompt.of({**row, "session_id": number})) for number in (0, 1))
    assert not torch.equal(first["removing"]["pixel_values"], second["removing"]["pixel_values"])
    shared.forget()
    again = shared.of(Prompt.of(row))
    assert torch.equal(again["removing"]["pixel_values"], shared.of(Prompt.of(row))["removing"]["pixel_values"])


def test_each_epoch_draws_anew_but_for_once(processor):
    messages = row_of(processor, [picture()])["raw_prompt"]

    def drawn(step, **given):
        views = PromptViews(options_from(given), processor, steps_per_epoch=4)
        return [digest(view) for pair in views.images(messages, "row", 0, step) for view in pair]

    assert drawn(1) == drawn(4)
    assert drawn(4) != drawn(5)
    assert drawn(4, view_draws="once") == drawn(5, view_draws="once")


def test_a_row_without_an_id_gets_the_trainers(processor):
    images = [picture(1), picture(2)]
    messages = row_of(processor, images, "Which is larger?")["raw_prompt"]
    assert stable_id(messages) == stable_sample_id([{"role": "user", "content": "Which is larger?"}], images)
    assert Prompt.of(row_of(processor, images, extra_info={"sample_id": "mine"})).given_id == "mine"


def test_a_file_and_a_turned_photograph_are_taken_as_verls_model_sees_them(processor, tmp_path):
    turned = picture(3, (64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:
        assert opened.getexif()[0x0112] == 6
    row = row_of(processor, [turned])
    row["raw_prompt"][0]["content"][0]["image"] = str(tmp_path / "photo.png")
    made = PromptViews(options_from({}), processor).of(Prompt.of(row))
    assert made["removing"]["pixel_values"].shape == row["multi_modal_inputs"]["pixel_values"].shape


def test_images_of_a_tool_leave_a_rollout_without_views(processor):
    both = row_of(processor, [picture(1), picture(2)])
    one = row_of(processor, [picture(1)])
    assert Prompt.of(one).shows_its_images
    assert not Prompt.of({**one, "multi_modal_inputs": both["multi_modal_inputs"]}).shows_its_images
    assert not Prompt.of({**one, "multi_modal_inputs": {}}).shows_its_images


def test_what_does_not_fit_is_refused_in_one_line(processor):
    row = row_of(processor, [picture()])
    other = row_of(processor, [picture(size=(32, 64))])
    with pytest.raises(UserError, match=r"returns the grid \[\[1, 8, 8\]\] for a view, but \[\[1, 12, 6\]\] for"):
        PromptViews(options_from({}), processor).of(
            Prompt.of({**row, "multi_modal_inputs": other["multi_modal_inputs"]})
        )
    with pytest.raises(UserError, match="returns no image_grid_thw for an image"):
        check_processor(SimpleNamespace(image_processor=SimpleNamespace(model_input_names=["pixel_values"])))
    row["raw_prompt"][0]["content"][0]["image"] = "/no/such.png"
    with pytest.raises(UserError, match=r"image '/no/such.png': there is no such file"):
        PromptViews(options_from({}), processor).of(Prompt.of(row))
