"""Views of methods other than CPPO: black patches on a grid, and diffusion noise with the published schedule."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from cppo.errors import UserError
from cppo.views import ViewStrengths, preserving_view, removing_view


def grey(level: int, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (14, 14), (5, 3)])
def test_patches_are_whole_squares_of_the_grid(size):
    strengths = ViewStrengths(patch_side=14, patch_probability=0.5)
    for seed in range(10):
        view = removing_view(
            grey(200, size), np.random.default_rng(seed), families=["black_patches"], strengths=strengths
        )
        assert view.size == size
        pixels = np.asarray(view)
        for top in range(0, size[1], 14):
            for left in range(0, size[0], 14):
                assert np.unique(pixels[top : top + 14, left : left + 14]).tolist() in ([0], [200])


def test_the_share_of_black_patches_is_the_probability():
    strengths = ViewStrengths(patch_side=1, patch_probability=0.6)
    pixels = np.asarray(
        removing_view(grey(200, (300, 300)), np.random.default_rng(0), families=["black_patches"], strengths=strengths)
    )
    assert abs((pixels[..., 0] == 0).mean() - 0.6) < 4 * math.sqrt(0.24 / 90_000)


def test_static_is_uniform_and_knows_nothing_of_the_image():
    """64 bins of four levels: chi-squared with 63 degrees of freedom, below its 1e-6 quantile."""
    views = [
        np.asarray(removing_view(grey(level, (200, 150)), np.random.default_rng(5), families=["static"]))
        for level in (0, 255)
    ]
    assert (views[0] == views[1]).all()
    assert views[0].shape == (150, 200, 3)
    counts, _ = np.histogram(views[0], bins=64, range=(0, 256))
    expected = views[0].size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 133


@pytest.mark.parametrize("steps", [0, 50, 200])
def test_diffusion_noise_scales_the_pixels_and_adds_normal_noise(steps):
    """Mean sqrt(a) x and deviation sqrt(1 - a), a the product of 1 - beta by a loop."""
    kept = 1.0
    for step in range(steps):
        kept *= 1 - ((0.005 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)) + 1e-5)
    view = preserving_view(
        grey(128, (400, 400)),
        np.random.default_rng(1),
        families=["diffusion_noise"],
        strengths=ViewStrengths(diffusion_steps=steps),
    )
    pixels = np.asarray(view).astype(float)
    deviation = 255 * math.sqrt(1 - kept)
    count = pixels.size
    assert abs(pixels.mean() - math.sqrt(kept) * 128) < 4 * deviation / math.sqrt(count) + 0.01
    # Rounding to whole levels adds a variance of 1/12.
    assert abs(pixels.std() - math.sqrt(deviation**2 + (steps > 0) / 12)) < 4 * deviation / math.sqrt(2 * count) + 0.01


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"patch_side": 0}, "patch_side = 0"),
        ({"patch_probability": 1.5}, "patch_probability = 1.5"),
        ({"diffusion_steps": 1001}, "diffusion_steps = 1001"),
        ({"diffusion_steps": 0.5}, "diffusion_steps = 0.5"),
    ],
)
def test_strengths_out_of_range(strength, message):
    with pytest.raises(UserError, match=message):
        ViewStrengths(**strength)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (40, 25)])
def test_gaussian_blur_is_the_published_convolution(size):
    """3 x 3, standard deviation 1, zeros outside, in torch; torch may round a level the other way by one."""
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    view = preserving_view(Image.fromarray(pixels), np.random.default_rng(0), families=["gaussian_blur"])
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / 2)
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    channels = torch.from_numpy(pixels).double().permute(2, 0, 1)[:, None]
    expected = torch.nn.functional.conv2d(channels, kernel, padding=1)[:, 0].permute(1, 2, 0).floor().numpy()
    distance = np.abs(np.asarray(view).astype(float) - expected)
    assert distance.max() <= 1
    assert (distance > 0).mean() < 0.01


def test_gaussian_blur_of_one_level_keeps_it_inside_and_darkens_the_border():
    view = np.asarray(preserving_view(grey(200, (9, 7)), np.random.default_rng(0), families=["gaussian_blur"]))
    assert (view[1:-1, 1:-1] == 200).all()
    weight = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    assert (view[0, 1:-1] == math.floor(200 * (1 - weight))).all()
    assert (view[0, 0] == math.floor(200 * (1 - weight) ** 2)).all()
