"""The published view families (CPPO, arXiv 2601.00501, and its kin), pure functions of (RGB image, Generator,
strengths).

Areas that a rotation or a perspective uncovers are black, torchvision's default. Both sample bilinearly, so
that small print stays readable; the crop is resized bicubically.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from cppo.views.images import load_rgb
from cppo.views.own import is_own, own_view
from cppo.views.strengths import (
    DIFFUSION_STEPS,
    KNOWN_PRESERVING,
    KNOWN_REMOVING,
    PRESERVING_FAMILIES,
    REMOVING_FAMILIES,
    ViewStrengths,
    check_families,
)

PUBLISHED = ViewStrengths()

Perturbed = tuple[Image.Image, dict[str, float]]
"""A perturbed image, and the values that were drawn for it."""


@dataclass(frozen=True)
class View:
    """A view with its family and the values drawn for it (factors, pixels, degrees, steps, or a number of areas)."""

    image: Image.Image
    family: str
    parameters: dict[str, float]


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
        UserError: the image cannot be read; `families` is empty, or one is neither in KNOWN_PRESERVING nor one's own.
    """
    names = check_families("families", families, KNOWN_PRESERVING)
    return drawn_view(names, image, rng, strengths)


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
        UserError: the image cannot be read; `families` is empty, or one is neither in KNOWN_REMOVING nor one's own.
    """
    names = check_families("families", families, KNOWN_REMOVING)
    return drawn_view(names, image, rng, strengths)


def drawn_view(
    families: Sequence[str], image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths
) -> Image.Image:
    """One draw of one of `families`, which are valid and of which each is as likely.

    Raises:
        UserError: the image cannot be read, or the user's own code fails.
    """
    return family_view(families[int(rng.integers(len(families)))], image, rng, strengths).image


def family_view(
    family: str, image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths = PUBLISHED
) -> View:
    """One draw of a family, preserving or removing, or of the user's own (docs/methods.md).

    Raises UserError where the image cannot be read, or the user's own code fails.
    """
    if is_own(family):
        return View(own_view(family, load_rgb(image), rng), family, {})
    perturbed, parameters = _TRANSFORMS[family](load_rgb(image), rng, strengths)
    return View(perturbed, family, parameters)


def color_jitter(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Brightness, then contrast, then saturation: in this order always, the factors drawn in it too."""
    from torchvision.transforms.v2 import functional

    brightness, contrast, saturation = (
        rng.uniform(*bounds) for bounds in (strengths.brightness, strengths.contrast, strengths.saturation)
    )
    image = functional.adjust_brightness(image, brightness)
    image = functional.adjust_contrast(image, contrast)
    image = functional.adjust_saturation(image, saturation)
    return image, {"brightness": brightness, "contrast": contrast, "saturation": saturation}


def perspective(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """With `perspective_probability`, each corner moves inwards by up to distortion / 2 of a side; else none.

    The whole image stays in sight.
    """
    if rng.random() >= strengths.perspective_probability:
        return image.copy(), {"pixels_moved": 0.0}
    from torchvision.transforms.v2 import functional

    size = np.array(image.size)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * size / 2
    shifts = inwards * rng.uniform(0, strengths.perspective_distortion, size=(4, 2))
    perturbed = functional.perspective(image, corners.tolist(), (corners + shifts).tolist(), fill=0)
    return perturbed, {"pixels_moved": float(np.abs(shifts).max())}


def rotation(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Rotation about the centre by up to `rotation_degrees` either way; what leaves the frame is lost."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    angle = rng.uniform(-strengths.rotation_degrees, strengths.rotation_degrees)
    return functional.rotate(image, angle, interpolation=InterpolationMode.BILINEAR, fill=0), {"degrees": angle}


def diffusion_noise(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """`diffusion_steps` of a diffusion: sqrt(a) x + sqrt(1 - a) e on pixels in [0, 1], e standard normal, then clipped.

    `a` falls from 1 to 0.08 over 1,000 steps; the standard deviation of the noise is 28 grey levels at 200 and 128 at
    500.
    """
    kept = _signal_left()[strengths.diffusion_steps]
    pixels = np.asarray(image, dtype=np.float32) / 255
    noisy = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * rng.standard_normal(pixels.shape, dtype=np.float32)
    perturbed = Image.fromarray(np.rint(255 * noisy).clip(0, 255).astype(np.uint8))
    return perturbed, {"steps": strengths.diffusion_steps}


@lru_cache(maxsize=1)
def _signal_left() -> np.ndarray:
    """`a` after 0, 1, ... steps: the product of 1 - beta, beta a sigmoid from 1e-5 to 0.005 (NoisyRollout's
    schedule)."""
    sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, DIFFUSION_STEPS)))
    return np.concatenate([[1.0], np.cumprod(1 - (sigmoid * (0.005 - 1e-5) + 1e-5))])


def noise_rectangles(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """`noise_rectangles` rectangles of uniform noise, anywhere inside the image; they may overlap.

    Height and width are drawn apart, each a fraction `noise_side` of its own side and at least one pixel.
    """
    pixels = np.array(image)
    for _ in range(strengths.noise_rectangles):
        top, bottom = _interval(pixels.shape[0], strengths.noise_side, rng)
        left, right = _interval(pixels.shape[1], strengths.noise_side, rng)
        shape = (bottom - top, right - left, 3)
        pixels[top:bottom, left:right] = rng.integers(0, 256, size=shape, dtype=np.uint8)
    return Image.fromarray(pixels), {"rectangles": strengths.noise_rectangles}


def crop(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """A crop anywhere inside the image, resized back; width and height are drawn apart from `crop_side`."""
    left, right = _interval(image.width, strengths.crop_side, rng)
    top, bottom = _interval(image.height, strengths.crop_side, rng)
    resized = image.crop((left, top, right, bottom)).resize(image.size, Image.Resampling.BICUBIC)
    return resized, {"left": left, "top": top, "width": right - left, "height": bottom - top}


def black_patches(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Squares of a grid with side `patch_side`, from the top left, each black with `patch_probability` (PAPO)."""
    pixels = np.array(image)
    side = strengths.patch_side
    rows, columns = (-(-length // side) for length in pixels.shape[:2])
    black = rng.random((rows, columns)) < strengths.patch_probability
    pixels[black.repeat(side, axis=0).repeat(side, axis=1)[: pixels.shape[0], : pixels.shape[1]]] = 0
    return Image.fromarray(pixels), {"patches": int(black.sum())}


def static(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Uniform noise everywhere: no part of the image is left by chance, as in all other families."""
    return Image.fromarray(rng.integers(0, 256, size=(image.height, image.width, 3), dtype=np.uint8)), {}


_TRANSFORMS: dict[str, Callable[[Image.Image, np.random.Generator, ViewStrengths], Perturbed]] = {
    "color_jitter": color_jitter,
    "perspective": perspective,
    "rotation": rotation,
    "diffusion_noise": diffusion_noise,
    "noise_rectangles": noise_rectangles,
    "crop": crop,
    "black_patches": black_patches,
    "static": static,
}


def _interval(side: int, fractions: tuple[float, float], rng: np.random.Generator) -> tuple[int, int]:
    """[start, end) in pixels: a random fraction of the side, at least one pixel, at a random place on it."""
    length = max(1, round(side * rng.uniform(*fractions)))
    start = int(rng.integers(0, side - length + 1))
    return start, start + length
