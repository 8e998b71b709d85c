"""Time of the accuracy reward for 10,000 distinct answers on one core: `python benchmarks/reward_speed.py`.

Cold is the first call of a process, which starts math-verify and loads the table of units; warm is the second, on other
answers of the same kinds. Prints one row per kind, and one for all mixed, in seconds of processor time, including the
checker's.
"""

import argparse
import itertools
import time
from collections.abc import Iterator

import psutil

from cppo.rewards import get_accuracy_reward
from cppo.rewards.worker import shared_pool

KINDS = {
    "option letters": ("B", r"B. text {}"),
    "numbers": ("7", "{}"),
    "numbers with units": ("7 cm", r"{}\text{{ cm}}"),
    "words": ("blue", "blue {}"),
    "lists and tuples": ("(3, 4)", "({}, 4)"),
    "closed forms": (r"2\sqrt{3}", r"{}\sqrt{{5}}"),
    "expressions": ("2x+1", "{}x+1"),
}
MIX = ("option letters", "numbers", "numbers", "numbers with units", "words", "lists and tuples", "closed forms")
"""A batch as in training on geometry and charts: one of seven answers needs math-verify."""


def answers(kind: str, numbers: Iterator[int]) -> Iterator[tuple[str, str]]:
    expected, given = KINDS[kind]
    for number in numbers:
        yield expected, rf"<think> a </think> \boxed{{{given.format(number)}}}"


def processor_seconds() -> float:
    running = [psutil.Process(pid).cpu_times() for pid in shared_pool().pids]
    ended = psutil.Process().cpu_times()
    return time.process_time() + sum(times.user + times.system for times in running) + sum(ended[2:4])


def timed(pairs: list[tuple[str, str]]) -> float:
    start = processor_seconds()
    get_accuracy_reward(budget=3600.0)([text for _, text in pairs], answer=[expected for expected, _ in pairs])
    return processor_seconds() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=10_000)
    count = parser.parse_args().answers
    numbers = itertools.count(10)

    def mixed() -> list[tuple[str, str]]:
        streams = [answers(kind, numbers) for kind in MIX]
        return list(itertools.islice(itertools.chain.from_iterable(zip(*streams, strict=True)), count))

    print(f"| all, mixed | {timed(mixed()):.1f} | {timed(mixed()):.1f} |", flush=True)
    for kind in KINDS:
        print(f"| {kind} | | {timed(list(itertools.islice(answers(kind, numbers), count))):.1f} |", flush=True)


if __name__ == "__main__":
    main()
