"""Cost of a whole training step of the micro recipe, rollouts included: CPPO and shared GRPO against TRL's GRPO.

Each round trains three fresh copies of the embedded micro VLM for a few steps, one after another, on the same prompts
from the same seed: TRL's own `GRPOTrainer`, `CPPOTrainer` with `method: grpo`, and with `method: cppo`. A step's time
runs from the end of one optimizer step to the end of the next, without the first: data, rollouts, rewards, views, loss,
backward and optimizer. Each trainer samples its own responses, as in real training.

    python benchmarks/train_step.py --json train_step.json
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from counting import CLOCKS, StepClock, keep_freed_memory
from step_cost import provenance
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from cppo import CPPOTrainer
from cppo.assets import resolve_model
from cppo.data import load_records, to_dataset
from cppo.recipes import load_recipe
from cppo.rewards import accuracy_reward, format_reward
from cppo.runs.prepare import build_config

VARIANTS = ("trl_grpo", "shared_grpo", "cppo")


def train(variant: str, steps: int, seed: int, folder: str) -> StepClock:
    """A few steps of the micro recipe, with the cost of each."""
    options = {"output_dir": folder, "max_steps": steps, "save_strategy": "no", "seed": seed, "disable_tqdm": True}
    recipe = load_recipe("train", "micro", {**options, "method": "cppo" if variant == "cppo" else "grpo"})
    trainer_class, args = CPPOTrainer, build_config(recipe)
    if variant == "trl_grpo":
        inherited = {field.name for field in fields(GRPOConfig) if field.init} & recipe.config.keys()
        trainer_class = GRPOTrainer
        given = {name: recipe.config[name] for name in inherited}
        args = GRPOConfig(**given, reward_weights=args.reward_weights)
    dataset = to_dataset(load_records(recipe.options.data, split="train"))
    trainer = trainer_class(resolve_model("micro"), [accuracy_reward, format_reward], args, dataset)
    trainer.remove_callback(PrinterCallback)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for every number")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each variant, taking turns")
    parser.add_argument("--steps", type=int, default=9, help="steps of each training; the first is not counted")
    args = parser.parse_args(arguments)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.rounds):
            found = {}
            for variant in VARIANTS:
                clock = train(variant, args.steps, seed, folder)
                found[variant] = {f"{name}_seconds": median(values) for name, values in clock.seconds.items()}
                found[variant]["response_tokens"] = median(clock.response_tokens)
            rounds.append(found)
            print(f"round {seed} done", file=sys.stderr)
    result: dict[str, Any] = {
        "rounds": rounds,
        **provenance("train_step", arguments),
        "threads": torch.get_num_threads(),
    }
    for variant in VARIANTS[1:]:
        result[variant] = {}
        for name in CLOCKS:
            ratios = [found[variant][f"{name}_seconds"] / found["trl_grpo"][f"{name}_seconds"] for found in rounds]
            result[variant] |= {f"{name}_ratio": median(ratios), f"{name}_ratios": ratios}
        values = ", ".join(f"{ratio:.2f}" for ratio in result[variant]["wall_ratios"])
        print(f"{variant} / trl_grpo: wall {result[variant]['wall_ratio']:.2f} ({values})")
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    keep_freed_memory()
    main(sys.argv[1:])
