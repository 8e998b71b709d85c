"""Views made ahead are the sampler's own, come from other threads, and stay within the bound."""

import io
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from cppo.errors import UserError
from cppo.views import ViewPrefetcher, ViewSampler

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)) for seed in range(8)
]
PAIR_BYTES = 12 * 16 * 24
SAMPLER = ViewSampler(3)


@dataclass(frozen=True)
class WatchedSampler(ViewSampler):
    """Notes the thread of every call; waits for `gate`."""

    threads: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def views(self, image, sample_id, epoch, image_index):
        self.threads.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(30)
        return super().views(image, sample_id, epoch, image_index)


def open_watched() -> WatchedSampler:
    sampler = WatchedSampler(3)
    sampler.gate.set()
    return sampler


def settle(sampler: WatchedSampler, calls: int) -> None:
    deadline = time.monotonic() + 30
    while len(sampler.threads) < calls and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(sampler.threads) == calls


def same(ahead: tuple[Image.Image, Image.Image], direct: tuple[Image.Image, Image.Image]) -> bool:
    return [view.tobytes() for view in ahead] == [view.tobytes() for view in direct]


@pytest.mark.parametrize("threads", [1, 4])
def test_results_are_the_samplers(threads):
    with ViewPrefetcher(SAMPLER, threads=threads) as prefetcher:
        for epoch in range(3):
            for number, picture in enumerate(PICTURES):
                prefetcher.submit(picture, f"row{number}", epoch, 0)
            for number, picture in reversed(list(enumerate(PICTURES))):
                views = prefetcher.views(picture, f"row{number}", epoch, 0)
                assert same(views, SAMPLER.views(picture, f"row{number}", epoch, 0))


def test_submitted_views_are_made_in_another_thread_and_others_here():
    sampler = open_watched()
    with ViewPrefetcher(sampler, threads=1) as prefetcher:
        prefetcher.submit(PICTURES[0], "a", 0, 0)
        prefetcher.submit(PICTURES[0], "a", 0, 0)
        settle(sampler, 1)
        first = prefetcher.views(PICTURES[0], "a", 0, 0)
        assert [name.startswith("cppo-views") for name in sampler.threads] == [True]
        # Handed out once; then, and for any other key or image, the pair is made in this thread.
        again = prefetcher.views(PICTURES[0], "a", 0, 0)
        assert same(first, again)
        prefetcher.submit(PICTURES[0], "a", 0, 1)
        settle(sampler, 3)
        for picture, key in [
            (PICTURES[0], ("a", 1, 1)),
            (PICTURES[0], ("b", 0, 1)),
            (PICTURES[1], ("a", 0, 1)),
        ]:
            assert same(prefetcher.views(picture, *key), SAMPLER.views(picture, *key))
        names = [name.startswith("cppo-views") for name in sampler.threads]
        assert names == [True, False, True, False, False, False]


def test_a_pair_not_begun_is_made_by_the_caller_instead_of_waited_for():
    sampler = WatchedSampler(3)
    with ViewPrefetcher(sampler, threads=1) as prefetcher:
        for number in range(3):
            prefetcher.submit(PICTURES[number], "a", 0, number)
        settle(sampler, 1)  # the only worker stands at the gate with the first
        views = prefetcher.views(PICTURES[2], "a", 0, 2)
        assert same(views, SAMPLER.views(PICTURES[2], "a", 0, 2))
        sampler.gate.set()
        assert same(prefetcher.views(PICTURES[0], "a", 0, 0), SAMPLER.views(PICTURES[0], "a", 0, 0))


def test_store_is_bounded_and_drops_what_was_submitted_first():
    sampler = open_watched()
    with ViewPrefetcher(sampler, threads=1, max_bytes=3 * PAIR_BYTES) as prefetcher:
        for number in range(3):
            prefetcher.submit(PICTURES[number], "a", 0, number)
        settle(sampler, 3)
        for number in range(3, 5):
            prefetcher.submit(PICTURES[number], "a", 0, number)
        settle(sampler, 5)
        for number in range(5):
            views = prefetcher.views(PICTURES[number], "a", 0, number)
            assert same(views, SAMPLER.views(PICTURES[number], "a", 0, number))
        # The first two were dropped and made again here; the other three were ready.
        assert [name.startswith("cppo-views") for name in sampler.threads] == [True] * 5 + [False] * 2
        big = Image.new("RGB", (100, 100))
        prefetcher.submit(big, "big", 0, 0)
        assert same(prefetcher.views(big, "big", 0, 0), SAMPLER.views(big, "big", 0, 0))


def test_errors_surface_at_views():
    buffer = io.BytesIO()
    PICTURES[0].save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:-300]))
    with ViewPrefetcher(SAMPLER) as prefetcher:
        prefetcher.submit(cut, "cut", 0, 0)
        prefetcher.submit(PICTURES[1], "good", 0, 0)
        with pytest.raises(UserError, match="cannot be read"):
            prefetcher.views(cut, "cut", 0, 0)
        assert same(prefetcher.views(PICTURES[1], "good", 0, 0), SAMPLER.views(PICTURES[1], "good", 0, 0))


def test_errors_of_the_worker_surface_at_views():
    class Failing(ViewSampler):
        def views(self, image, sample_id, epoch, image_index):
            raise UserError("no views today")

    with ViewPrefetcher(Failing(0)) as prefetcher:
        prefetcher.submit(PICTURES[0], "a", 0, 0)
        with pytest.raises(UserError, match="no views today"):
            prefetcher.views(PICTURES[0], "a", 0, 0)


def test_the_submitted_image_may_be_changed_afterwards():
    sampler = WatchedSampler(3)
    with ViewPrefetcher(sampler, threads=1) as prefetcher:
        picture = PICTURES[0].copy()
        prefetcher.submit(picture, "a", 0, 0)
        settle(sampler, 1)
        picture.paste("red", (0, 0, 24, 16))
        sampler.gate.set()
        assert same(prefetcher.views(picture, "a", 0, 0), SAMPLER.views(PICTURES[0], "a", 0, 0))


def test_close_ends_the_threads_and_drops_what_waits():
    sampler = open_watched()
    already = {thread.name for thread in threading.enumerate()}
    prefetcher = ViewPrefetcher(sampler, threads=2)
    for number, picture in enumerate(PICTURES * 20):
        prefetcher.submit(picture, "a", 0, number)
    prefetcher.close()
    prefetcher.close()
    assert {thread.name for thread in threading.enumerate()} <= already
    made = len(sampler.threads)
    assert same(prefetcher.views(PICTURES[0], "a", 0, 0), SAMPLER.views(PICTURES[0], "a", 0, 0))
    assert len(sampler.threads) == made + 1
    with pytest.raises(RuntimeError):
        prefetcher.submit(PICTURES[0], "a", 9, 0)


def test_bad_options():
    with pytest.raises(UserError, match="threads = 0"):
        ViewPrefetcher(SAMPLER, threads=0)
    with pytest.raises(UserError, match="max_bytes = 0"):
        ViewPrefetcher(SAMPLER, max_bytes=0)
