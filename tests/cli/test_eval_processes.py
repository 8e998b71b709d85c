"""`cppo eval` and `cppo data rate` in two processes: the same files as in one, and one line where one of them fails."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cppo.cli.main import main
from cppo.errors import UserError
from cppo.evaluation import ALONE, Processes, TransformersEngine, join_processes, placement, processes
from cppo.evaluation.benchmarks import BENCHMARKS

JOB = Path(__file__).with_name("eval_rank_job.py")
SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def torchrun(*evaluations):
    """The first evaluation comes last, and fails in the second process."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(JOB)]
        + [json.dumps(argv) for argv in evaluations],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def benchmark_folder(monkeypatch, tmp_path):
    """A small data set in the layout of We-Math."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, hub = importlib.import_module("paper_suite"), BENCHMARKS["wemath"].hub
    monkeypatch.setattr(script, "REPOSITORIES", {hub: script.REPOSITORIES[hub]})
    script.write(tmp_path / "hub")
    return str(tmp_path / "hub")


def test_two_processes_write_what_one_writes(small_model, benchmark_folder, tmp_path, capsys):
    """Seven batches of two records of two samples, the last without a partner; two conditions; a resume; a suite."""
    shared = ["--model", small_model, "--samples", "2", "--batch_size", "4", "--max_new_tokens", "5", "--device", "cpu"]
    rows = [*shared, "--data", "tasks:digits?n=5", "tasks:chart?n=8", "--card", "blank", "--by", "family"]
    suite = [*shared, "--suite", "wemath", "--benchmark_folder", benchmark_folder]

    def evaluation(name, argv=rows, suffix=".jsonl"):
        return [*argv, "--responses", str(tmp_path / f"{name}{suffix}"), "--json", str(tmp_path / f"{name}.json")]

    assert main(["eval", *evaluation("one")]) == 0
    printed = capsys.readouterr().out
    assert main(["eval", *evaluation("suite one", suite, "")]) == 0
    printed_suite = capsys.readouterr().out
    rating = ["data", "rate", *shared, "--data", "tasks:digits?n=5", "--out"]
    assert main([*rating, str(tmp_path / "ratings one.jsonl")]) == 0
    printed_ratings = capsys.readouterr().out
    lines = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "resumed.jsonl").write_bytes(b"".join(lines[:20]))  # the head, 13 clean ones and 6 blank ones
    ended = torchrun(
        evaluation("failed"),
        evaluation("two"),
        evaluation("resumed"),
        evaluation("suite two", suite, ""),
        [*rating[1:], str(tmp_path / "ratings two.jsonl")],
    )
    assert (tmp_path / "ratings two.jsonl").read_bytes() == (tmp_path / "ratings one.jsonl").read_bytes()
    for name in ("two", "resumed"):
        for suffix in ("json", "jsonl"):
            assert (tmp_path / f"{name}.{suffix}").read_bytes() == (tmp_path / f"one.{suffix}").read_bytes()
    for file in (".json", "/wemath.jsonl"):
        assert (tmp_path / f"suite two{file}").read_bytes() == (tmp_path / f"suite one{file}").read_bytes()
    assert ended.stdout == 2 * printed + printed_suite + printed_ratings.replace("ratings one", "ratings two")
    assert ended.returncode != 0
    told = [line for line in ended.stderr.splitlines() if line.startswith("cppo: error: ")]
    assert told == ["cppo: error: process 1 of 2 failed: the cable is out"]
    assert "UserError" not in ended.stderr  # no traceback of ours, beside that of torchrun


def test_a_batch_that_is_too_large_is_one_line(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("cppo.evaluation.generate.generate_responses", full)
    with pytest.raises(UserError, match=r"^a batch of 3 responses does not fit .* 2 GiB\); give a smaller"):
        TransformersEngine(None, None).answer([[]] * 3, [[]] * 3)


def test_one_process_needs_no_group():
    assert join_processes("cuda:1", launched=1) == (ALONE, "cuda:1")
    assert ALONE.gather(lambda: 3) == [3]
    assert ALONE.from_first("a") == "a"


@pytest.mark.parametrize(
    ("device", "joined", "words"),
    [
        ("cuda:1", 2, "2 processes take a GPU each; give `cuda`"),
        ("mps", 1, "2 processes cannot work together on it; give --device cpu"),
        ("cuda", 2, "2 processes, but 1 GPUs; start one process a GPU"),
    ],
)
def test_processes_need_a_device_each(monkeypatch, device, joined, words):
    state = SimpleNamespace(num_processes=joined, process_index=1, local_process_index=1, device=torch.device("cuda:1"))
    monkeypatch.setattr(processes, "PartialState", lambda **options: state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError) as refused:
        join_processes(device, launched=2)
    assert words in str(refused.value)


def test_each_process_takes_its_own_gpu(monkeypatch):
    asked = {}
    state = SimpleNamespace(num_processes=2, process_index=1, local_process_index=1, device=torch.device("cuda:1"))
    monkeypatch.setattr(processes, "PartialState", lambda **options: asked.update(options) or state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert join_processes("cuda", launched=2) == (Processes(2, 1), "cuda:1")
    assert asked["cpu"] is False


def test_a_process_that_has_ended_is_told_of(monkeypatch):
    def broken(value):
        raise RuntimeError("connection closed by peer\nmore")

    monkeypatch.setattr(processes, "gather_object", broken)
    with pytest.raises(UserError, match=r"another process has ended: connection closed by peer$"):
        Processes(2, 0).gather(lambda: 1)


def test_a_failure_beside_sharded_weights_waits_for_nobody(monkeypatch):
    """The others wait in the model for this process, and would never answer."""
    monkeypatch.setattr(processes, "gather_object", lambda value: pytest.fail("waits for the others"))
    with pytest.raises(ZeroDivisionError):
        Processes(2, 0, sharded=True).gather(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("has_cuda", "given", "expected"),
    [
        (False, (None, None), ("cpu", "float32")),
        (True, (None, None), ("cuda", "bfloat16")),
        (True, ("cuda:1", None), ("cuda:1", "bfloat16")),
        (True, ("cuda", "float32"), ("cuda", "float32")),
        (True, ("cpu", None), ("cpu", "float32")),
        (False, (None, "bfloat16"), ("cpu", "bfloat16")),
    ],
)
def test_bfloat16_on_a_gpu_and_float32_on_a_cpu(monkeypatch, has_cuda, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert placement(*given) == expected
