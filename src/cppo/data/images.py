"""Images of a row: allowed paths, decoding, and the size that the model sees."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from io import BytesIO
from math import isqrt
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from cppo.data.jpeg import ends_early
from cppo.data.tables import TableImage
from cppo.errors import UserError, one_line
from cppo.views import PixelRoom, load_rgb

# A closed list: some of Pillow's other decoders start external programs (EPS) or are rarely tested.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

MAX_PIXELS = 100_000_000
"""Larger images are refused before decoding: a small file may unpack to any size."""
MAX_ASPECT_RATIO = 200
"""Limit of longer side / shorter side; Qwen-VL's processors refuse more."""

_URL = re.compile(r"(?:file|data):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)

EncodedImage = Path | bytes | TableImage
ImageRef = EncodedImage | Image.Image


class RowError(Exception):
    """One row cannot be used; the text is the reason, without the row's place."""


class OtherImages(RowError):
    """A row has another number of images than requested."""


def image_ref(value: Any, folder: Path | None) -> ImageRef:
    """Turn one given image into an object that `decode_image` reads later.

    `value` is a path relative to `folder`, encoded bytes, {"bytes": ..., "path": ...} as `datasets` writes it, or a PIL
    image (converted to RGB at once). Raises RowError for another type, for a missing file, and for a path that leaves
    `folder` (absolute, through `..` or a symlink).
    """
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        try:
            return load_rgb(value)
        except UserError as error:
            raise RowError(str(error)) from error
    if isinstance(value, bytes | TableImage):
        return value
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"images must be file paths, found {value!r:.80}")
    if _URL.match(value):
        raise RowError(f"image {value!r:.200} is a URL: images must be files in the folder of the data")
    if folder is None:
        raise RowError(f"image {value!r:.200} is a path, but these rows have no folder")
    try:
        path = (folder / value).resolve()
        inside = not Path(value).is_absolute() and path.is_relative_to(folder)
        exists = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise RowError(f"image {value!r:.200} is not a usable path: {one_line(error)}") from error
    if not inside:
        raise RowError(f"image {value!r:.200} leaves the folder of the data file")
    if not exists:
        raise RowError(f"image {value!r:.200} does not exist or is not a file")
    return path


def decode_image(ref: ImageRef) -> Image.Image:
    """Decode to RGB, upright, first frame. Raises RowError for anything that Pillow cannot read."""
    if isinstance(ref, Image.Image):
        return ref
    with _opened(ref) as (image, _):
        return load_rgb(image)


@dataclass(frozen=True)
class ImageFacts:
    """Facts of an image: (width, height) in pixels, and a digest of its pixels."""

    size: tuple[int, int]
    digest: str

    @classmethod
    def of(cls, image: Image.Image) -> "ImageFacts":
        return cls(image.size, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest())


def check_image(
    ref: EncodedImage, folder: Path | None = None, room: PixelRoom | None = None, *, with_facts: bool = False
) -> ImageFacts | None:
    """Read all data of an image. Raises RowError if any part cannot be read.

    Args:
        folder: messages name a file by its path in this folder.
        room: limits how much the threads decode at once.
        with_facts: return the facts of the image as shown. Without them a JPEG is read cheaply.
    """
    with _opened(ref, folder, room) as (image, data):
        if image.format == "JPEG":
            if ends_early(data):
                raise ValueError("its data ends before the picture does; decoders would fill the rest with one colour")
            if not with_facts:
                return None
        rgb = load_rgb(image)
        return ImageFacts.of(rgb) if with_facts else None


@contextmanager
def _opened(
    ref: EncodedImage, folder: Path | None = None, room: PixelRoom | None = None
) -> Iterator[tuple[Image.Image, bytes]]:
    """An opened, not yet decoded image, and its data. Every error inside becomes a RowError."""
    name = repr(_path_in(ref, folder)) if isinstance(ref, Path) else ""
    try:
        data = encoded_bytes(ref)
        name = name or f"({len(data)} bytes)"
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            longer, shorter = max(image.size), min(image.size)
            if longer >= MAX_ASPECT_RATIO * max(shorter, 1):
                raise ValueError(f"one side of {image.width} x {image.height} is {MAX_ASPECT_RATIO} times the other")
            with nullcontext() if room is None else room.taken(image.size):
                yield image, data
    except UnidentifiedImageError as error:
        raise RowError(f"image {name} is broken or none of {', '.join(IMAGE_FORMATS)}") from error
    # Decoders raise nearly everything for broken files: OSError, SyntaxError, struct.error, zlib.error ...
    except Exception as error:
        raise RowError(f"image {name} cannot be read: {one_line(error)}") from error


def encoded_bytes(ref: EncodedImage) -> bytes:
    """The bytes of an image's file."""
    if isinstance(ref, bytes):
        return ref
    return ref.read() if isinstance(ref, TableImage) else ref.read_bytes()


def _path_in(path: Path, folder: Path | None) -> str:
    return str(path.relative_to(folder)) if folder is not None and path.is_relative_to(folder) else path.name


@dataclass(frozen=True)
class PixelBounds:
    """Least and largest number of pixels (width times height) of an image; None for no bound.

    `min_side` bounds the shorter side, in pixels: smaller images are enlarged, as the code of arXiv 2601.00501 does for
    28. Fields have the names of the options. Raises UserError for a bound outside 1 to `MAX_PIXELS`, or a least above
    the largest.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    min_side: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "PixelBounds":
        """The bounds from a command's or a run's options."""
        return cls(**{one.name: options.get(one.name) for one in fields(cls)})

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound is not None and not 1 <= bound <= MAX_PIXELS:
                raise UserError(f"{name} = {bound}: give a whole number from 1 to {MAX_PIXELS:,}")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise UserError(f"min_pixels = {self.min_pixels} is more than max_pixels = {self.max_pixels}")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The nearest (width, height) within the bounds that keeps the image's shape.

        `min_side` is applied first, and the longer side is rounded to the nearest pixel. Then the pixel bounds are
        applied; sides are rounded towards the inside of the bound. If no whole sides keep all bounds, `max_pixels`
        (else `MAX_PIXELS`) wins.
        """
        if self.min_side is not None and min(width, height) < self.min_side:
            factor = self.min_side / min(width, height)
            width, height = round(width * factor), round(height * factor)
        new = width, height
        least, largest = self.min_pixels, self.max_pixels or MAX_PIXELS
        if least is not None and width * height < least:
            # The least n with n² >= width · least / height, and likewise for the height.
            new = isqrt((width * least - 1) // height) + 1, isqrt((height * least - 1) // width) + 1
        if new[0] * new[1] > largest:
            new = isqrt(width * largest // height), isqrt(height * largest // width)
            # Rounding would make a side of an extremely long image 0.
            new = min(max(new[0], 1), largest), min(max(new[1], 1), largest)
            # Rounding makes the shorter side of a thin image too small for the models' processors.
            longest = MAX_ASPECT_RATIO * min(new) - 1
            new = min(new[0], longest), min(new[1], longest)
        return new

    def apply(self, image: Image.Image) -> Image.Image:
        """The image itself if it lies within the bounds, else a scaled copy.

        Scaling is bicubic; enlarging to `min_side` uses Lanczos interpolation, as published.
        """
        size = self.size(*image.size)
        is_thin = self.min_side is not None and min(image.size) < self.min_side
        method = Image.Resampling.LANCZOS if is_thin else Image.Resampling.BICUBIC
        return image if size == image.size else image.resize(size, method)


ANY_SIZE = PixelBounds()
"""No bounds."""
