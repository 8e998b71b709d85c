"""Cost of the published split into micro-batches: one step's 40 rollouts of 8 prompts, split in several ways.

The recipe `cppo-paper` splits groups of 5 rollouts into micro-batches of 8, `cppo-paper-7b` into micro-batches of 2,
and `cppo-3b` into whole groups. Model, injected rollouts and timing are those of `step_cost.py`. The splits take turns
in one process, and a ratio is the median of the rounds' ratios.

    python benchmarks/micro_batch.py --json micro_batch.json
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counting import keep_freed_memory, stopwatch
from stand_in import build_model
from step_cost import Case, Variant, buffered_batches, make_rows, make_trainer, measure, provenance, rollouts, update

from cppo import CPPOTrainer

GROUPS, GENERATIONS = 8, 5
PUBLISHED_LOSS = {"loss_type": "bnpo", "delta": 3.0, "perception_normalization": "microbatch"}


def cut_into(size: int, **options: Any) -> Variant:
    """CPPO with the step split into micro-batches of `size` rollouts."""
    parts = GROUPS * GENERATIONS // size
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
    return Variant(CPPOTrainer, {**sizes, **options})


CUTS = {
    "cppo-3b": cut_into(5),
    "cppo-paper": cut_into(8, **PUBLISHED_LOSS),
    "cppo-paper-7b": cut_into(2, **PUBLISHED_LOSS),
    "cppo-paper, nothing shared": cut_into(8, **PUBLISHED_LOSS, scorer="kernel"),
}
"""By recipe; the others are compared with the first."""


def run_case(case: Case, model: Any, processor: Any, args: Any) -> dict[str, Any]:
    """All splits of one step: counts once, then `args.runs` rounds of timed updates, in turn."""
    rows = make_rows(case, args.scale)
    trainers = {name: make_trainer(cut, case, args.scale, model, processor, args) for name, cut in CUTS.items()}
    batches = {name: buffered_batches(trainer, rows) for name, trainer in trainers.items()}
    first = next(iter(CUTS))
    assert all(rollouts(parts) == rollouts(batches[first]) for parts in batches.values())
    found = {name: measure(CUTS[name], trainers[name], batches[name]) for name in CUTS}
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu_seconds": [], "wall_seconds": []} for name in CUTS}
    for _ in range(args.runs):
        for name in CUTS:
            with stopwatch(seconds[name]):
                update(trainers[name], batches[name])
    for name, times in seconds.items():
        runs = zip(times["cpu_seconds"], seconds[first]["cpu_seconds"], strict=True)
        time_ratios = sorted(own / recommended for own, recommended in runs)
        found[name] |= {
            "micro_batches": len(batches[name]),
            "prompt_passes": sum(len(part["prompt_ids"].unique(dim=0)) for part in batches[name]),
            "cpu_seconds": median(times["cpu_seconds"]),
            "cpu_seconds_runs": times["cpu_seconds"],
            "time_ratio": median(time_ratios),
            "time_ratio_range": [time_ratios[0], time_ratios[-1]],
            **{f"{key}_ratio": found[name][key] / found[first][key] for key in ("flops", "peak_bytes")},
        }
    return {"name": case.name, "cuts": found}


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table: time with smallest and largest ratio, FLOPs and memory, as multiples of the first split's."""
    names = list(CUTS)[1:]
    lines = ["| case | " + " | ".join(f"`{name}` / `{next(iter(CUTS))}`" for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for case in cases:
        cells = []
        for name in names:
            cut = case["cuts"][name]
            low, high = cut["time_ratio_range"]
            time = f"{cut['time_ratio']:.2f} [{low:.2f}, {high:.2f}]"
            cells.append(f"{time} / {cut['flops_ratio']:.2f} / {cut['peak_bytes_ratio']:.2f}")
        lines.append(f"| `{case['name']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for every number")
    parser.add_argument("--scale", type=int, default=8, help="image, text and response tokens are divided by it")
    parser.add_argument("--responses", type=int, nargs="+", default=[300, 1000], help="response tokens before scaling")
    parser.add_argument("--runs", type=int, default=5, help="timed updates of each cut")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all cuts")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    model, processor = build_model(args.vocabulary, seed=0)
    result: dict[str, Any] = {"cases": [], **provenance("micro_batch", arguments), "dtype": "float32"}
    for response in args.responses:
        case = Case(300, response, generations=GENERATIONS, accumulation=GROUPS)
        result["cases"].append(run_case(case, model, processor, args))
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["cases"]))


if __name__ == "__main__":
    keep_freed_memory()
    main(sys.argv[1:])
