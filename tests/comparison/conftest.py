"""A study on a tiny model, and a process that stands in for a cell's."""

import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from cppo.comparison import pool
from cppo.comparison.study import load_study

STUDY = {
    "recipe": "micro",
    "options": {
        "max_steps": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "use_cpu": True,
    },
    "tasks": {"digits": {"data": "tasks:digits?n=8&seed={seed}", "eval_data": "tasks:digits?n=6"}},
    "methods": ["grpo", "cppo"],
    "seeds": 2,
    "evaluate_every": 1,
    "eval_items": 6,
    "conditions": ["clean", "blank"],
    "detector_items": 3,
}
STUB = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
options = request["recipe"]["config"]
print(os.getpid(), "two", flush=True)
if options["learning_rate"] == 1.0:
    raise SystemExit("the learning rate is too high")
if options["learning_rate"] == 2.0:
    time.sleep(600)
better = options["method"] == "cppo"
marks = {"clean": "1101" if better else "1000", "blank": "1000"}
evaluations = [
    {"step": step, "correct": marks, "format_rate": {"clean": 1.0, "blank": 1.0}, "detectors": {}}
    for step in request["steps"]
]
result = {
    **{name: request.get(name) for name in ("kind", "identity", "task", "label", "seed")},
    "options": options, "evaluations": evaluations, "training": {"reward": [0.25, 0.5]},
    "prompts": str(request.get("seed")) + ("x" if options["learning_rate"] == 3.0 else ""), "device": "cpu",
    "step_seconds": [2.0, 2.0] if better else [1.0, 1.0], "step_cpu_seconds": [2.0, 2.0] if better else [1.0, 1.0],
    "peak_mib": 1.0, "seconds": 1.0, "evaluation_seconds": 0.5, "threads": 1, "versions": {}, "code": "c",
    "warnings": ["nothing is learned"] if request.get("label") == "cppo" else [],
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
}
with open(folder.parents[1 if request["kind"] == "start" else 3] / "runs.txt", "a") as runs:
    runs.write(f"{folder}\\n")
(folder / "cell.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="session")
def study_writer(small_model):
    """Writes a study file into a folder that differs from `STUDY` in the given entries; returns its path."""

    def write(folder: Path, name: str = "mine", **entries) -> str:
        study = {**STUDY, "output_dir": str(folder / "out"), **entries}
        study["options"] = {"model": small_model, **study["options"]}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(study))
        return str(file)

    return write


@pytest.fixture
def write_study(tmp_path, study_writer):
    """`study_writer` into a folder of the test's own."""
    return partial(study_writer, tmp_path)


@pytest.fixture
def study(write_study):
    return load_study(write_study())


@pytest.fixture(scope="session")
def stub_command(tmp_path_factory) -> tuple[str, str]:
    """The command of a quick process in the place of a cell's, which adds the folder it ran in to OUT/runs.txt."""
    program = tmp_path_factory.mktemp("stub") / "stub.py"
    program.write_text(STUB)
    return sys.executable, str(program)


@pytest.fixture
def stub_cells(monkeypatch, stub_command, tmp_path) -> Path:
    """Puts the quick process in the place of a cell's; returns the file to which each adds the folder it ran in."""
    monkeypatch.setattr(pool, "COMMAND", stub_command)
    return tmp_path / "out" / "runs.txt"
