"""Cost of one policy update: CPPO and shared GRPO against TRL's own GRPOTrainer, in one process.

Every variant is a trainer with a copy of one random Qwen2.5-VL. Completions and rewards are injected, so that all
trainers have the same rollouts and a chosen share of them has a positive advantage; the trainer itself computes
advantages, views and micro-batches. The measurement covers an optimizer step on these: loss and backward of each
micro-batch. Time is the CPU time of the process, because others may use the machine.

    python benchmarks/step_cost.py --json step_cost.json
    python benchmarks/step_cost.py --json headline.json --case 400/100/400-G8-half

A case's name gives image, text and response tokens of a rollout, the rollouts G of a group and the share of them with a
positive advantage; `--scale` divides the three lengths. `perturbed1`: CPPO with `perception_rollouts_per_group: 1`.
"""

import argparse
import copy
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from counting import ATTENTION_FLOPS, PeakBytes, keep_freed_memory, stopwatch
from datasets import Dataset
from stand_in import build_model, image_of
from torch.utils.flop_counter import FlopCounterMode
from trl import GRPOConfig, GRPOTrainer

from cppo import CPPOConfig, CPPOTrainer

FIRST_TEXT_ID = 7
"""Smaller ids are special tokens."""


@dataclass(frozen=True)
class Case:
    """Tokens of a rollout before scaling, rollouts per group, share with a positive advantage, micro-batches per step.

    `perturbed` limits the rollouts of a group that CPPO scores under the views.
    """

    image: int
    response: int
    generations: int = 8
    share: Fraction = Fraction(1, 2)
    accumulation: int = 1
    perturbed: int | None = None
    text: int = 100

    @property
    def name(self) -> str:
        share = "half" if self.share == Fraction(1, 2) else str(self.share)
        steps = f"-accumulation{self.accumulation}" if self.accumulation > 1 else ""
        perturbed = f"-perturbed{self.perturbed}" if self.perturbed else ""
        return f"{self.image}/{self.text}/{self.response}-G{self.generations}-{share}{steps}{perturbed}"

    @property
    def positive(self) -> int:
        """Rollouts of a group with a positive advantage (of an odd group, the larger half)."""
        return math.ceil(self.share * self.generations)


CASES = (
    Case(400, 400),
    Case(1000, 300),
    Case(300, 600),
    Case(400, 2000),
    Case(400, 400, generations=5),
    Case(400, 400, generations=16),
    Case(400, 400, share=Fraction(1, 8)),
    Case(400, 400, share=Fraction(7, 8)),
    Case(400, 400, accumulation=8),
    Case(400, 2000, perturbed=1),
    Case(400, 2000, perturbed=2),
)


@dataclass(frozen=True)
class Variant:
    """A trainer to measure: its class, its options, and whether TRL's LM head skips the prompt's tokens."""

    trainer: type[GRPOTrainer]
    options: dict[str, Any]
    response_head: bool = False

    def head(self) -> Any:
        """Context: TRL's head scores only response tokens, as it does on GPUs, if the variant says so."""
        return patch("trl.trainer.utils._use_triton", return_value=True) if self.response_head else nullcontext()


VARIANTS = {
    "trl_grpo": Variant(GRPOTrainer, {}),
    "trl_grpo_response_head": Variant(GRPOTrainer, {}, response_head=True),
    "shared_grpo": Variant(CPPOTrainer, {"method": "grpo", "scorer": "shared"}),
    "cppo": Variant(CPPOTrainer, {}),
    "cppo_unshared": Variant(CPPOTrainer, {"scorer": "kernel"}),
}
MEASURES = {"time": "cpu_seconds", "wall": "wall_seconds", "flops": "flops", "memory": "peak_bytes"}


def make_rows(case: Case, scale: int) -> list[dict[str, Any]]:
    """One row per group, one group per micro-batch; the prompt has `text / scale` tokens beside the image's."""
    rng = np.random.default_rng(0)
    rows = []
    for group in range(case.accumulation):
        # A digit is one token, and so are the two marks around the image; the first digit identifies the group.
        digits = f"{group}{'7' * (case.text // scale - 3)}"
        image = image_of(case.image // scale, rng)
        message = {"role": "user", "content": digits}
        rows.append({"prompt": [message], "images": [image], "sample_id": f"row-{group}"})
    return rows


def make_trainer(
    variant: Variant, case: Case, scale: int, model: Any, processor: Any, args: Any, device: str = "cpu"
) -> GRPOTrainer:
    """A trainer with given completions and rewards: the first `case.positive` of each group are rewarded.

    On `cuda` it computes in bfloat16.
    """
    response = max(1, case.response // scale)

    def reward(completion_ids: Sequence[Any], **_: Any) -> list[float]:
        return [float(i % case.generations < case.positive) for i in range(len(completion_ids))]

    def completions(prompt_ids: Sequence[Any], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        rng = np.random.default_rng(1)
        return rng.integers(FIRST_TEXT_ID, args.vocabulary, (len(prompt_ids), response)).tolist(), None

    config = GRPOConfig if variant.trainer is GRPOTrainer else CPPOConfig
    bound = {"perception_rollouts_per_group": case.perturbed} if config is CPPOConfig else {}
    sizes = {"per_device_train_batch_size": case.generations, "gradient_accumulation_steps": case.accumulation}
    options = config(
        output_dir=str(Path(tempfile.gettempdir()) / "step_cost"),
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        gradient_checkpointing=args.checkpointing,
        report_to="none",
        num_generations=case.generations,
        max_completion_length=response,
        **{**sizes, **variant.options, **bound},
    )
    dataset = Dataset.from_dict({"prompt": ["unused"]})
    trainer = variant.trainer(copy.deepcopy(model), reward, options, dataset, processing_class=processor)
    trainer._generate_single_turn = completions
    trainer.current_gradient_accumulation_steps = options.gradient_accumulation_steps
    trainer.model.train()
    if args.checkpointing:
        # The trainer itself does so at the start of training.
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def buffered_batches(trainer: GRPOTrainer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of one step, made, shuffled and split by the trainer."""
    repeated = [row for row in rows for _ in range(trainer.num_generations)]
    # The trainer shuffles with the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trainer._prepare_inputs(repeated)
    return trainer._buffered_inputs


def rollouts(batches: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every rollout of a step; each trainer shuffles and splits them in its own way."""
    pairs = [zip(part["prompt_ids"].tolist(), part["completion_ids"].tolist(), strict=True) for part in batches]
    return sorted(pair for part in pairs for pair in part)


def update(trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> float:
    """Loss and backward of all micro-batches, from zero gradients; returns the loss."""
    trainer.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        total += loss.item()
    return total


def measure(variant: Variant, trainer: GRPOTrainer, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Counted loss, gradient norm, FLOPs and peak memory of one update; this also warms up for the timing."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    with variant.head(), counter, PeakBytes() as memory:
        loss = update(trainer, batches)
    gradient_norm = math.hypot(*(p.grad.norm().item() for p in trainer.model.parameters() if p.grad is not None))
    selected = trainer._metrics["train"].get("perception/selected_fraction")
    trainer.model.zero_grad(set_to_none=True)
    return {
        "loss": loss,
        "gradient_norm": gradient_norm,
        "flops": counter.get_total_flops(),
        "peak_bytes": memory.peak,
        **({"selected_fraction": selected[-1]} if selected else {}),
    }


def run_case(case: Case, model: Any, processor: Any, args: Any) -> dict[str, Any]:
    """All variants on one case: counts once, then `args.runs` rounds of timed updates, in turn."""
    rows = make_rows(case, args.scale)
    # The unshared path would take more than five minutes for a step of many micro-batches.
    variants = {name: v for name, v in VARIANTS.items() if case.accumulation == 1 or name != "cppo_unshared"}
    trainers = {name: make_trainer(v, case, args.scale, model, processor, args) for name, v in variants.items()}
    batches = {name: buffered_batches(trainer, rows) for name, trainer in trainers.items()}
    first = batches["trl_grpo"][0]
    assert all(rollouts(parts) == rollouts(batches["trl_grpo"]) for parts in batches.values())
    found = {name: measure(variants[name], trainers[name], batches[name]) for name in variants}
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu_seconds": [], "wall_seconds": []} for name in variants}
    for _ in range(args.runs):
        for name, variant in variants.items():
            with variant.head(), stopwatch(seconds[name]):
                update(trainers[name], batches[name])
    for name, times in seconds.items():
        found[name] |= {key: median(values) for key, values in times.items()}
        found[name]["cpu_seconds_runs"] = times["cpu_seconds"]
    return {
        "name": case.name,
        "image_tokens": int((first["prompt_ids"][0] == model.config.image_token_id).sum()),
        "prompt_tokens": first["prompt_ids"].shape[1],
        "response_tokens": first["completion_ids"].shape[1],
        "positive_of_group": [case.positive, case.generations],
        "groups_in_first_micro_batch": len(first["prompt_ids"].unique(dim=0)),
        **ratios(found["cppo"], found["trl_grpo"]),
        "shared_grpo": ratios(found["shared_grpo"], found["trl_grpo"]),
        "cppo_to_response_head": ratios(found["cppo"], found["trl_grpo_response_head"]),
        "shared_grpo_to_response_head": ratios(found["shared_grpo"], found["trl_grpo_response_head"]),
        **({"cppo_to_unshared": ratios(found["cppo"], found["cppo_unshared"])} if "cppo_unshared" in found else {}),
        "variants": found,
    }


def ratios(found: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Time (CPU seconds), wall time, FLOPs and memory as multiples of the baseline's."""
    return {f"{name}_ratio": found[key] / baseline[key] for name, key in MEASURES.items()}


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table: time / FLOPs / memory of each case, relative to the column's baseline."""
    columns = {
        "CPPO / TRL GRPO": lambda case: case,
        "shared GRPO / TRL GRPO": lambda case: case["shared_grpo"],
        "CPPO / TRL GRPO, response head": lambda case: case["cppo_to_response_head"],
        "shared GRPO / TRL GRPO, response head": lambda case: case["shared_grpo_to_response_head"],
        "CPPO / CPPO unshared": lambda case: case.get("cppo_to_unshared"),
    }
    lines = ["| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for case in cases:
        cells = [
            " / ".join(f"{part[f'{name}_ratio']:.2f}" for name in ("time", "flops", "memory")) if part else "-"
            for part in (column(case) for column in columns.values())
        ]
        lines.append(f"| `{case['name']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def provenance(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Machine, versions and command."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return {
        "machine": {
            "processor": (names or [platform.processor()])[0],
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "trl")},
        "command": " ".join(["python", f"benchmarks/{script}.py", *arguments]),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for every number")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--scale", type=int, default=8, help="the three lengths are divided by it")
    parser.add_argument("--runs", type=int, default=5, help="timed updates of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all variants")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    model, processor = build_model(args.vocabulary, seed=0)
    result: dict[str, Any] = {
        "cases": [],
        **provenance("step_cost", arguments),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "dtype": "float32",
    }
    for case in CASES:
        if args.case is None or case.name in args.case:
            result["cases"].append(run_case(case, model, processor, args))
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{case.name} done", file=sys.stderr)
    print(table(result["cases"]))


if __name__ == "__main__":
    keep_freed_memory()
    main(sys.argv[1:])
