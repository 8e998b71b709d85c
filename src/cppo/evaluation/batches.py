"""Cut records into batches, distribute them to processes, and finish the answers in a second thread."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from cppo.evaluation.processes import ALONE, Processes

S = TypeVar("S")
T = TypeVar("T")


def shared_out(
    count: int,
    size: int,
    answer: Callable[[range], Sequence[S]],
    finish: Callable[[Sequence[S]], list[T]],
    *,
    known: int = 0,
    processes: Processes = ALONE,
) -> Iterator[list[T]]:
    """The results for the records below `count`, a list for each round of batches, in order and in every process.

    Args:
        size: records of a batch.
        answer: one answer to each record of a batch, in order. With sharded weights, a process without a batch in the
            last round gets an empty one.
        finish: one result of each answer, in a second thread while the next batch is answered.
        known: number of first records that have results. A batch with other records too is answered as a whole, so that
            its padding is the same; the known ones are dropped.
        processes: the processes that call this function together.

    Raises UserError if another process failed.
    """

    def unknown(batch: range) -> Sequence[S]:
        return answer(batch)[max(0, known - batch.start) :] if batch or processes.sharded else []

    batches = [batch for batch in _batches(count, size) if batch.stop > known]
    rounds = math.ceil(len(batches) / processes.count)
    shares = [*batches, *[range(0)] * (rounds * processes.count - len(batches))][processes.index :: processes.count]
    mine = _overlapped(map(unknown, shares), finish)
    for _ in range(rounds):
        yield list(chain.from_iterable(processes.gather(lambda: next(mine))))


def _batches(count: int, size: int) -> list[range]:
    """The numbers below `count` in batches of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _overlapped(made: Iterable[S], finish: Callable[[S], T]) -> Iterator[T]:
    """`finish` of each item, in a second thread while the next item is made."""
    with ThreadPoolExecutor(1) as thread:
        before: Future[T] | None = None
        for one in made:
            following = thread.submit(finish, one)
            if before is not None:
                yield before.result()
            before = following
        if before is not None:
            yield before.result()
