"""Records cut into batches, dealt to processes, answered in turn and finished in a second thread."""

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
        answer: one answer to each record of a batch, in order. A process without a batch in the last round gets an
            empty one where weights are sharded.
        finish: one result of each answer, in a second thread while the next batch is answered.
        known: the first so many records have results already. A batch that holds other records too is answered as a
            whole, so that it is padded as before, and the known ones are dropped.
        processes: those that call this function together.

    Raises UserError where another process failed.
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
    """The numbers below `count`, `size` together."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _overlapped(made: Iterable[S], finish: Callable[[S], T]) -> Iterator[T]:
    """`finish` of each, in a second thread while the next one is made."""
    with ThreadPoolExecutor(1) as thread:
        before: Future[T] | None = None
        for one in made:
            following = thread.submit(finish, one)
            if before is not None:
                yield before.result()
            before = following
        if before is not None:
            yield before.result()
