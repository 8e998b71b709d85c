"""Damaged checkpoints: `python benchmarks/faults/corrupt.py --flips 20 --seed 0`.

Every file of the checkpoints of a run, of a run with LoRA and of a run on two ranks is damaged in a copy: deleted, cut
to a random length, and `--flips` times with one random bit flipped. Prints the figures of docs/results/reliability.md:
how much damage was found, how often with the file's name, and how many intact copies were reported as damaged.

Measured with Python 3.11, torch 2.14.1, transformers 5.24 and trl 1.16, in about a minute on two shared cores.
"""

import argparse
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from small_run import Started, train_command, versions, workplace

from cppo.checkpoints import damage


def drop(file: Path, draw: random.Random) -> None:
    file.unlink()


def cut(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def found(whole: Path, name: Path, harm: Callable[[Path], None]) -> tuple[bool, bool]:
    """Whether the damage to a copy's file is found, and whether the message names the file."""
    copy = whole.parent / "copy"
    shutil.copytree(whole, copy)
    try:
        harm(copy / name)
        fault = damage(copy)
    finally:
        shutil.rmtree(copy)
    return fault is not None, name.as_posix() in (fault or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=20, help="of each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    print(versions(), flush=True)
    with workplace() as folder:
        kinds = {"one process": ((), 1), "LoRA": (("--use_peft", "true"), 1), "two processes": ((), 2)}
        for kind, (more, ranks) in kinds.items():
            run = folder / kind.replace(" ", "-")
            short = ("--max_steps", 1, "--probe_steps", 0, "--final_eval_samples", 0)
            started = Started(train_command(folder, run, *short, *more), folder / "log.txt", ranks)
            assert started.wait() == [0] * ranks, started.log.read_text()
            whole = run / "checkpoint-1"
            names = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
            harms = {"dropped": (drop, 1), "cut": (cut, 1), "one bit": (flip, options.flips)}
            false_alarms = sum(found(whole, name, lambda file: None)[0] for name in names)
            cells = []
            for harm, times in harms.values():
                results = [found(whole, name, partial(harm, draw=draw)) for name in names for _ in range(times)]
                hits, named = (sum(column) for column in zip(*results, strict=True))
                cells.append(f"{hits} of {len(results)} ({named} by name)")
            print(f"| {kind} | {len(names)} | {' | '.join(cells)} | {false_alarms} of {len(names)} |", flush=True)


if __name__ == "__main__":
    main()
