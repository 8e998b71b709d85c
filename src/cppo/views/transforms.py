"""The published view families (CPPO, arXiv 2601.00501), pure functions of (RGB image, Generator, strengths).

Areas that a rotation or a perspective uncovers are black, torchvision's default. Both sample bilinearly, so
that small print stays readable; the crop is resized bicubically.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from cppo.views.images import load_rgb
from cppo.views.strengths import PRESERVING_FAMILIES, REMOVING_FAMILIES, ViewStrengths, check_families

PUBLISHED = ViewStrengths()


def preserving_view(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    families: Sequence[str] = PRESERVING_FAMILIES,
    strengths: ViewStrengths = PUBLISHED,
) -> Image.Image:
    """I+, from which the answer can still be read: one of `families`, drawn uniformly.

    Returns:
        A new RGB image of the size of `load_rgb(image)`; the input is not changed.

    Raises:
        UserError: the image cannot be read; `families` is empty or names another than PRESERVING_FAMILIES.
    """
    names = check_families("preserving_families", families, PRESERVING_FAMILIES)
    return _one_of(names, image, rng, strengths)


def removing_view(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    families: Sequence[str] = REMOVING_FAMILIES,
    strengths: ViewStrengths = PUBLISHED,
) -> Image.Image:
    """I-, without what the answer needs: one of `families`, drawn uniformly.

    Returns:
        A new RGB image of the size of `load_rgb(image)`; the input is not changed. A single pixel leaves a
        crop nothing to remove.

    Raises:
        UserError: the image cannot be read; `families` is empty or names another than REMOVING_FAMILIES.
    """
    names = check_families("removing_families", families, REMOVING_FAMILIES)
    return _one_of(names, image, rng, strengths)


def color_jitter(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Image.Image:
    """Brightness, then contrast, then saturation: in this order always, the factors drawn in it too."""
    from torchvision.transforms.v2 import functional

    brightness, contrast, saturation = (
        rng.uniform(*bounds) for bounds in (strengths.brightness, strengths.contrast, strengths.saturation)
    )
    image = functional.adjust_brightness(image, brightness)
    image = functional.adjust_contrast(image, contrast)
    return functional.adjust_saturation(image, saturation)


def perspective(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Image.Image:
    """With `perspective_probability`, each corner moves inwards by up to distortion / 2 of a side; else none.

    The whole image stays in sight.
    """
    if rng.random() >= strengths.perspective_probability:
        return image.copy()
    from torchvision.transforms.v2 import functional

    size = np.array(image.size)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * size / 2
    moved = corners + inwards * rng.uniform(0, strengths.perspective_distortion, size=(4, 2))
    return functional.perspective(image, corners.tolist(), moved.tolist(), fill=0)


def rotation(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Image.Image:
    """Rotation about the centre by up to `rotation_degrees` either way; what leaves the frame is lost."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    angle = rng.uniform(-strengths.rotation_degrees, strengths.rotation_degrees)
    return functional.rotate(image, angle, interpolation=InterpolationMode.BILINEAR, fill=0)


def noise_rectangles(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Image.Image:
    """`noise_rectangles` rectangles of uniform noise, anywhere inside the image; they may overlap.

    Height and width are drawn apart, each a fraction `noise_side` of its own side and at least one pixel.
    """
    pixels = np.array(image)
    for _ in range(strengths.noise_rectangles):
        top, bottom = _interval(pixels.shape[0], strengths.noise_side, rng)
        left, right = _interval(pixels.shape[1], strengths.noise_side, rng)
        shape = (bottom - top, right - left, 3)
        pixels[top:bottom, left:right] = rng.integers(0, 256, size=shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def crop(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Image.Image:
    """A crop anywhere inside the image, resized back; width and height are drawn apart from `crop_side`."""
    left, right = _interval(image.width, strengths.crop_side, rng)
    top, bottom = _interval(image.height, strengths.crop_side, rng)
    return image.crop((left, top, right, bottom)).resize(image.size, Image.Resampling.BICUBIC)


_TRANSFORMS: dict[str, Callable[[Image.Image, np.random.Generator, ViewStrengths], Image.Image]] = {
    "color_jitter": color_jitter,
    "perspective": perspective,
    "rotation": rotation,
    "noise_rectangles": noise_rectangles,
    "crop": crop,
}


def _one_of(
    families: tuple[str, ...], image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths
) -> Image.Image:
    family = families[rng.integers(len(families))]
    return _TRANSFORMS[family](load_rgb(image), rng, strengths)


def _interval(side: int, fractions: tuple[float, float], rng: np.random.Generator) -> tuple[int, int]:
    """[start, end) in pixels: a random fraction of the side, at least one pixel, at a random place on it."""
    length = max(1, round(side * rng.uniform(*fractions)))
    start = int(rng.integers(0, side - length + 1))
    return start, start + length
