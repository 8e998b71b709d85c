"""Check that a change keeps the numbers: each case must end in the same bytes.

Each case trains the embedded micro VLM for a few steps on the CPU in float32. The file holds hashes of the final
weights and of every gradient, the logged metrics without times and memory, and the kept samples. Rewards depend only on
the tokens and differ within groups; a case without selected perception tokens is an error. Compare only files from the
same machine and the same library versions.

Run it before the change, then after it. The second command names the cases that differ and then ends with status 1:

    python benchmarks/same_weights.py --json before.json
    python benchmarks/same_weights.py --json after.json --against before.json
    python benchmarks/same_weights.py --json after.json --against before.json --cases "cppo/*" "*/resumed"

It uses only the public API, so it also runs on another checkout: `PYTHONPATH=OTHER/src python ...`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from cppo import CPPOConfig, CPPOTrainer
from cppo.data import load_records

COSTS = ("time/", "memory/", "step_time")
"""Prefixes of metrics that differ from run to run."""
WITHOUT_TERM = ("grpo", "dapo", "grpo+views", "noisyrollout")
ONE_IMAGE, MIXED = (1,), (1, 0, 2, 1)
"""Number of images of the rows, in turn."""


@dataclass(frozen=True)
class Case:
    """A training: options of `CPPOConfig`, images of its rows, step to resume at, number of processes."""

    options: dict[str, Any]
    images: tuple[int, ...] = ONE_IMAGE
    resumed_at: int | None = None
    processes: int = 1


SETTINGS = {
    "plain": Case({}),
    "mixed": Case({}, MIXED),
    "accumulation": Case({"gradient_accumulation_steps": 2}, MIXED),
    "steps-per-generation": Case({"steps_per_generation": 4, "max_steps": 4}, MIXED),
    "iterations": Case({"num_iterations": 2, "max_steps": 4}, MIXED),
    "reference": Case({"beta": 0.04}, MIXED),
    # Both resume in the middle of a generation batch; the checkpoint holds the rest of it.
    "resumed": Case({"steps_per_generation": 4, "max_steps": 4}, MIXED, resumed_at=2),
    "resumed-iterations": Case({"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4}, MIXED, resumed_at=2),
    "two-processes": Case({"per_device_train_batch_size": 4}, MIXED, processes=2),
}
"""The options of each of the four methods below."""
CPPO_OPTIONS: dict[str, dict[str, Any]] = {
    "sequential": {"perception_memory": "sequential"},
    "no-view-gradients": {"perception_view_gradients": False},
    "no-anchor-gradients": {"perception_anchor_gradients": False},
    "token": {"perception_normalization": "token"},
    "token-sequential": {"perception_normalization": "token", "perception_memory": "sequential"},
    "microbatch": {"perception_normalization": "microbatch"},
    "random": {"perception_selector": "random"},
    "top": {"perception_selector": "top", "perception_top_rounding": "ceil"},
    "all": {"perception_selector": "all"},
    "one-a-group": {"perception_rollouts_per_group": 1},
    "no-gate": {"perception_gate": "none"},
    "correct-gate": {"perception_gate": "correct", "perception_gate_reward": "token_reward"},
    "js": {"perception_divergence": "js", "perception_score": "js"},
    "js-sequential": {"perception_divergence": "js", "perception_score": "js", "perception_memory": "sequential"},
    "js-kernel": {"perception_divergence": "js", "perception_score": "js", "scorer": "kernel"},
    "kl": {"perception_divergence": "kl", "perception_score": "kl"},
    "logp-shift": {"perception_score": "logp_shift"},
    "rollout-policy": {"perception_view_policy": "rollout", "perception_view_gradients": False},
    "kernel": {"scorer": "kernel"},
    "kernel-no-view-gradients": {"scorer": "kernel", "perception_view_gradients": False},
    "plain-scorer": {"scorer": "plain"},
    "grad-share": {"log_perception_grad_share": True},
    "checkpointing": {"gradient_checkpointing": True},
    "views-a-rollout": {"view_draws": "rollout"},
    "small-generation": {"per_device_generation_batch_size": 2},
    "entropy-bonus": {"entropy_coef": 0.01},
}
OTHER_METHODS = (
    "pgpo",
    "dvrp",
    "noisyrollout",
    "grpo+views",
    "cppo-likelihood",
    "cppo-likelihood-all-tokens",
    "cppo-async",
    "cppo-static-js",
    "cppo-cpl-only",
    "papo-3b",
)
CASES = {
    f"{method}/{name}": Case({"method": method, **case.options}, case.images, case.resumed_at, case.processes)
    for method in ("cppo", "papo", "vppo", "grpo")
    for name, case in SETTINGS.items()
}
CASES |= {
    f"{method}/{name}": Case({"method": method, "gradient_accumulation_steps": 2, **options}, MIXED)
    for method, name, options in (
        *(("cppo", name, options) for name, options in CPPO_OPTIONS.items()),
        *((method, "mixed", {}) for method in OTHER_METHODS),
        ("vppo", "batch", {"perception_advantage_scope": "batch"}),
        ("vppo", "kernel", {"scorer": "kernel"}),
        ("papo", "kernel", {"scorer": "kernel"}),
        ("grpo", "kernel", {"scorer": "kernel", "beta": 0.04}),
        ("pgpo", "kernel", {"scorer": "kernel"}),
    )
}


def token_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward that differs within a group and depends only on the tokens."""
    return [float(sum(ids) % 11) for ids in completion_ids]


def make_rows(images: Sequence[int], count: int = 8) -> Dataset:
    """Rows of the digits task with these numbers of images, in turn; a second image is a wider shapes image."""
    digits, shapes = (load_records(f"tasks:{task}?n={count}", split="train") for task in ("digits", "shapes"))
    rows = [
        {
            "prompt": [{"role": "user", "content": digit.prompt}],
            "images": [*digit.images, shape.images[0].resize((96, 64))][: images[index % len(images)]],
            "answer": digit.answer,
            "sample_id": f"row-{index}",
        }
        for index, (digit, shape) in enumerate(zip(digits, shapes, strict=True))
    ]
    index = Dataset.from_dict({"index": list(range(count))})
    return index.with_transform(lambda batch: {name: [rows[i][name] for i in batch["index"]] for name in rows[0]})


def make_trainer(
    folder: str | Path, dataset: Dataset, options: dict[str, Any], trainer_class: type[CPPOTrainer] = CPPOTrainer
) -> CPPOTrainer:
    """A trainer of the micro VLM on the CPU in float32, with 2 prompts x 4 rollouts per micro-batch."""
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 20,
        "temperature": 1.5,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "seed": 3,
        **options,
    }
    trainer = trainer_class("micro", token_reward, CPPOConfig(**given), dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class GradientDigests(TrainerCallback):
    """The digest of each step's gradients. They show more than weights, where rounding hides small changes."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, *, model: Any, **_: Any) -> None:
        gradients = ((name, weight.grad) for name, weight in model.named_parameters())
        self.digests.append(digest((name, gradient) for name, gradient in gradients if gradient is not None))


def train(case: Case, folder: str) -> dict[str, Any]:
    """The end state of the case. Raises RuntimeError where its rewards or its perception term are trivial."""
    options, dataset = dict(case.options), make_rows(case.images)
    if case.resumed_at is not None:
        options |= {"save_strategy": "steps", "save_steps": case.resumed_at}
        make_trainer(folder, dataset, options).train()
    trainer, gradients = make_trainer(folder, dataset, options), GradientDigests()
    trainer.add_callback(gradients)
    start = None if case.resumed_at is None else f"{folder}/checkpoint-{case.resumed_at}"
    trainer.train(resume_from_checkpoint=start)
    metrics = [
        {name: value for name, value in log.items() if not name.startswith(COSTS)}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    # Only steps that generate log their rewards.
    if not all(log.get("frac_reward_zero_std", 0) < 1 and log["grad_norm"] > 0 for log in metrics):
        raise RuntimeError("the rewards of a step are all equal, or nothing was learned from them")
    has_term = case.options["method"] not in WITHOUT_TERM
    if has_term and not any((log["perception/selected_fraction"] or 0) > 0 for log in metrics):
        raise RuntimeError("the perception term selected no token")
    samples = [{key: value for key, value in one.items() if key != "images"} for one in trainer.last_samples]
    return {
        "weights": digest(trainer.model.named_parameters()),
        "gradients": gradients.digests,
        "samples": hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest(),
        "metrics": metrics,
    }


def run_here(cases: Iterable[str]) -> dict[str, Any]:
    """The end state of each case, trained by this process or its share of several."""
    found = {}
    for name in cases:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = train(CASES[name], folder)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from error
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return found


def run_together(cases: Sequence[str], processes: int) -> dict[str, Any]:
    """The end state of each case, trained by processes of this script; they start once for all cases."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        subprocess.run(
            [*launcher, __file__, "--json", str(file), "--cases", *cases],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(file.read_text())


def differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """One line per case with another end state than expected."""
    for name, case in found.items():
        if name not in expected:
            yield f"{name}: unknown before"
            continue
        before = expected[name]
        # As text, so that NaN equals NaN.
        parts = [part for part in case if json.dumps(case[part]) != json.dumps(before[part])]
        if parts:
            yield f"{name}: {', '.join(parts)} differ{_first_metric(case['metrics'], before['metrics'])}"


def _first_metric(metrics: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    for after, before in zip(metrics, expected, strict=False):
        for name in (*before, *(after.keys() - before.keys())):
            old, new = before.get(name, "nothing"), after.get(name, "nothing")
            if json.dumps(old) != json.dumps(new):
                return f"; first {name}: {old} -> {new}"
    return ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for what each case ends in")
    parser.add_argument("--against", type=Path, help="such a file from before the change")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="cases to train; default: all")
    args = parser.parse_args(arguments)
    chosen = [name for name in CASES if any(fnmatch(name, pattern) for pattern in args.cases)]
    if not chosen:
        parser.error(f"no such case; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = run_here(name for name in chosen if CASES[name].processes == processes)
    for count in sorted({CASES[name].processes for name in chosen} - {processes}):
        found |= run_together([name for name in chosen if CASES[name].processes == count], count)
    if int(os.environ.get("RANK", "0")) == 0:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.against is None:
        return 0
    lines = list(differences(found, json.loads(args.against.read_text())))
    print("\n".join([*lines, f"{len(found) - len(lines)} of {len(found)} cases end in the same bytes"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
