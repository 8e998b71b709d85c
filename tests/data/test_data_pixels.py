"""Bounds on an image's pixels: sizes worked out by hand, and by trying every size."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from cppo.data import PixelBounds, load_rows
from cppo.errors import UserError


@pytest.mark.parametrize(
    ("size", "least", "largest", "expected"),
    [
        ((400, 300), None, 30_000, (200, 150)),  # half of each side
        ((400, 300), 480_000, None, (800, 600)),  # twice each side
        ((400, 300), 120_000, 120_000, (400, 300)),  # on both bounds
        ((400, 300), 1, 119_999, (399, 299)),  # rounded down: 400 · sqrt(0.99999) = 399.998
        ((400, 300), 120_001, None, (401, 301)),  # rounded up: 400.002
        ((7, 3), 100, 100, (15, 6)),  # 15.3 x 6.5: no whole sides keep both bounds, the upper one holds
        ((1_000_000, 1), None, 100, (100, 1)),  # a side never gets lost
        ((1, 1), 50, None, (8, 8)),
    ],
)
def test_sizes_by_hand(size, least, largest, expected):
    assert PixelBounds(least, largest).size(*size) == expected


def test_sizes_against_trying_every_one():
    """Scaled down: the largest whole sides not above the exact ones; up: the least not below. Exact fractions."""
    for width, height in ((5, 5), (13, 4), (3, 17), (31, 30), (1, 9)):
        for bound in range(1, 260, 7):
            shrink = Fraction(bound, width * height)  # the square of the factor

            def below(side, shrink=shrink):
                return max(n for n in range(side + 1) if n * n <= side * side * shrink)

            def above(side, shrink=shrink):
                return next(n for n in range(400) if n * n >= side * side * shrink)

            down, up = PixelBounds(None, bound).size(width, height), PixelBounds(bound, None).size(width, height)
            if shrink >= 1:
                assert down == (width, height)
                assert up == (above(width), above(height))
                assert up[0] * up[1] >= bound
            else:
                assert up == (width, height)
                assert down[0] * down[1] <= bound
                if below(width) and below(height):
                    assert down == (below(width), below(height))


@pytest.mark.parametrize("size", [(1990, 10), (10, 1990), (3981, 20), (597, 3), (29, 5000), (995, 5)])
@pytest.mark.parametrize("largest", [784, 797, 1000, 3000, 20_000])
def test_a_thin_image_does_not_become_thinner_than_processors_take(size, largest):
    """Qwen-VL's processors refuse one side of more than 200 times the other; the readers refuse 200."""
    shown = PixelBounds(max_pixels=largest).size(*size)
    assert max(shown) < 200 * min(shown)
    assert shown[0] * shown[1] <= largest
    assert (shown[0] > shown[1]) == (size[0] > size[1])


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((20, 40), PixelBounds(min_side=28), (28, 56)),
        ((41, 9), PixelBounds(min_side=28), (128, 28)),  # 41 x 28/9 = 127.6
        ((28, 28), PixelBounds(min_side=28), (28, 28)),
        ((14, 28), PixelBounds(min_pixels=6272, min_side=28), (56, 112)),  # 28 x 56 first, then twice each side
        ((1, 150), PixelBounds(min_side=2000), (816, 122474)),  # no image is made of more than MAX_PIXELS
        ((10, 30), PixelBounds(max_pixels=1200, min_side=28), (20, 60)),  # 28 x 84 first; max_pixels holds
    ],
)
def test_thin_images_are_enlarged(size, bounds, expected):
    assert bounds.size(*size) == expected


def test_thin_images_are_enlarged_as_published():
    """The published preparation of the data, written down again: both sides by 28 / shorter side, Lanczos."""
    rng = np.random.default_rng(0)
    for width, height in ((5, 40), (27, 27), (90, 13), (28, 200), (300, 300)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        shown = PixelBounds(min_side=28).apply(image)
        if min(width, height) >= 28:
            assert shown is image
            continue
        factor = max(28 / width, 28 / height)
        expected = image.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
        assert shown.size == expected.size
        assert shown.tobytes() == expected.tobytes()


def test_an_image_within_the_bounds_is_itself():
    image = Image.new("RGB", (20, 10))
    assert PixelBounds(200, 200).apply(image) is image
    assert PixelBounds().apply(image) is image
    assert PixelBounds(None, 50).apply(image).size == (10, 5)


@pytest.mark.parametrize(("least", "largest"), [(0, None), (None, -3), (None, 10**9), (10, 9)])
def test_bounds_that_make_no_sense(least, largest):
    with pytest.raises(UserError, match="pixels"):
        PixelBounds(least, largest)
    with pytest.raises(UserError, match="min_side = 0"):
        PixelBounds(min_side=0)


def test_records_are_scaled_and_keep_their_ids():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    rows = [{"prompt": "q", "answer": "a", "images": [noise, Image.new("RGB", (4, 4))]}, {"prompt": "p", "answer": "b"}]
    plain, bounded = load_rows(rows), load_rows(rows)
    bounded.pixels = PixelBounds(64, 300)
    assert [image.size for image in bounded[0].images] == [(20, 15), (8, 8)]
    assert bounded[0].images[0].tobytes() == noise.resize((20, 15), Image.Resampling.BICUBIC).tobytes()
    assert [record.id for record in bounded] == [record.id for record in plain]
    assert bounded[1].images == ()


def test_kept_records_keep_order_and_place():
    source = load_rows([{"prompt": f"q{i}", "answer": "a"} for i in range(6)])
    kept = source.keep([1, 2, 5]).keep([0, 2])
    assert [record.prompt for record in kept] == ["q1", "q5"]
    assert kept.place(1) == source.place(5)
    assert kept[-1].prompt == "q5"
    assert len(source) == 6
    with pytest.raises(IndexError):
        kept[2]
