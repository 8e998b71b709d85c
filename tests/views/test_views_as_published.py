"""CPPO's own families against torchvision's transforms and Pillow, given the same drawn parameters: equal pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from cppo.views import ViewStrengths, family_view
from cppo.views.transforms import PUBLISHED, moved_corners

SIZES = [(64, 64), (97, 41), (28, 120), (2, 3)]
SEEDS = range(12)
STEPS = ("brightness", "contrast", "saturation")


def picture(size):
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def equal(view, expected):
    return np.array_equal(np.asarray(view), np.asarray(expected))


@pytest.fixture(params=[transforms, v2], ids=["v1", "v2"])
def library(request):
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_color_jitter(size, library, monkeypatch):
    jitter = library.ColorJitter(brightness=(0.2, 1.3), contrast=(0.2, 1.8), saturation=(0.2, 1.8))
    orders = set()
    for seed in SEEDS:
        view = family_view("color_jitter", picture(size), np.random.default_rng(seed))
        order = torch.tensor([STEPS.index(name) for name in view.parameters] + [3])
        factors = [view.parameters[name] for name in STEPS]
        if library is transforms:
            monkeypatch.setattr(jitter, "get_params", lambda *_, drawn=(order, *factors, None): drawn)
        else:
            drawn = dict(zip((f"{name}_factor" for name in STEPS), factors, strict=True))
            drawn = {"fn_idx": order, **drawn, "hue_factor": None}
            monkeypatch.setattr(jitter, "make_params", lambda _, drawn=drawn: drawn)
        assert equal(view.image, jitter(picture(size)))
        orders.add(tuple(view.parameters))
    assert len(orders) > 3


@pytest.mark.parametrize("size", SIZES)
def test_rotation(size, library):
    for seed in SEEDS:
        view = family_view("rotation", picture(size), np.random.default_rng(seed))
        angle = view.parameters["degrees"]
        assert -10 <= angle <= 10
        assert equal(view.image, library.RandomRotation((angle, angle))(picture(size)))


@pytest.mark.parametrize("size", SIZES)
def test_perspective(size, monkeypatch):
    always = ViewStrengths(perspective_probability=1)
    published = transforms.RandomPerspective(distortion_scale=0.2, p=1)
    start, _ = published.get_params(*size, 0.2)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        rng.random()  # whether it moves at all
        moved = moved_corners(size, 0.2, rng).tolist()
        monkeypatch.setattr(published, "get_params", lambda *_, moved=moved: (start, moved))
        view = family_view("perspective", picture(size), np.random.default_rng(seed), always)
        assert equal(view.image, published(picture(size)))
        assert view.parameters["pixels_moved"] == np.abs(np.array(moved) - np.array(start)).max()


@pytest.mark.parametrize(("size", "distortion"), [((64, 40), 0.2), ((7, 200), 0.5)])
def test_corners_are_drawn_as_torchvision_draws_them(size, distortion):
    rng = np.random.default_rng(0)
    ours = np.array([moved_corners(size, distortion, rng) for _ in range(2000)]).reshape(-1, 8)
    torch.manual_seed(0)
    drawn = [transforms.RandomPerspective.get_params(*size, distortion)[1] for _ in range(2000)]
    theirs = np.array(drawn).reshape(-1, 8)
    for one, other in zip(ours.T, theirs.T, strict=True):
        assert np.array_equal(np.unique(one), np.unique(other))
        counts = np.unique(one, return_counts=True)[1]
        assert np.abs(counts / 2000 - 1 / len(counts)).max() < 5 * np.sqrt(1 / len(counts) / 2000)


@pytest.mark.parametrize("size", SIZES)
def test_crop(size, library):
    """The published code's own arithmetic: one factor, sides cut off, Pillow's bilinear resize."""
    for seed in SEEDS:
        factor = np.random.default_rng(seed).uniform(*PUBLISHED.crop_side)
        view = family_view("crop", picture(size), np.random.default_rng(seed))
        left, top, width, height = (view.parameters[name] for name in ("left", "top", "width", "height"))
        assert (width, height) == (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))
        assert 0 <= left <= size[0] - width
        assert 0 <= top <= size[1] - height
        resized = library.functional.resized_crop(picture(size), top, left, height, width, [size[1], size[0]])
        assert equal(view.image, resized)
        box = (left, top, left + width, top + height)
        assert equal(view.image, picture(size).crop(box).resize(size, Image.Resampling.BILINEAR))


def test_noise_rectangles_are_the_only_change():
    """Replayed from the same stream, in the published order: width, height, place, noise."""
    for size in SIZES:
        rng, pixels = np.random.default_rng(5), np.array(picture(size))
        for _ in range(50):
            width, height = (max(1, int(side * rng.uniform(0.05, 0.15))) for side in size)
            left = rng.integers(0, size[0] - width, endpoint=True)
            top = rng.integers(0, size[1] - height, endpoint=True)
            noise = rng.integers(0, 254, size=(height, width, 3), dtype=np.uint8, endpoint=True)
            pixels[top : top + height, left : left + width] = noise
        assert equal(family_view("noise_rectangles", picture(size), np.random.default_rng(5)).image, pixels)
