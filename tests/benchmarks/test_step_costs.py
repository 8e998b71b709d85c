"""Benchmarks of a step: run on sizes that say nothing about speed, and counted by hand."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE = "400/100/400-G5-half"


def test_step_cost_writes_ratios_of_equal_work(benchmark_module, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    tiny = ["--scale", "50", "--runs", "1", "--vocabulary", "512"]
    benchmark_module("step_cost").main(["--json", str(file), "--case", CASE, *tiny])

    result = json.loads(file.read_text())
    assert {"cases", "machine", "versions", "command", "arguments"} <= result.keys()
    assert CASE in result["command"]
    (case,) = result["cases"]
    assert case["name"] == CASE
    assert case["positive_of_group"] == [3, 5]
    assert (case["image_tokens"], case["response_tokens"]) == (9, 8)
    parts = ("shared_grpo", "cppo_to_response_head", "shared_grpo_to_response_head", "cppo_to_unshared")
    for ratios in (case, *(case[part] for part in parts)):
        for name in ("time_ratio", "wall_ratio", "flops_ratio", "memory_ratio"):
            assert math.isfinite(ratios[name])
            assert ratios[name] > 0

    # Had one of them trained on other rollouts, its gradient would tell.
    norm = {name: found["gradient_norm"] for name, found in case["variants"].items()}
    assert norm["trl_grpo_response_head"] == pytest.approx(norm["trl_grpo"], rel=1e-5)
    assert norm["shared_grpo"] == pytest.approx(norm["trl_grpo"], rel=1e-5)
    assert norm["cppo"] == pytest.approx(norm["cppo_unshared"], rel=1e-5)
    assert abs(norm["cppo"] - norm["trl_grpo"]) > 1e-4 * norm["trl_grpo"]
    flops = {name: found["flops"] for name, found in case["variants"].items()}
    assert flops["shared_grpo"] < flops["trl_grpo_response_head"] < flops["trl_grpo"]


def test_the_cuts_into_micro_batches_are_of_the_same_rollouts(benchmark_module, tmp_path: Path) -> None:
    file = tmp_path / "cuts.json"
    tiny = ["--scale", "100", "--runs", "1", "--vocabulary", "512", "--responses", "400"]
    benchmark_module("micro_batch").main(["--json", str(file), *tiny])
    (case,) = json.loads(file.read_text())["cases"]
    cuts = case["cuts"]
    assert {name: cut["micro_batches"] for name, cut in cuts.items()} == {
        "cppo-3b": 8,
        "cppo-paper": 5,
        "cppo-paper-7b": 20,
        "cppo-paper, nothing shared": 5,
    }
    assert [cut["prompt_passes"] for cut in list(cuts.values())[:3]] == [8, 12, 24]
    assert cuts["cppo-3b"]["time_ratio"] == cuts["cppo-3b"]["flops_ratio"] == 1
    assert cuts["cppo-paper"]["flops_ratio"] < cuts["cppo-paper-7b"]["flops_ratio"]
    assert cuts["cppo-paper-7b"]["flops_ratio"] < cuts["cppo-paper, nothing shared"]["flops_ratio"]


def test_same_weights_names_the_case_that_differs(benchmark_module, tmp_path: Path, monkeypatch, capsys) -> None:
    module, before, after = benchmark_module("same_weights"), tmp_path / "before.json", tmp_path / "after.json"
    asked = ["--cases", "cppo/plain", "grpo/pl*n", "--json"]
    assert module.main([*asked, str(before)]) == 0
    assert module.main([*asked, str(after), "--against", str(before)]) == 0
    assert after.read_bytes() == before.read_bytes()
    assert "2 of 2" in capsys.readouterr().out
    changed = module.Case({"method": "cppo", "perception_weight": 0.0101})
    monkeypatch.setitem(module.CASES, "cppo/plain", changed)
    assert module.main([*asked, str(after), "--against", str(before)]) == 1
    said = capsys.readouterr().out
    assert "cppo/plain: weights, gradients, samples, metrics differ; first loss: " in said
    assert "1 of 2" in said
    monkeypatch.setitem(module.CASES, "cppo/plain", module.Case({"method": "cppo"}, images=(0,)))
    with pytest.raises(RuntimeError, match="cppo/plain: the perception term selected no token"):
        module.main([*asked, str(after)])


def test_the_path_of_a_step(benchmark_module, tmp_path: Path, monkeypatch, capsys) -> None:
    module, file = benchmark_module("step_path"), tmp_path / "path.json"
    module.main(["--json", str(file)])
    found = json.loads(file.read_text())
    assert found["files"][:2] == ["training/trainer.py", "training/micro_batch.py"]
    assert {"training/scoring.py", "perception/detection.py", "perception/loss.py"} < set(found["files"])
    assert len(found["files"]) <= 9
    assert f"cppo: {len(found['files'])} files, {len(found['stays'])} stays" in capsys.readouterr().out

    # By hand: top -> low -> low -> top (a climb), back in low, then mid from top.
    for name, text in {
        "top": "import low, mid\ndef start():\n    low.a(again)\n    mid.c()\ndef again():\n    pass",
        "low": "def a(call):\n    b(call)\n    b(int)\ndef b(call):\n    call()",
        "mid": "def c():\n    pass",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    recorder, start = module.EntryRecorder(), importlib.import_module("top").start
    sys.setprofile(recorder)
    start()
    sys.setprofile(None)
    assert recorder.entries == ["top.py", "low.py", "low.py", "top.py", "low.py", "mid.py"]
    assert recorder.climbs == 1


def test_steps_in_pairs_by_hand(benchmark_module, tmp_path: Path, monkeypatch, capsys) -> None:
    module, file, source = benchmark_module("step_pairs"), tmp_path / "pairs.json", BENCHMARKS.parent / "src"
    found = module.measure_on(source, "grpo", 1, 0, 1)
    assert found.keys() == module.MEASURED.keys()
    assert min(found.values()) > 0

    (tmp_path / "cppo").mkdir()
    (tmp_path / "cppo" / "__init__.py").touch()
    asked, seconds = [], iter([2.0, 3.0, 8.0, 4.0, 1.0, 1.1])

    def measure_on(folder: Path, method: str, *numbers: int) -> dict[str, float]:
        asked.append(folder)
        return dict.fromkeys(module.MEASURED, next(seconds))

    monkeypatch.setattr(module, "measure_on", measure_on)
    module.main(
        ["--before", str(tmp_path), "--after", str(source), "--json", str(file), "--rounds", "3", "--method", "cppo"]
    )
    assert asked == [tmp_path, source, source, tmp_path, tmp_path, source]
    wall = json.loads(file.read_text())["methods"]["cppo"]["wall"]
    assert wall == {"before": 2.0, "after": 3.0, "ratio": 1.5, "ratios": [1.5, 2.0, pytest.approx(1.1)]}
    assert "cppo wall: 2 -> 3 s, after / before 1.500 [1.100, 2.000]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        module.main(["--before", str(tmp_path / "none"), "--after", str(source), "--json", str(file)])
    assert "none does not hold the package" in capsys.readouterr().err


def test_method_costs_go_on_where_they_stopped(benchmark_module, tmp_path: Path, monkeypatch, capsys) -> None:
    module, file = benchmark_module("method_cost"), tmp_path / "cost.json"
    asked, seconds = [], iter([2.0, 3.0, 8.0, 2.0, 1.0, 1.1])

    def train(method: str, steps: int, prompts: int, seed: int) -> dict[str, float]:
        asked.append((method, seed))
        return {"wall": (value := next(seconds)), "time": value / 2, "tokens": 19.0}

    monkeypatch.setattr(module, "train", train)
    words = ["--json", str(file), "--methods", "papo", "--steps", "2"]
    module.main([*words, "--rounds", "1"])
    assert json.loads(file.read_text())["methods"]["papo"]["wall"] == {"ratio": 1.5, "smallest": 1.5, "largest": 1.5}
    module.main([*words, "--rounds", "3"])
    assert asked == [("grpo", 0), ("papo", 0), ("papo", 1), ("grpo", 1), ("grpo", 2), ("papo", 2)]
    found = json.loads(file.read_text())["methods"]["papo"]
    assert (found["pairs"], found["time"]) == (3, {"ratio": 1.5, "smallest": pytest.approx(1.1), "largest": 4.0})
    with pytest.raises(SystemExit):
        module.main([*words, "--prompts", "1"])
    assert "has pairs of other sizes" in capsys.readouterr().err
    assert module.options_of("visionary-r1")["reward_weights"] == [1.0, 1.0, 0.1]
    assert {"papo", "vision-sr1"} < {*module.measured_methods()}
    assert not {"grpo", "cppo-kl"} & {*module.measured_methods()}


def test_peak_bytes_counts_what_is_alive_at_once(benchmark_module) -> None:
    outside = torch.ones(1000)
    with benchmark_module("counting").PeakBytes() as memory:
        view = outside.view(10, 100)
        first = view + 1
        del first
        second, third = outside * 2, outside[:500] * 3
        del second
    assert memory.peak == 4 * 1500
    assert memory.live == third.nbytes


def test_attention_is_counted_by_formula(benchmark_module) -> None:
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    key, value = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 10, 8)
    one_product = 2 * 2 * 4 * 6 * 10 * 8
    with FlopCounterMode(display=False, custom_mapping=benchmark_module("counting").ATTENTION_FLOPS) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    # Two products forward; backward the scores again and four gradients.
    assert counter.get_total_flops() == 7 * one_product
