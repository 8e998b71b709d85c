"""Runs killed at random moments and resumed: `python benchmarks/faults/kills.py --runs 20 --kills 3 --seed 1`.

A run of six steps saves every step. SIGKILL ends it at a random moment of its length; the same command with
`--resume_from_checkpoint auto` continues and is also killed, up to `--kills` times. Then it runs to its end. Prints the
figures of docs/results/reliability.md: how many runs left the same files as the uninterrupted run.

Measured with Python 3.11, torch 2.14.1, transformers 5.24 and trl 1.16, in about five minutes on two shared cores.
"""

import argparse
import random
import time
from collections import Counter
from pathlib import Path

from small_run import Started, left_behind, train_command, versions, workplace

# Two optimizer steps per generation batch, twice: most checkpoints are in the middle of a buffer.
BUFFERED = ("--steps_per_generation", 2, "--gradient_accumulation_steps", 1, "--num_iterations", 2)


def killed_run(folder: Path, run: Path, kills: int, length: float, draw: random.Random) -> list[str]:
    """Kill a run this many times and let it end; returns the newest checkpoint at each kill."""
    moments = []
    argv = train_command(folder, run, *BUFFERED, "--resume_from_checkpoint", "auto")
    for _ in range(kills):
        started = Started(argv, folder / "log.txt")
        while not (run / "config.yaml").is_file() and started.processes[0].is_alive():
            time.sleep(0.01)
        started.processes[0].join(draw.uniform(0, 0.9 * length))
        started.kill()
        if (run / "summary.json").is_file():
            break
        found = sorted(path.name for path in run.glob("checkpoint-*"))
        moments.append(found[-1] if found else "no checkpoint")
    if not (run / "summary.json").is_file():
        started = Started(argv, folder / "log.txt")
        assert started.wait() == [0], started.log.read_text()
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    print(versions(), flush=True)
    with workplace() as folder:
        whole = folder / "whole"
        started = Started(train_command(folder, whole, *BUFFERED), folder / "log.txt")
        while not (whole / "config.yaml").is_file() and started.processes[0].is_alive():
            time.sleep(0.01)
        began = time.monotonic()
        assert started.wait() == [0], started.log.read_text()
        length, expected = time.monotonic() - began, left_behind(whole)
        equal: Counter[str] = Counter()
        killed: Counter[str] = Counter()
        for number in range(options.runs):
            run = folder / f"run-{number}"
            killed.update(killed_run(folder, run, options.kills, length, draw))
            found = left_behind(run)
            same = {name for name in expected if found[name] == expected[name]}
            equal.update(same)
            equal["all of it"] += len(same) == len(expected)
    print(f"kills by the newest checkpoint, whole or not: {dict(sorted(killed.items()))}")
    print(
        f"| {options.runs} | {killed.total()} | "
        + " | ".join(f"{equal[name]}" for name in (*expected, "all of it"))
        + " |"
    )


if __name__ == "__main__":
    main()
