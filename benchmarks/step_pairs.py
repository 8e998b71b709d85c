"""Change of a training step's time and memory between two checkouts, measured in pairs.

Each round trains the embedded micro VLM in two fresh processes, one per checkout; the order changes from round to
round. The sizes of a step are those of the `micro` recipe, 16 prompts x 8 rollouts. A step's time runs from the end of
one step to the end of the next: data, rollouts, rewards, views, loss, backward and optimizer. Each process gives the
median of its steps after the first ones, in wall and CPU seconds, and its peak of resident memory. The output is the
median over the rounds of after / before, with the smallest and the largest.

    git worktree add ../before COMMIT
    python benchmarks/step_pairs.py --before ../before/src --after src --json step_pairs.json
    python benchmarks/step_pairs.py --before ../before/src --after src --json step_pairs.json --method cppo grpo
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counting import StepClock
from same_weights import ONE_IMAGE, make_rows, make_trainer

MEASURED = {"wall": "s", "time": "s of CPU", "memory": "MiB"}


def measure(method: str, steps: int, warm_up: int, prompts: int) -> dict[str, float]:
    """The median step of a training in this process, by each of `MEASURED`."""
    torch.set_num_threads(1)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "method": method,
            "max_steps": 1 + warm_up + steps,
            "per_device_train_batch_size": 8 * prompts,
            "num_generations": 8,
            "max_completion_length": 80,
            "temperature": 1.0,
        }
        trainer = make_trainer(folder, make_rows(ONE_IMAGE, 4 * prompts), options)
        trainer.add_callback(clock)
        trainer.train()
    peak = [log["memory/peak_rss_mib"] for log in trainer.state.log_history if "loss" in log][-1]
    return {name: median(seconds[warm_up:]) for name, seconds in clock.seconds.items()} | {"memory": peak}


def measure_on(source: Path, *arguments: Any) -> dict[str, float]:
    """`measure` in a process that imports the package from `source`."""
    program = (
        "import json, sys, counting, step_pairs; counting.keep_freed_memory();"
        "print(json.dumps(step_pairs.measure(*json.loads(sys.argv[1]))))"
    )
    paths = [str(source.resolve()), str(Path(__file__).parent)]
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def compare(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Median of the rounds before and after, and of their ratios, by each of `MEASURED`."""
    found = {}
    for name in MEASURED:
        ratios = [one["after"][name] / one["before"][name] for one in rounds]
        sides = {side: median(one[side][name] for one in rounds) for side in ("before", "after")}
        found[name] = {**sides, "ratio": median(ratios), "ratios": ratios}
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--before", type=Path, required=True, help="the folder that holds the package before the change"
    )
    parser.add_argument("--after", type=Path, required=True, help="folder of the package after it")
    parser.add_argument("--json", type=Path, required=True, help="file for every number")
    parser.add_argument("--method", nargs="+", default=["cppo", "grpo", "papo", "vppo"])
    parser.add_argument("--rounds", type=int, default=7, help="pairs of processes for each method")
    parser.add_argument("--steps", type=int, default=8, help="steps that count")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    args = parser.parse_args(arguments)
    sources = {"before": args.before, "after": args.after}
    for source in sources.values():
        if not (source / "cppo" / "__init__.py").is_file():
            parser.error(f"{source} does not hold the package `cppo`")
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {method: [] for method in args.method}
    for number in range(args.rounds):
        for method in args.method:
            order = list(sources)[:: -1 if number % 2 else 1]
            rounds[method].append(
                {side: measure_on(sources[side], method, args.steps, args.warm_up, args.prompts) for side in order}
            )
        print(f"round {number} done", file=sys.stderr)
    found = {method: compare(pairs) for method, pairs in rounds.items()}
    args.json.write_text(json.dumps({"rounds": rounds, "methods": found}, indent=1) + "\n")
    for method, values in found.items():
        for name, unit in MEASURED.items():
            one = values[name]
            spread = f"{one['ratio']:.3f} [{min(one['ratios']):.3f}, {max(one['ratios']):.3f}]"
            print(f"{method} {name}: {one['before']:.4g} -> {one['after']:.4g} {unit}, after / before {spread}")


if __name__ == "__main__":
    main(sys.argv[1:])
