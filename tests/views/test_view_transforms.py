"""The view families against references that do not use Pillow, torchvision or the implementation's own draws.

Geometry is read from the result: pixel (x, y) of the chart has colour (x, y, 255), so each pixel of a view shows where
it came from, and a fit over all pixels gives the map.
"""

import math
from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cppo.views import (
    PRESERVING_FAMILIES,
    REMOVING_FAMILIES,
    ViewStrengths,
    preserving_view,
    removing_view,
)

SIDE = 240
CHART = Image.fromarray(
    np.stack([*np.meshgrid(np.arange(SIDE), np.arange(SIDE)), np.full((SIDE, SIDE), 255)], axis=2).astype(np.uint8)
)


def preserving(image: Image.Image, family: str, seed: int, **strengths) -> np.ndarray:
    view = preserving_view(image, np.random.default_rng(seed), families=[family], strengths=ViewStrengths(**strengths))
    return np.asarray(view)


def removing(image: Image.Image, family: str, seed: int, **strengths) -> np.ndarray:
    view = removing_view(image, np.random.default_rng(seed), families=[family], strengths=ViewStrengths(**strengths))
    return np.asarray(view)


def traced(view: np.ndarray, blended: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the view and their sources, in pixels, without border pixels.

    `blended`: a pixel is a mean of several, with its level truncated, not rounded; else it is the pixel that it names.
    """
    inside = ndimage.binary_erosion(view[:, :, 2] == 255, iterations=2)
    y, x = np.nonzero(inside)
    centre = 0.5  # of a pixel, and of the levels that are cut off to the same one
    return np.stack([x, y], axis=1) + centre, view[y, x, :2] + centre + (0.5 if blended else 0.0)


# Colour jitter


def blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """base + factor (image - base) as in 8-bit imaging libraries: truncated, not rounded."""
    return np.clip(np.trunc(base + factor * (image - base)), 0, 255).astype(np.int64)


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma in 16-bit fixed point, as 8-bit imaging libraries compute it."""
    return (image @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


def jittered(image: np.ndarray, factors: dict[str, float], order: tuple[str, ...]) -> np.ndarray:
    image = image.astype(np.int64)
    for step in order:
        if step == "brightness":
            base = np.zeros_like(image)
        elif step == "contrast":
            base = np.full_like(image, int(luma(image).mean() + 0.5))
        else:
            base = np.repeat(luma(image)[:, :, None], 3, axis=2)
        image = blend(base, image, factors[step])
    return image


ORDERS = [*permutations(("brightness", "contrast", "saturation"))]


# Factors whose products with whole numbers are not near whole numbers, where float32 and float64 differ.
@pytest.mark.parametrize("factors", [(0.4137, 1.6181, 0.5347), (1.2113, 0.3179, 1.7321), (1.2983, 1.7937, 0.2069)])
def test_color_jitter_takes_each_order_equally_often(factors):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    given = dict(zip(ORDERS[0], factors, strict=True))
    fixed = {name: (factor, factor) for name, factor in given.items()}
    expected = {order: jittered(pixels, given, order) for order in ORDERS}
    draws, counts = 300, dict.fromkeys(ORDERS, 0)
    for seed in range(draws):
        got = preserving(Image.fromarray(pixels), "color_jitter", seed, **fixed)
        (order,) = [order for order, one in expected.items() if (got == one).all()]
        counts[order] += 1
    for count in counts.values():
        assert abs(count / draws - 1 / 6) < 3.9 * math.sqrt(5 / 36 / draws)


def test_color_jitter_by_factors_of_one_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    fixed = dict.fromkeys(ORDERS[0], (1.0, 1.0))
    assert (preserving(Image.fromarray(pixels), "color_jitter", 0, **fixed) == pixels).all()


def test_brightness_of_a_constant_grey_image_is_the_factor():
    """Contrast and saturation do not change a constant grey image, so grey / 150 is the brightness factor."""
    image = Image.new("RGB", (3, 2), (150, 150, 150))
    factors = []
    for seed in range(400):
        view = preserving(image, "color_jitter", seed)
        assert (view == view[0, 0, 0]).all()
        factors.append(view[0, 0, 0] / 150)
    factors = np.array(factors)
    assert factors.min() >= 0.2 - 1 / 150
    assert factors.max() <= 1.3
    # Uniform on [0.2, 1.3]: Kolmogorov-Smirnov distance, 0.1 % point of 400 draws, and the cut-off level.
    expected = (np.sort(factors) - 0.2) / 1.1
    assert np.abs(expected - np.arange(400) / 400).max() < 1.95 / 20 + 1 / 150


# Perspective and rotation


def homography(places: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The 3x3 map from sources to positions with the least algebraic error (direct linear transform, SVD)."""
    scale = np.diag([2 / SIDE, 2 / SIDE, 1.0])
    scale[:2, 2] = -1
    ones = np.ones((len(places), 1))
    target = (np.hstack([places, ones]) @ scale.T)[:, :2]
    source = np.hstack([sources, ones]) @ scale.T
    zeros = np.zeros_like(source)
    rows = np.vstack(
        [
            np.hstack([source, zeros, -target[:, :1] * source]),
            np.hstack([zeros, source, -target[:, 1:] * source]),
        ]
    )
    matrix = np.linalg.svd(rows, full_matrices=False)[2][-1].reshape(3, 3)
    return np.linalg.inv(scale) @ matrix @ scale


def project(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    mapped = np.hstack([points, np.ones((len(points), 1))]) @ matrix.T
    return mapped[:, :2] / mapped[:, 2:]


def corner_moves(seeds: range, distortion: float) -> Iterator[np.ndarray]:
    """Move of each corner inwards, as a fraction of half the side."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (SIDE - 1)
    for seed in seeds:
        view = preserving(CHART, "perspective", seed, perspective_probability=1, perspective_distortion=distortion)
        places, sources = traced(view)
        matrix = homography(places[::17], sources[::17])
        assert np.abs(project(matrix, sources) - places).max() < 1  # a perspective map, to a level
        yield np.abs(project(matrix, corners) - corners) / (SIDE / 2)


@pytest.mark.parametrize("distortion", [0.2, 0.5])
def test_perspective_moves_corners_inwards_by_at_most_the_distortion(distortion):
    moves = np.array(list(corner_moves(range(12), distortion)))
    slack = 1e-3  # 0.12 pixels
    assert moves.max() <= distortion + slack
    assert moves.max() > 0.95 * distortion
    assert moves.min() < 0.05 * distortion
    assert abs(moves.mean() - distortion / 2) < 0.1 * distortion
    spread = moves.reshape(-1, 8).std(axis=0)
    assert (spread > 0.1 * distortion).all()  # all eight coordinates are drawn


def test_perspective_keeps_the_whole_image_in_sight_on_black():
    view = preserving(CHART, "perspective", 3, perspective_probability=1)
    _, sources = traced(view)
    assert sources.min() < 6
    assert sources.max() > SIDE - 6
    assert (view[0, 0] == 0).all()


def test_perspective_leaves_half_of_the_images_as_they_are():
    image = CHART.resize((24, 24))
    original = np.asarray(image)
    unchanged = sum((preserving(image, "perspective", seed) == original).all() for seed in range(1500))
    assert abs(unchanged / 1500 - 0.5) < 3.3 * math.sqrt(0.25 / 1500)
    assert (preserving(image, "perspective", 0, perspective_probability=0) == original).all()


def rotation_of(view: np.ndarray) -> tuple[float, np.ndarray]:
    """Angle in degrees, counter-clockwise as seen, and the 2x2 matrix; the centre must stay in place."""
    places, sources = traced(view, blended=False)
    centred = np.hstack([sources - SIDE / 2, np.ones((len(sources), 1))])
    solution = np.linalg.lstsq(centred, places - SIDE / 2, rcond=None)[0]
    assert np.abs(solution[2]).max() < 0.05
    matrix = solution[:2].T
    return math.degrees(math.atan2(matrix[0, 1], matrix[0, 0])), matrix


def test_rotation_is_a_rotation_about_the_centre_within_the_bound():
    angles = []
    for seed in range(60):
        angle, matrix = rotation_of(preserving(CHART, "rotation", seed))
        assert np.abs(matrix @ matrix.T - np.eye(2)).max() < 1e-3
        assert np.linalg.det(matrix) > 0
        angles.append(angle)
    assert max(np.abs(angles)) <= 10.01
    assert max(angles) > 8
    assert min(angles) < -8
    assert abs(np.mean(angles)) < 3.3 * (20 / math.sqrt(12)) / math.sqrt(60)


def test_rotation_strength_and_black_corners():
    views = [preserving(CHART, "rotation", seed, rotation_degrees=45) for seed in range(20)]
    angles = [abs(rotation_of(view)[0]) for view in views]
    assert 30 < max(angles) <= 45.1
    white = Image.new("RGB", (64, 64), "white")
    seed = int(np.argmax(angles))
    view = preserving(white, "rotation", seed, rotation_degrees=45)
    assert (view[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert (view[32, 32] == 255).all()
    assert (preserving(white, "rotation", seed, rotation_degrees=0) == 255).all()


# Noise rectangles and crop


def test_one_noise_rectangle_is_a_filled_rectangle_of_the_stated_size():
    grey = Image.new("RGB", (600, 400), (128, 128, 128))
    sizes, means = [], []
    for seed in range(80):
        view = removing(grey, "noise_rectangles", seed, noise_rectangles=1)
        changed = (view != 128).any(axis=2)
        rows, columns = np.nonzero(changed.any(axis=1))[0], np.nonzero(changed.any(axis=0))[0]
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.999
        noise = view[changed].astype(np.float64)
        means.append(noise.mean())
        assert abs(noise.std() - math.sqrt((255**2 - 1) / 12)) < 4
        sizes.append([box.shape[0] / 400, box.shape[1] / 600])
    sizes = np.array(sizes)
    assert sizes.min() > 0.05 - 1 / 400
    assert sizes.max() <= 0.15
    assert (sizes.min(axis=0) < 0.06).all()
    assert (sizes.max(axis=0) > 0.14).all()
    assert abs(np.corrcoef(sizes.T)[0, 1]) < 0.35  # height and width are drawn apart
    assert abs(np.mean(means) - 127) < 0.5


def test_fifty_noise_rectangles_inside_the_image():
    grey = Image.new("RGB", (1500, 1000), (128, 128, 128))
    found = []
    for seed in range(5):
        view = removing(grey, "noise_rectangles", seed, noise_side=(0.01, 0.01))
        changed = (view != 128).any(axis=2)
        labels, count = ndimage.label(changed, structure=np.ones((3, 3)))
        areas = ndimage.sum_labels(changed, labels, np.arange(1, count + 1))
        assert areas.sum() <= 50 * 15 * 10
        assert (areas >= 15 * 10).all()  # nothing is cut off by the border
        found.append((count, areas.sum()))
    # At least one of the five draws has no overlap; in it all fifty are separate.
    assert max(found) == (50, 50 * 15 * 10)


def test_noise_covers_the_published_share():
    """Share of the image under fifty rectangles, against points thrown at rectangles in float64."""
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(400):
        sides = rng.uniform(0.05, 0.15, (50, 2))
        start = rng.uniform(0, 1, (50, 2)) * (1 - sides)
        point = rng.uniform(0, 1, (200, 1, 2))
        hits.append(((point > start) & (point < start + sides)).all(axis=2).any(axis=1).mean())
    grey = Image.new("RGB", (600, 600), (128, 128, 128))
    covered = [(removing(grey, "noise_rectangles", seed) != 128).any(axis=2).mean() for seed in range(60)]
    error = math.hypot(np.std(hits) / math.sqrt(len(hits)), np.std(covered) / math.sqrt(len(covered)))
    assert abs(np.mean(covered) - np.mean(hits)) < 3.5 * error + 0.01  # whole pixels make rectangles smaller


def test_crop_shows_one_box_of_the_stated_size_over_the_full_frame():
    boxes = []
    for seed in range(60):
        view = removing(CHART, "crop", seed).astype(np.float64)
        assert (view[:, :, 2] == 255).all()
        for channel, axis in ((0, 1), (1, 0)):
            line = np.moveaxis(view[:, :, channel], axis, 0)
            assert np.ptp(line, axis=1).max() == 0  # x does not depend on y
            inner = np.arange(10, SIDE - 10)
            slope, offset = np.polyfit(inner + 0.5, line[inner, 0] + 0.5, 1)
            assert np.abs(slope * (inner + 0.5) + offset - line[inner, 0] - 0.5).max() < 0.6
            start, end = offset, slope * SIDE + offset
            assert start > -0.2
            assert end < SIDE + 0.2
            boxes.append(((end - start) / SIDE, start / SIDE))
    sides, starts = np.array(boxes).T
    assert sides.min() > 0.6 - 0.004
    assert sides.max() < 0.7 + 0.004
    assert sides.min() < 0.61
    assert sides.max() > 0.69
    assert np.abs(sides[::2] - sides[1::2]).max() < 1e-3  # one fraction for both
    assert starts.min() < 0.03
    assert (starts + sides).max() > 0.97


def test_crop_of_everything_changes_nothing():
    assert (removing(CHART, "crop", 0, crop_side=(1, 1)) == np.asarray(CHART)).all()


# Both kinds of view


def test_each_family_is_drawn_equally_often():
    image = Image.new("RGB", (24, 24), (100, 100, 100))
    strong = ViewStrengths(brightness=(0.5, 0.5), perspective_probability=1, rotation_degrees=10)
    rng = np.random.default_rng(0)
    counts = {"color_jitter": 0, "perspective": 0, "rotation": 0, "noise_rectangles": 0, "crop": 0}
    draws = 900
    for _ in range(draws):
        view = np.asarray(preserving_view(image, rng, strengths=strong)).astype(int)
        if (view == 50).all():
            counts["color_jitter"] += 1
        elif np.abs(view - view[::-1, ::-1]).max() <= 2:  # a square turned about its centre
            counts["rotation"] += 1
        else:
            counts["perspective"] += 1
        changed = (np.asarray(removing_view(image, rng)) != 100).any()
        counts["noise_rectangles" if changed else "crop"] += 1
    for name, count in counts.items():
        share = 1 / 3 if name in PRESERVING_FAMILIES else 1 / 2
        assert abs(count / draws - share) < 3.3 * math.sqrt(share * (1 - share) / draws), (name, count)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (4000, 3), (3, 4000)])
@pytest.mark.parametrize("family", PRESERVING_FAMILIES + REMOVING_FAMILIES)
def test_tiny_and_extreme_shapes(size, family):
    image = Image.new("L", size, 200)
    apply = preserving if family in PRESERVING_FAMILIES else removing
    for seed in range(4):
        view = apply(image, family, seed, perspective_probability=1, perspective_distortion=0.6)
        assert view.shape == (size[1], size[0], 3)
        if family == "crop":
            assert (view == 200).all()
        if family == "noise_rectangles":
            assert (view != 200).any()
