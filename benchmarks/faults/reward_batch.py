"""Time for a batch of answers with endless comparisons: `python benchmarks/faults/reward_batch.py`.

Prints the figures of docs/results/reliability.md, a row for each batch: answers, budget, seconds, answers not finished.
"""

import argparse
import time

from cppo.rewards import get_accuracy_reward
from cppo.rewards.worker import shared_pool

RUNAWAY = r"<think> a </think> \boxed{%d^{5^{5^{5^5}}}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--budget", type=float, default=60.0)
    options = parser.parse_args()
    shared_pool().equivalent("2x+1", "1+2x", 60.0)  # a run's first step includes the start of math-verify
    for count in options.answers:
        logged: dict[str, float] = {}
        texts = [RUNAWAY % number for number in range(5, 5 + count)]
        start = time.perf_counter()
        rewards = get_accuracy_reward(budget=options.budget)(
            texts, answer=[r"2^{x}"] * count, log_metric=logged.__setitem__
        )
        assert rewards == [0.0] * count
        seconds = time.perf_counter() - start
        unfinished = int(logged["rewards/accuracy_reward/unfinished"])
        print(f"| {count} | {shared_pool().size} | {options.budget:g} | {seconds:.1f} | {unfinished} |", flush=True)


if __name__ == "__main__":
    main()
