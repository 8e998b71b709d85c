"""Time of each method's step relative to GRPO's, from pairs of short trainings of the micro VLM, in turn.

For each method, a round trains two fresh copies of the embedded micro VLM, one with GRPO and one with the method. Both
have the same seed, data and number of rollouts; the order changes from round to round. The options are those of the
study `methods-micro` where it has the method, else the `micro` recipe's: 16 prompts x 8 rollouts, or 128 x 1 for a
method without groups. A step's time runs from the end of one optimizer step to the end of the next, without the first:
data, rollouts, rewards, views, loss, backward and optimizer. Per method, the file keeps the ratios of the median steps:
median, smallest and largest.

The file is written after each pair. The same command continues a stopped measurement and keeps its pairs, unless
`--anew` is given.

    python benchmarks/method_cost.py --json docs/results/method_cost.json
    python benchmarks/method_cost.py --json cost.json --methods papo vppo --rounds 1 --steps 3
    python benchmarks/method_docs.py          # writes the tables of the pages about methods, including this one
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counting import CLOCKS, StepClock, keep_freed_memory
from step_cost import provenance
from transformers import PrinterCallback

from cppo import CPPOTrainer
from cppo.assets import resolve_model
from cppo.comparison.study import load_study
from cppo.data import to_dataset
from cppo.methods import METHODS, group_of
from cppo.recipes import load_recipe
from cppo.runs.prepare import build_config
from cppo.runs.sources import load_sources

CONTROL, STUDY = "grpo", "methods-micro"


def measured_methods() -> list[str]:
    """All methods except GRPO itself and CPPO's ablations, which run CPPO's passes or fewer."""
    return [name for name, method in METHODS.items() if name != CONTROL and group_of(method) != "ablations"]


def options_of(method: str) -> dict[str, Any]:
    """The method with the study's options for it on the micro VLM."""
    variants = {variant.label: variant.options for variant in load_study(STUDY).variants}
    return {"method": method, **variants.get(method, {})}


def train(method: str, steps: int, prompts: int, seed: int) -> dict[str, float]:
    """The median step, in seconds by each of `CLOCKS`, and the tokens of a response."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"output_dir": folder, "max_steps": steps, "save_strategy": "no", "seed": seed, "disable_tqdm": True}
        run["baseline_init_samples"] = 0  # a pass over the data before the first step, and no part of one
        recipe = load_recipe(
            "train", "micro", {**run, "per_device_train_batch_size": 8 * prompts, **options_of(method)}
        )
        sources = load_sources(recipe)
        dataset = to_dataset(sources.train)
        trainer = CPPOTrainer(resolve_model("micro"), sources.rewards, build_config(recipe), dataset)
        trainer.remove_callback(PrinterCallback)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    return {name: median(values) for name, values in clock.seconds.items()} | {"tokens": median(clock.response_tokens)}


def summary(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The ratios of a method's steps to GRPO's, by each of `CLOCKS`: median, smallest, largest."""
    found: dict[str, Any] = {"pairs": len(pairs)}
    for name in CLOCKS:
        ratios = [pair["method"][name] / pair[CONTROL][name] for pair in pairs]
        found[name] = {"ratio": median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for every number; an existing one is continued")
    parser.add_argument("--methods", nargs="+", choices=measured_methods(), default=measured_methods())
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each method")
    parser.add_argument("--steps", type=int, default=6, help="steps of each training; the first is not counted")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    parser.add_argument("--anew", action="store_true", help="drop the pairs that the file has")
    parser.add_argument("--conditions", default="", help="a sentence on what else the machine did, for the record")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"steps": args.steps, "prompts": args.prompts}
    result: dict[str, Any] = {"sizes": sizes, "pairs": {}}
    if args.json.exists() and not args.anew:
        result = json.loads(args.json.read_text())
        if result["sizes"] != sizes:
            parser.error(f"{args.json} has pairs of other sizes, {result['sizes']}: give them, another file or --anew")
    for number in range(args.rounds):
        for method in args.methods:
            pairs = result["pairs"].setdefault(method, [])
            if len(pairs) > number:
                continue
            order = [CONTROL, method][:: -1 if number % 2 else 1]
            found = {name: train(name, args.steps, args.prompts, number) for name in order}
            pairs.append({CONTROL: found[CONTROL], "method": found[method], "load": os.getloadavg()[0]})
            result |= provenance("method_cost", arguments) | {"threads": 1, "conditions": args.conditions}
            result["methods"] = {name: summary(pairs) for name, pairs in result["pairs"].items() if pairs}
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            ratio = found[method]["wall"] / found[CONTROL]["wall"]
            print(f"round {number} {method}: {found[method]['wall']:.2f} s, {ratio:.2f} of GRPO's", file=sys.stderr)


if __name__ == "__main__":
    keep_freed_memory()
    main(sys.argv[1:])
