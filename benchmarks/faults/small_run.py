"""Shared by the scripts of this folder: a run of an untrained model in separate processes, and the files it left.

The processes are forked from one with the libraries imported, so that a run takes seconds. Two ranks get the variables
that torchrun sets.
"""

import hashlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import yaml

import cppo.reports
import cppo.runs.run  # noqa: F401 (imported before the fork)
from cppo.assets.build import build_micro
from cppo.cli.main import main

SMALL = {"text_hidden": 32, "text_layers": 1, "text_intermediate": 48, "vision_hidden": 32, "vision_layers": 1}
OPTIONS = {
    "data": "tasks:digits?n=16",
    "eval_data": "tasks:digits?n=4",
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "perception_gate": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_steps": 1,
    "max_steps": 6,
    "probe_steps": 2,
    "final_eval_samples": 2,
    "quiet": True,
}
UNEQUAL = ("step_time", "time/", "memory/")
"""Metrics that depend on the machine."""
SECONDS = 180.0
"""Time after which a run counts as hanging and is ended."""
_FORK = multiprocessing.get_context("fork")

Patch = Callable[[], object]
"""Changes the process of a run before it starts."""


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is removed afterwards, with the untrained `model` and the recipe `small.yaml`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cppo-faults-") as name:
        folder = Path(name)
        model = build_micro(folder / "model", **SMALL)
        (folder / "small.yaml").write_text(yaml.safe_dump({**OPTIONS, "model": str(model)}))
        yield folder


def train_command(folder: Path, run: Path, *options: object) -> list[str]:
    """The words of `cppo train` for a run of the workplace."""
    return ["train", "--config", str(folder / "small.yaml"), "--output_dir", str(run), *map(str, options)]


class Started:
    """A command in one or more separate processes, with their output in `log`."""

    def __init__(self, argv: list[str], log: Path, ranks: int = 1, patch: Patch | None = None) -> None:
        self.log = log
        self.log.unlink(missing_ok=True)
        port = _free_port()
        ranked = [_rank_variables(rank, ranks, port) if ranks > 1 else {} for rank in range(ranks)]
        self.processes: list[ForkProcess] = [
            _FORK.Process(target=_command, args=(argv, log, own, patch)) for own in ranked
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """The exit statuses, as a shell reports them; processes that hang are killed."""
        end = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [code if code >= 0 else 128 - code for code in (process.exitcode or 0 for process in self.processes)]

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def said(self) -> list[str]:
        """The lines that cppo itself printed."""
        return [line for line in self.log.read_text("utf-8", "replace").splitlines() if line.startswith("cppo: ")]

    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.log.read_text("utf-8", "replace")


def left_behind(run: Path) -> dict[str, Any]:
    """What must be equal after a resumed run: weights, rows of metrics, examples, probes and evaluations."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "weights": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{name: row[name] for name in row if not name.startswith(UNEQUAL)} for row in metrics],
        "samples": (run / "samples.jsonl").read_bytes(),
        "probes": (run / "probes.jsonl").read_bytes(),
        "evaluations": {name: summary[name] for name in ("before", "after", "gain")},
    }


def versions() -> str:
    """For the head of a script's output."""
    found = ", ".join(f"{name} {version(name)}" for name in ("cppo", "torch", "transformers", "trl"))
    return f"Python {sys.version.split()[0]}, {found}"


def _command(argv: list[str], log: Path, variables: dict[str, str], patch: Patch | None) -> None:
    with log.open("ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    os.environ.update(variables)
    if patch is not None:
        patch()
    sys.exit(main(argv))


def _rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
