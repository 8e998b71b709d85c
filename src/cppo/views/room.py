"""A bound on the pixels that threads process at once, and so on memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

PIXELS_AT_ONCE = 25_000_000
"""The views of an image take up to 31 bytes per pixel (measured, `color_jitter`), decoding up to 7."""


class PixelRoom:
    """A semaphore over pixels: threads wait until theirs fit; a larger image is processed alone."""

    def __init__(self, pixels: int = PIXELS_AT_ONCE) -> None:
        self._pixels = pixels
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def taken(self, size: tuple[int, int]) -> Iterator[None]:
        """Context for an image of this (width, height); waits until it fits."""
        pixels = min(size[0] * size[1], self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + pixels <= self._pixels)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()
