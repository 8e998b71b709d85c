"""Direction of the perception term's gradient relative to the reward's gradient.

Gradients of GRPO's loss and of perception terms, each alone, on independent batches of prompts and rollouts, without
updates in between. For each term: the cosine of its expected gradient with that of GRPO's loss, and its relative length
at the method's own `perception_weight`. Means over a few batches are mostly noise, which would shrink a cosine and
lengthen a gradient. So squared lengths are estimated from pairs of different batches, and they divide the cosine (which
can thus leave [-1, 1]). 95 % intervals by a jackknife over batches. Writes a Markdown table and JSON.

    python benchmarks/gradient_alignment.py --task "digits?noise=150" --batches 160 --json digits.json
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from step_cost import provenance
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from cppo import CPPOTrainer
from cppo.assets import resolve_model
from cppo.data import load_records, to_dataset
from cppo.recipes import load_recipe
from cppo.rewards import accuracy_reward, format_reward
from cppo.runs.prepare import build_config

Z_95 = NormalDist().inv_cdf(0.975)
TERMS: dict[str, dict[str, Any]] = {
    "CPPO": {},
    "its positive part alone": {"perception_removing_weight": 0.0},
    "its negative part alone": {"perception_preserving_weight": 0.0},
    "its gradient through the image alone": {"perception_view_gradients": False},
    "its gradient through the views alone": {"perception_anchor_gradients": False},
    "CPPO with the exact KL": {"perception_divergence": "kl"},
    "cppo-likelihood-all-tokens": {"method": "cppo-likelihood-all-tokens"},
}
"""Options that differ from `cppo`, by term."""


class GradientKeeper(TrainerCallback):
    """Keeps the flattened gradient of every step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, *, model: Any, **_: Any) -> None:
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()]
        self.gradients.append(torch.cat([part.flatten() for part in parts]))


def gradients(task: str, batches: int, seed: int, options: dict[str, Any]) -> Tensor:
    """The loss gradients of `batches` batches of the micro recipe at the start model, [batches, parameters]."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"learning_rate": 0.0, "max_grad_norm": 1e9, "save_strategy": "no", "disable_tqdm": True}
        data = f"tasks:{task}&n={16 * batches}&seed={seed}"
        given = {"output_dir": folder, "max_steps": batches, "seed": seed, "data": data, **fixed, **options}
        recipe = load_recipe("train", "micro", given)
        dataset = to_dataset(load_records(data, split="train"))
        rewards = [accuracy_reward, format_reward]
        trainer = CPPOTrainer(resolve_model("micro"), rewards, build_config(recipe), dataset)
        trainer.remove_callback(PrinterCallback)
        keeper = GradientKeeper()
        trainer.add_callback(keeper)
        trainer.train()
    return torch.stack(keeper.gradients)


def alignment(reward: Tensor, term: Tensor) -> dict[str, Any]:
    """Cosine of the expected gradients, and the length of the term's relative to the reward's, with intervals.

    Args:
        reward, term: gradients of independent batches, at least three each, [batches, parameters].

    Returns:
        `cosine`, `cosine_ci95`, `length`, `length_ci95`; None where an estimated squared length is negative, so not
        distinguishable from 0.
    """
    products = {
        "rr": (reward @ reward.T).double(),
        "rt": (reward @ term.T).double(),
        "tt": (term @ term.T).double(),
    }

    def figures(r: Tensor, t: Tensor) -> tuple[float, float]:
        reward_square, term_square = _square(products["rr"][r][:, r]), _square(products["tt"][t][:, t])
        inner = float(products["rt"][r][:, t].mean())
        if min(reward_square, term_square) <= 0:
            return math.nan, math.nan
        return inner / (reward_square * term_square) ** 0.5, (term_square / reward_square) ** 0.5

    r, t = torch.arange(len(reward)), torch.arange(len(term))
    whole = torch.tensor(figures(r, t))
    without = [
        torch.tensor([figures(r[r != one], t) for one in r]),
        torch.tensor([figures(r, t[t != one]) for one in t]),
    ]
    variance = sum((len(one) - 1) * (one - one.mean(dim=0)).square().mean(dim=0) for one in without)
    half = Z_95 * torch.as_tensor(variance).sqrt()
    found: dict[str, Any] = {}
    for name, value, width in zip(("cosine", "length"), whole.tolist(), half.tolist(), strict=True):
        known = math.isfinite(value) and math.isfinite(width)
        found[name] = round(value, 4) if known else None
        found[f"{name}_ci95"] = [round(value - width, 4), round(value + width, 4)] if known else None
    return found


def _square(gram: Tensor) -> float:
    """The squared length of an expected vector, from the inner products of its different draws."""
    n = len(gram)
    return float((gram.sum() - gram.diagonal().sum()) / (n * (n - 1)))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", required=True, metavar="TASK")
    parser.add_argument("--term", action="append", choices=TERMS, help="default: all")
    parser.add_argument("--batches", type=int, default=32, help="of GRPO's loss; half as many of each term")
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--json", type=Path, required=True, help="file for every number")
    args = parser.parse_args(arguments)
    rows = []
    for task in args.task:
        reward = gradients(task, args.batches, args.seed, {"method": "grpo"})
        print(f"\n`{task}`\n\n| term | cosine with the reward's gradient | length relative to it |\n|---|---|---|")
        for label in args.term or TERMS:
            options = {"method": "cppo", "rl_weight": 0.0, **TERMS[label]}
            found = alignment(reward, gradients(task, args.batches // 2, args.seed + 1, options))
            rows.append({"task": task, "term": label, "options": TERMS[label], **found})
            print(f"| {label} | {_shown(found, 'cosine')} | {_shown(found, 'length')} |", flush=True)
    result = {**provenance("gradient_alignment", arguments), "batches": args.batches, "seed": args.seed, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def _shown(found: dict[str, Any], name: str) -> str:
    if found[name] is None:
        return "not to be told from 0"
    low, high = found[f"{name}_ci95"]
    return f"{found[name]:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
