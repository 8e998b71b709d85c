"""Perturbations that no training view uses, only for evaluation: training never shows them.

Training views of this package and of the published methods are colour jitter, perspective, rotation, noise (rectangles,
additive, diffusion), crops and masked patches. None of them is here; only `blur` is near a training view, the
`gaussian_blur` of `cppo-async`. No family changes hue or order of colours by more than rounding, because questions may
ask for them. There are no options: a measure must stay the same.

Preserving: what the answer needs stays readable. Details are pixels wide in small and large images alike, so blurs grow
only with the square root of the shorter side.

- `blur`: Gaussian, standard deviation 0.35 to 0.6 pixels at 64 pixels, 1.4 to 2.4 at 1,000;
- `sharpen`: unsharp mask, 50 to 100 %, with the same standard deviations;
- `jpeg`: compression at quality 40 to 70 without colour subsampling;
- `shift`: a translation by 1 to 4 % of each side either way (at least a pixel); the border is repeated.

Removing: only coarse colour stays. All grow with the image.

- `strong_blur`: Gaussian, standard deviation 15 to 20 % of the shorter side;
- `pixelate`: a mosaic of 3 or 4 cells along the shorter side, each its mean colour;
- `shuffle`: 12 to 16 square patches along the shorter side change places at random.
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from cppo.views.images import load_rgb
from cppo.views.transforms import Perturbed, View

HELD_OUT_PRESERVING = ("blur", "sharpen", "jpeg", "shift")
HELD_OUT_REMOVING = ("strong_blur", "pixelate", "shuffle")

MILD_SIGMA = (0.35, 0.6)
"""Pixels, for an image with a shorter side of `REFERENCE_SIDE`."""
REFERENCE_SIDE = 64
SHARPEN_PERCENT = (50, 100)
JPEG_QUALITY = (40, 70)
SHIFT_SIDE = (0.01, 0.04)
STRONG_SIGMA_SIDE = (0.15, 0.2)
MOSAIC_CELLS = (3, 4)
SHUFFLED_PATCHES = (12, 16)


def held_out_view(family: str, image: Image.Image, rng: np.random.Generator) -> View:
    """One draw of a held-out family: a new RGB image of the size of `load_rgb(image)`.

    A removing family hardly changes images of a few pixels. JPEG pixels may differ by one level between versions of the
    JPEG library. Raises UserError where the image cannot be read.
    """
    perturbed, parameters = _TRANSFORMS[family](load_rgb(image), rng)
    return View(perturbed, family, parameters)


def blur(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """A mild Gaussian blur."""
    sigma = _mild_sigma(image, rng)
    return image.filter(ImageFilter.GaussianBlur(sigma)), {"sigma": sigma}


def sharpen(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """Unsharp mask: image + percent (image - blurred)."""
    sigma = _mild_sigma(image, rng)
    percent = int(rng.integers(SHARPEN_PERCENT[0], SHARPEN_PERCENT[1] + 1))
    sharpened = image.filter(ImageFilter.UnsharpMask(sigma, percent, threshold=0))
    return sharpened, {"sigma": sigma, "percent": percent}


def jpeg(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """JPEG compression and decompression."""
    quality = int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    with Image.open(buffer) as compressed:
        return load_rgb(compressed), {"quality": quality}


def shift(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """A translation in both directions; border pixels fill the uncovered area."""
    right, down = (
        int(rng.choice((-1, 1))) * min(max(1, round(side * rng.uniform(*SHIFT_SIDE))), side - 1) for side in image.size
    )
    rows = np.clip(np.arange(image.height) - down, 0, image.height - 1)
    columns = np.clip(np.arange(image.width) - right, 0, image.width - 1)
    return Image.fromarray(np.asarray(image)[rows][:, columns]), {"right": right, "down": down}


def strong_blur(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """A Gaussian blur with a width proportional to the image."""
    sigma = min(image.size) * rng.uniform(*STRONG_SIGMA_SIDE)
    return image.filter(ImageFilter.GaussianBlur(sigma)), {"sigma": sigma}


def pixelate(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """A mosaic of nearly square cells."""
    cells = int(rng.integers(MOSAIC_CELLS[0], MOSAIC_CELLS[1] + 1))
    coarse = [max(1, min(side, round(cells * side / min(image.size)))) for side in image.size]
    mosaic = image.resize((coarse[0], coarse[1]), Image.Resampling.BOX)
    return mosaic.resize(image.size, Image.Resampling.NEAREST), {"cells": cells}


def shuffle(image: Image.Image, rng: np.random.Generator) -> Perturbed:
    """Square patches in random order; border pixels complete patches that reach beyond the right or lower edge."""
    patches = int(rng.integers(SHUFFLED_PATCHES[0], SHUFFLED_PATCHES[1] + 1))
    side = max(1, round(min(image.size) / patches))
    across, down = -(-image.width // side), -(-image.height // side)
    beyond = ((0, down * side - image.height), (0, across * side - image.width), (0, 0))
    grid = np.pad(np.asarray(image), beyond, mode="edge").reshape(down, side, across, side, 3).swapaxes(1, 2)
    shuffled = grid.reshape(-1, side, side, 3)[rng.permutation(down * across)]
    pixels = shuffled.reshape(down, across, side, side, 3).swapaxes(1, 2).reshape(down * side, across * side, 3)
    return Image.fromarray(pixels[: image.height, : image.width]), {"patch": side}


_TRANSFORMS: dict[str, Callable[[Image.Image, np.random.Generator], Perturbed]] = {
    "blur": blur,
    "sharpen": sharpen,
    "jpeg": jpeg,
    "shift": shift,
    "strong_blur": strong_blur,
    "pixelate": pixelate,
    "shuffle": shuffle,
}


def _mild_sigma(image: Image.Image, rng: np.random.Generator) -> float:
    return float(rng.uniform(*MILD_SIGMA) * (min(image.size) / REFERENCE_SIDE) ** 0.5)
