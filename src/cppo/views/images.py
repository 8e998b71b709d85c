"""Conversion of any PIL image to RGB. Anchor and views share it, so they yield the same image tokens."""

import base64
import contextlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms

from cppo.errors import UserError, one_line

# The transpose that undoes each EXIF orientation (Exif 2.32, tag 0x0112); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_rgb(image: Image.Image) -> Image.Image:
    """The first frame of an image, upright, in mode RGB. Idempotent.

    - The EXIF orientation is undone first, once; the result carries no metadata.
    - Transparent pixels are laid over white, so that dark drawings on a transparent ground stay readable.
    - 16-bit grey is scaled from 0..65535. Modes I and F have no declared range: the first of 0..1 (F only), 0..255 and
      0..65535 that holds every value is used, else the image's own range is stretched.
    - LAB is converted by a colour profile; CMYK and the other modes by Pillow.

    Args:
        image: any PIL image. It is decoded if needed, but not changed otherwise, and stays at its frame.

    Returns:
        A new image that shares no pixels with the input.

    Raises:
        UserError: not a PIL image, no pixels, truncated or corrupt data, values that are not finite.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"expected a PIL image, got {type(image).__name__}; open it with PIL.Image.open")
    name = f"image {getattr(image, 'filename', '') or image!r}"
    if 0 in image.size:
        raise UserError(f"{name} has no pixels (size {image.width}x{image.height}); replace or remove it")
    # Decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error, IndexError ...
    try:
        rgb = _convert(_upright(_first_frame(image)))
    except Exception as error:
        raise UserError(f"{name} cannot be read ({one_line(error)}); replace or remove it") from error
    rgb.info = {}
    return rgb


def _first_frame(image: Image.Image) -> Image.Image:
    try:
        frame = image.tell()
    except AttributeError:  # came through a pickle, e.g. from a worker, with only its pixels
        return image
    if frame == 0:
        image.load()
        return image
    # Formats that count frames from 1 (PSD) have no frame 0 and start with the whole picture.
    with contextlib.suppress(EOFError):
        image.seek(0)
    try:
        return image.copy()
    finally:
        image.seek(frame)


def _upright(image: Image.Image) -> Image.Image:
    orientation = None
    # Broken EXIF has no orientation; the picture is still usable.
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image), 0, 65535)
    if image.mode in ("I", "F"):
        tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        return _grey_of_unknown_range(np.asarray(image), tops)
    if image.mode == "LAB":
        lab, srgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("LAB", "sRGB"))
        return ImageCms.ImageCmsTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        opaque = straight.convert("RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(opaque, mask=opaque.getchannel("A"))
        return ground
    return image.convert("RGB")


def _grey_of_unknown_range(values: npt.NDArray[Any], tops: tuple[int, ...]) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are not finite")
    if low >= 0:
        for top in tops:
            if high <= top:
                return _grey(values, 0, top)
    return _grey(values, low, high)


def _grey(values: npt.NDArray[Any], low: float, high: float) -> Image.Image:
    scale = 255 / (high - low) if high > low else 0.0
    levels = np.rint((values.astype(np.float64) - low) * scale).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def image_data_uri(image: Image.Image, side: int = 320, lossless_side: int = 128) -> str:
    """A data URI for pages, scaled down to `side` pixels: PNG up to `lossless_side` (exact pixels), else JPEG."""
    small = load_rgb(image)
    small.thumbnail((side, side))
    lossless = max(small.size) <= lossless_side
    buffer = BytesIO()
    if lossless:
        small.save(buffer, format="PNG", optimize=True)
    else:
        small.save(buffer, format="JPEG", quality=85)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
