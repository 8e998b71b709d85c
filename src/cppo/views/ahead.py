"""Views made ahead, off the training thread, while it generates."""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from PIL import Image

from cppo.errors import UserError
from cppo.views.images import load_rgb
from cppo.views.sampler import ViewSampler

_Pair = tuple[Image.Image, Image.Image]
_Key = tuple[int, str, int, int]  # id of the image object, sample id, epoch, image index


class ViewPrefetcher:
    """A `ViewSampler` with a few threads and a bounded store. For one calling thread; close it or use `with`.

    Results are the sampler's, whether a pair was made ahead or not. Pairs are found again by image object,
    sample id, epoch and image index: give `submit` and `views` the same object; others are made anew.

    Args:
        sampler: makes the views.
        threads: worker threads, at least 1.
        max_bytes: bound on the pixels held (an image and two views, 12 bytes a pixel in Pillow); beyond it pairs
            submitted first are dropped, and made when asked for.

    Raises:
        UserError: `threads` or `max_bytes` is below 1.
    """

    def __init__(self, sampler: ViewSampler, *, threads: int = 2, max_bytes: int = 1 << 30) -> None:
        if threads < 1:
            raise UserError(f"view threads = {threads}: give at least 1")
        if max_bytes < 1:
            raise UserError(f"view max_bytes = {max_bytes}: give at least 1")
        self._sampler = sampler
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cppo-views")
        # The image stands beside its future, so that its id() is not given to another object meanwhile.
        self._pending: OrderedDict[_Key, tuple[Image.Image, Future[_Pair], int]] = OrderedDict()

    def submit(self, image: Image.Image, sample_id: str, epoch: int, image_index: int) -> None:
        """Start making the views of an image. An image that cannot be read is reported by `views`, not here.

        The image is decoded here, in the calling thread: a PIL image is not safe to decode in two threads, and the
        caller needs it decoded anyway. Raises RuntimeError once the prefetcher is closed.
        """
        key = (id(image), sample_id, epoch, image_index)
        if key in self._pending:
            return
        future: Future[_Pair]
        try:
            rgb = load_rgb(image)
        except UserError as error:
            future, size = Future(), 0
            future.set_exception(error)
        else:
            size = 12 * rgb.width * rgb.height
            future = self._pool.submit(self._sampler.views, rgb, sample_id, epoch, image_index)
        self._pending[key] = (image, future, size)
        self._held_bytes += size
        while self._held_bytes > self._max_bytes:
            self._forget(next(iter(self._pending)))

    def views(self, image: Image.Image, sample_id: str, epoch: int, image_index: int) -> _Pair:
        """The pair (I+, I-), as `ViewSampler.views` gives it: made ahead if submitted, else made now.

        A pair made ahead is handed out once and then no longer held. Raises UserError where the image cannot be read.
        """
        entry = self._forget((id(image), sample_id, epoch, image_index))
        # A future that could be cancelled was not begun: making the pair here beats waiting for its turn.
        if entry is None or entry.cancelled():
            return self._sampler.views(image, sample_id, epoch, image_index)
        return entry.result()

    def clear(self) -> None:
        """Drop all pairs that were not asked for."""
        while self._pending:
            self._forget(next(iter(self._pending)))

    def close(self) -> None:
        """Drop what is held and wait for the threads to end (each finishes at most the pair it is making)."""
        self._pending.clear()
        self._held_bytes = 0
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self, key: _Key) -> Future[_Pair] | None:
        entry = self._pending.pop(key, None)
        if entry is None:
            return None
        _, future, size = entry
        self._held_bytes -= size
        future.cancel()
        return future
