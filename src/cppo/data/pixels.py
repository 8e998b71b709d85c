"""How large an image is shown to the model: bounds on its pixels."""

from dataclasses import dataclass
from math import isqrt

from PIL import Image

from cppo.data.images import MAX_PIXELS
from cppo.errors import UserError


@dataclass(frozen=True)
class PixelBounds:
    """The least and the largest number of pixels (width times height) of an image; None for no bound.

    Raises UserError for a bound outside 1 to `MAX_PIXELS`, or a least above the largest.
    """

    least: int | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        for name, bound in (("min_pixels", self.least), ("max_pixels", self.largest)):
            if bound is not None and not 1 <= bound <= MAX_PIXELS:
                raise UserError(f"{name} = {bound}: give a whole number from 1 to {MAX_PIXELS:,}")
        if self.least is not None and self.largest is not None and self.least > self.largest:
            raise UserError(f"min_pixels = {self.least} is more than max_pixels = {self.largest}")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) nearest to the image's own that lies within the bounds and keeps its shape.

        Sides are whole numbers, rounded towards the inside of the bound. Where no whole sides keep both bounds, the
        upper one holds.
        """
        new = width, height
        if self.least is not None and width * height < self.least:
            # The least n with n² >= width · least / height, and likewise for the height.
            new = isqrt((width * self.least - 1) // height) + 1, isqrt((height * self.least - 1) // width) + 1
        if self.largest is not None and new[0] * new[1] > self.largest:
            new = isqrt(width * self.largest // height), isqrt(height * self.largest // width)
            # A side of an extremely long image would be rounded to nothing.
            new = min(max(new[0], 1), self.largest), min(max(new[1], 1), self.largest)
        return new

    def apply(self, image: Image.Image) -> Image.Image:
        """The image itself if it lies within the bounds, else a copy scaled by bicubic interpolation."""
        size = self.size(*image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


ANY_SIZE = PixelBounds()
"""No bounds."""
