"""The sampler is a function of (seed, sample id, epoch, image index), in every process."""

import hashlib
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cppo.views
from cppo.errors import UserError
from cppo.views import ViewSampler, ViewStrengths, load_rgb, stable_sample_id

PIXELS = np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
# Families that change any picture visibly at any draw.
VISIBLE = ViewSampler(11, preserving_families=["color_jitter"], removing_families=["noise_rectangles"])

PRINT_DIGESTS = """
import hashlib, sys
import numpy as np
from PIL import Image
from cppo.views import ViewSampler, stable_sample_id
assert ("torch" in sys.modules) is False, "importing the views must not import torch"
picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))
digest = hashlib.sha256()
for epoch in range(20):
    for view in ViewSampler(11).views(picture, "row \\u00e9", epoch, 1):
        digest.update(view.tobytes())
print(digest.hexdigest(), stable_sample_id("why?", [picture]))
"""


def data(views: tuple[Image.Image, Image.Image]) -> tuple[bytes, bytes]:
    return views[0].tobytes(), views[1].tobytes()


def test_same_pixels_in_another_process():
    digest = hashlib.sha256()
    for epoch in range(20):
        for view in ViewSampler(11).views(PICTURE, "row é", epoch, 1):
            digest.update(view.tobytes())
    source = str(Path(cppo.views.__file__).parents[2])
    env = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", PRINT_DIGESTS], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest.hexdigest(), stable_sample_id("why?", [PICTURE])]


def test_pixels_are_the_same_on_every_machine():
    """Frozen: a change of these digests changes the views of every resumed run, and so is a later definition."""
    noise = VISIBLE.views(Image.new("RGB", (40, 40)), "digits-train-s0-17", 2, 0)[1]
    assert hashlib.sha256(noise.tobytes()).hexdigest()[:16] == "9676fd7238fceb59"
    assert stable_sample_id("How many?", [PICTURE]) == "1f29b4fef0f31baaa772ffcab05af2ce"


def test_same_arguments_same_pixels_other_arguments_other_pixels():
    keys = [
        (VISIBLE, "a", 0, 0),
        (VISIBLE, "a", 1, 0),
        (VISIBLE, "a", 0, 1),
        (VISIBLE, "b", 0, 0),
        (VISIBLE, "a", 10, 0),
        (VISIBLE, "a1", 0, 0),
        (VISIBLE, "a, 1", 0, 0),
        (VISIBLE, "", 1, 0),
        (ViewSampler(12, ["color_jitter"], ["noise_rectangles"]), "a", 0, 0),
        (ViewSampler(-11, ["color_jitter"], ["noise_rectangles"]), "a", 0, 0),
    ]
    drawn = [data(sampler.views(PICTURE, *rest)) for sampler, *rest in keys]
    again = [data(sampler.views(PICTURE, *rest)) for sampler, *rest in reversed(keys)]
    assert drawn == again[::-1]
    for (preserving_a, removing_a), (preserving_b, removing_b) in combinations(drawn, 2):
        assert preserving_a != preserving_b
        assert removing_a != removing_b


def test_global_random_state_is_neither_read_nor_changed():
    import random

    import torch

    expected = data(VISIBLE.views(PICTURE, "a", 0, 0))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # noqa: NPY002
    for epoch in range(6):
        ViewSampler(0).views(PICTURE, "a", epoch, 0)
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after
    assert data(VISIBLE.views(PICTURE, "a", 0, 0)) == expected


def test_options_of_one_view_do_not_change_the_draws_of_the_other():
    base = ViewSampler(5)
    fewer = ViewSampler(5, preserving_families=["rotation"])
    for epoch in range(10):
        assert base.views(PICTURE, "a", epoch, 0)[1].tobytes() == fewer.views(PICTURE, "a", epoch, 0)[1].tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (30, 20), (4000, 3)])
def test_size_mode_and_no_mutation(mode, size):
    image = Image.new(mode, size)
    before = image.tobytes(), image.mode, image.size, dict(image.info)
    for epoch in range(4):
        for view in ViewSampler(0).views(image, "a", epoch, 0):
            assert (view.mode, view.size) == ("RGB", load_rgb(image).size)
            view.paste("red", (0, 0, 1, 1))
    assert (image.tobytes(), image.mode, image.size, dict(image.info)) == before


def test_strengths_reach_the_views():
    sampler = ViewSampler(
        0,
        preserving_families=["color_jitter"],
        removing_families=["crop"],
        strengths=ViewStrengths(brightness=(0.5, 0.5), crop_side=(1, 1)),
    )
    preserving, removing = sampler.views(Image.new("RGB", (8, 8), (100, 100, 100)), "a", 0, 0)
    assert preserving.getcolors() == [(64, (50, 50, 50))]
    assert removing.getcolors() == [(64, (100, 100, 100))]


def test_bad_sampler_options():
    with pytest.raises(UserError, match="preserving_views: 'blur' is unknown"):
        ViewSampler(0, preserving_families=["blur"])
    with pytest.raises(UserError, match="removing_views: the list is empty"):
        ViewSampler(0, removing_families=[])
    for seed in (1.5, "1", None, True):
        with pytest.raises(UserError, match="seed = "):
            ViewSampler(seed)


def test_stable_sample_id_depends_on_the_content_alone():
    lossless = PICTURE.convert("RGBA")
    other = PICTURE.copy()
    other.putpixel((0, 0), (1, 2, 3))
    chat = [{"role": "user", "content": "why?"}]
    base = stable_sample_id("why?", [PICTURE])
    assert stable_sample_id("why?", [lossless]) == base
    assert stable_sample_id(chat, None) == stable_sample_id([{"content": "why?", "role": "user"}], [])
    ids = [
        base,
        stable_sample_id("why? ", [PICTURE]),
        stable_sample_id("why?", [other]),
        stable_sample_id("why?", [PICTURE, PICTURE]),
        stable_sample_id("why?", [PICTURE, other]),
        stable_sample_id("why?", [other, PICTURE]),
        stable_sample_id("why?", []),
        stable_sample_id("why?", [Image.frombytes("RGB", (20, 30), PICTURE.tobytes())]),
        stable_sample_id(chat, [PICTURE]),
        stable_sample_id("\ud800", []),
    ]
    assert len(set(ids)) == len(ids)
    assert all(len(one) == 32 for one in ids)


def test_stable_sample_id_of_what_json_cannot_hold():
    with pytest.raises(UserError, match="prompt"):
        stable_sample_id([{"role": "user", "content": PICTURE}], [])
