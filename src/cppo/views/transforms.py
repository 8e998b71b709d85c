"""The published view families (CPPO, arXiv 2601.00501, and others), pure functions of (RGB image, Generator,
strengths).

CPPO's five families match the published code (vbdi/cppo, verl/recipe/cppo/cppo_dataset.py) except for random numbers.
Colour jitter, perspective and rotation are torchvision's transforms with its defaults. A perspective samples
bilinearly, a rotation takes the nearest pixel; both leave uncovered areas black.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from cppo.imports import is_own
from cppo.options.views import (
    DIFFUSION_STEPS,
    KNOWN_PRESERVING,
    KNOWN_REMOVING,
    PRESERVING_FAMILIES,
    REMOVING_FAMILIES,
    ViewStrengths,
)
from cppo.views.images import load_rgb
from cppo.views.own import check_families, own_view

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
    """I+, from which the answer can still be read: one of `families`, each as likely.

    Returns:
        A new RGB image of the size of `load_rgb(image)`; the input is not changed.

    Raises:
        UserError: the image cannot be read; `families` is empty, or has a name not in KNOWN_PRESERVING and not one's
            own.
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
    """I-, without what the answer needs: one of `families`, each as likely.

    Returns:
        A new RGB image of the size of `load_rgb(image)`; the input is not changed. A crop removes nothing from a single
        pixel.

    Raises:
        UserError: the image cannot be read; `families` is empty, or has a name not in KNOWN_REMOVING and not one's own.
    """
    names = check_families("families", families, KNOWN_REMOVING)
    return drawn_view(names, image, rng, strengths)


def drawn_view(
    families: Sequence[str], image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths
) -> Image.Image:
    """One draw of one of the valid `families`, each as likely.

    Raises:
        UserError: the image cannot be read, or the user's own code fails.
    """
    return family_view(families[int(rng.integers(len(families)))], image, rng, strengths).image


def family_view(
    family: str, image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths = PUBLISHED
) -> View:
    """One draw of a family: preserving, removing, or the user's own (docs/extend/extending.md).

    Raises UserError where the image cannot be read, or the user's own code fails.
    """
    if is_own(family):
        return View(own_view(family, load_rgb(image), rng), family, {})
    perturbed, parameters = _TRANSFORMS[family](load_rgb(image), rng, strengths)
    return View(perturbed, family, parameters)


def color_jitter(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Brightness, contrast and saturation in random order; the recorded values keep that order."""
    from torchvision.transforms.v2 import functional

    steps = {
        "brightness": (functional.adjust_brightness, strengths.brightness),
        "contrast": (functional.adjust_contrast, strengths.contrast),
        "saturation": (functional.adjust_saturation, strengths.saturation),
    }
    factors = {}
    for name in rng.permutation(list(steps)).tolist():
        adjust, bounds = steps[name]
        factors[name] = rng.uniform(*bounds)
        image = adjust(image, factors[name])
    return image, factors


def perspective(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """With `perspective_probability`, each corner moves inwards by up to distortion / 2 of a side; else none does.

    The whole image stays visible. An image of a single row or column has no corners to move.
    """
    if rng.random() >= strengths.perspective_probability or min(image.size) < 2:
        return image.copy(), {"pixels_moved": 0.0}
    from torchvision.transforms.v2 import functional

    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (np.array(image.size) - 1)
    moved = moved_corners(image.size, strengths.perspective_distortion, rng)
    perturbed = functional.perspective(image, corners.tolist(), moved.tolist(), fill=0)
    return perturbed, {"pixels_moved": float(np.abs(moved - corners).max())}


def moved_corners(size: tuple[int, int], distortion: float, rng: np.random.Generator) -> np.ndarray:
    """The new corners, [4, 2] in pixels (x, y), clockwise from the top left: whole pixels, drawn uniformly.

    Args:
        size: width and height in pixels.
        distortion: largest move inwards, as a fraction of half the side.
    """
    sides = np.array(size)
    inwards = rng.integers(0, (distortion * (sides // 2)).astype(np.int64) + 1, size=(4, 2))
    far = np.array([[False, False], [True, False], [True, True], [False, True]])
    return np.where(far, sides - 1 - inwards, inwards)


def rotation(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Rotation about the centre by up to `rotation_degrees` either way; areas outside the frame are lost."""
    from torchvision.transforms.v2 import functional

    angle = rng.uniform(-strengths.rotation_degrees, strengths.rotation_degrees)
    return functional.rotate(image, angle, fill=0), {"degrees": angle}


def gaussian_blur(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """A Gaussian blur of one pixel's standard deviation, cut off after one pixel; outside the image is black.

    The I+ that only CPPO's asynchronous code adds. As there, levels are rounded down and nothing is drawn.
    """
    weights = np.exp(-0.5 * np.array([-1.0, 0.0, 1.0]) ** 2)
    weights /= weights.sum()
    pixels = np.pad(np.asarray(image, dtype=np.float64), ((1, 1), (1, 1), (0, 0)))
    for axis in (0, 1):
        size = pixels.shape[axis] - 2
        pixels = sum(weight * pixels.take(range(i, i + size), axis) for i, weight in enumerate(weights))
    # Rounding may leave a level just below a whole number: take that number.
    return Image.fromarray(np.floor(pixels + 1e-3).astype(np.uint8)), {}


def diffusion_noise(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """`diffusion_steps` of a diffusion: sqrt(a) x + sqrt(1 - a) e on pixels in [0, 1], e standard normal, then clipped.

    `a` falls from 1 to 0.08 over 1,000 steps. The noise has a standard deviation of 28 grey levels at 200 steps and 128
    at 500.
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
    """`noise_rectangles` rectangles of uniform noise (0 to 254), anywhere inside the image; they may overlap.

    Height and width are drawn separately, each a fraction `noise_side` of its side and at least one pixel.
    """
    pixels = np.array(image)
    for _ in range(strengths.noise_rectangles):
        width = _pixels(image.width, rng.uniform(*strengths.noise_side))
        height = _pixels(image.height, rng.uniform(*strengths.noise_side))
        left, top = _place(image.size, (width, height), rng)
        noise = rng.integers(0, 255, size=(height, width, 3), dtype=np.uint8)
        pixels[top : top + height, left : left + width] = noise
    return Image.fromarray(pixels), {"rectangles": strengths.noise_rectangles}


def crop(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """A crop anywhere inside the image, resized back; one drawn fraction `crop_side` applies to both sides."""
    fraction = rng.uniform(*strengths.crop_side)
    width, height = (_pixels(side, fraction) for side in image.size)
    left, top = _place(image.size, (width, height), rng)
    cropped = image.crop((left, top, left + width, top + height))
    resized = cropped.resize(image.size, Image.Resampling.BILINEAR)
    return resized, {"left": left, "top": top, "width": width, "height": height}


def black_patches(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Grid squares with side `patch_side`, from the top left, each black with `patch_probability` (PAPO)."""
    pixels = np.array(image)
    side = strengths.patch_side
    rows, columns = (-(-length // side) for length in pixels.shape[:2])
    black = rng.random((rows, columns)) < strengths.patch_probability
    pixels[black.repeat(side, axis=0).repeat(side, axis=1)[: pixels.shape[0], : pixels.shape[1]]] = 0
    return Image.fromarray(pixels), {"patches": int(black.sum())}


def static(image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> Perturbed:
    """Uniform noise everywhere. All other families leave parts of the image by chance."""
    return Image.fromarray(rng.integers(0, 256, size=(image.height, image.width, 3), dtype=np.uint8)), {}


_TRANSFORMS: dict[str, Callable[[Image.Image, np.random.Generator, ViewStrengths], Perturbed]] = {
    "color_jitter": color_jitter,
    "perspective": perspective,
    "rotation": rotation,
    "gaussian_blur": gaussian_blur,
    "diffusion_noise": diffusion_noise,
    "noise_rectangles": noise_rectangles,
    "crop": crop,
    "black_patches": black_patches,
    "static": static,
}


def _pixels(side: int, fraction: float) -> int:
    """A fraction of a side in whole pixels, at least one."""
    return max(1, int(side * fraction))


def _place(size: tuple[int, int], box: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a box inside an image of that size, every place equally likely; all in pixels."""
    left, top = (int(rng.integers(0, side - part + 1)) for side, part in zip(size, box, strict=True))
    return left, top
