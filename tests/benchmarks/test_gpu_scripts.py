"""Scripts for a GPU, on a CPU: every part runs, and the comparisons with vLLM are right by hand."""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cppo.evaluation import load_model, prompt_inputs


def test_vllm_agreement_by_hand(benchmark_module, small_model, monkeypatch) -> None:
    """An engine whose log-probability of one token of each response is 0.25 nats off."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation" / "stand_in"))
    module = benchmark_module("vllm_agreement")
    model, processor = module.load_model(small_model, device="cpu", dtype="float32")
    kinds = module.rows_of(2)
    assert [len(images) for asked in kinds.values() for _, images in asked] == [1, 1, 2, 2, 0, 0]
    rows = module.answered(model, processor, kinds["two images"], 5)
    prompt, images = kinds["two images"][0]
    inputs = prompt_inputs(processor, [prompt], [images])
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1].double()
    assert rows[0].logps[0] == pytest.approx(torch.log_softmax(logits, dim=-1)[rows[0].ids[0]].item(), abs=1e-5)
    logits[module.vision_placeholder_ids(processor, model.config)] = -torch.inf
    first, second = logits.topk(2).values.tolist()
    assert rows[0].gaps[0] == pytest.approx(first - second, abs=1e-5)

    class Llm:
        def generate(self, asked, parameters, **options):
            outputs = []
            for row, one, sampling in zip(rows, asked, parameters, strict=True):
                assert one["prompt_token_ids"][-len(row.ids) :] == row.ids
                assert "prompt" not in one
                assert sampling.prompt_logprobs == 0
                scores = [
                    {token: SimpleNamespace(logprob=logp)} for token, logp in zip(row.ids, row.logps, strict=True)
                ]
                scores[1][row.ids[1]].logprob -= 0.25
                outputs.append(SimpleNamespace(prompt_logprobs=[None, {}, *scores]))
            return outputs

    engine = module.VllmEngine(Llm(), processor, model.config, model.generation_config)
    found = module.differences(engine, rows)
    assert sorted(found)[-2:] == pytest.approx([0.25, 0.25], abs=1e-12)
    assert sum(found) == pytest.approx(0.5, abs=1e-12)
    other = [*rows[0].ids[:3], rows[0].ids[3] + 1]
    assert module.first_gaps(rows, [other, rows[1].ids]) == [rows[0].gaps[3]]
    sys.modules.pop("vllm")


def test_vllm_colocate_by_hand(benchmark_module, small_model) -> None:
    """Log-probabilities without the tokens that must not be sampled, one of them 0.25 nats off."""
    module = benchmark_module("vllm_colocate")
    model, processor = load_model(small_model, device="cpu", dtype="float32")
    prompt, images = module.rows_of(1)["two images"][0]
    inputs, ids = prompt_inputs(processor, [prompt], [images]), [20, 21]
    asked = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 2, dtype=torch.long)], dim=1)
    given = {**inputs, "input_ids": asked, "attention_mask": torch.ones_like(asked), "mm_token_type_ids": types}
    with torch.no_grad():
        odds = model(**given, use_cache=False).logits[0, -3:-1].double().exp()
    odds[:, module.vision_placeholder_ids(processor, model.config)] = 0
    logps = [math.log(odds[place, token] / odds[place].sum()) for place, token in enumerate(ids)]
    trainer = SimpleNamespace(model=model, processing_class=processor)
    found = module.apart(trainer, {"prompt": prompt, "images": images}, ids, [logps[0], logps[1] - 0.25])
    assert found.tolist() == pytest.approx([0.0, 0.25], abs=1e-5)
    batch = {"ids": torch.tensor([[7, 8], [9, 0]]), "mask": torch.tensor([[1, 1], [1, 0]])}
    assert module.kept(batch, "ids", "mask") == [[7, 8], [9]]


def test_every_part_of_the_gpu_acceptance_runs(benchmark_module, tmp_path: Path, capsys) -> None:
    module, file = benchmark_module("gpu_acceptance"), tmp_path / "tiny.json"
    assert module.main(["--json", str(file)]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert module.main(["--tiny", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result["parts"]) == list("ABCDEFG")
    assert all(part["reason"] is None and part["figures"] for part in result["parts"].values())
    assert {letter for letter, part in result["parts"].items() if part["checks"]} == set("BCEG")
    figures = {letter: part["figures"] for letter, part in result["parts"].items()}
    assert "reason" in figures["B"]["padded, cuDNN, tiny"]
    assert 1e-3 < figures["C"]["cpu"]["bfloat16_gradient"] < 0.2
    assert figures["E"]["another image"]["k3"] > 0.01
    updates = [name for name in figures["D"] if "," in name]
    assert len(updates) == 9
    assert all(min(figures["D"][name]["time_ratios"]) > 0 for name in updates)


def test_a_part_of_the_gpu_acceptance_that_ends_early(benchmark_module, tmp_path: Path, monkeypatch, capsys) -> None:
    """Its reason and what it had found are in the file, the others run, and only parts with bounds decide."""
    module, file = benchmark_module("gpu_acceptance"), tmp_path / "tiny.json"

    def slow(part) -> None:
        part.found("before", figure=1.0)
        time.sleep(60)

    def fails(part) -> None:
        raise torch.OutOfMemoryError("no room\nfor 7 GiB")

    def outside(part) -> None:
        assert list(json.loads(file.read_text())["parts"]) == ["D", "F"]
        part.check("inside", 1e-4, 1e-4)
        part.check("not a number", math.nan, 1.0)

    monkeypatch.setitem(sys.modules, "gpu.stub", SimpleNamespace(slow=slow, fails=fails, outside=outside))
    parts = {"D": (0.001, "stub", "slow", ""), "F": (1, "stub", "fails", ""), "G": (1, "stub", "outside", "")}
    monkeypatch.setattr(module, "PARTS", parts)
    words = ["--tiny", "--json", str(file), "--parts"]
    assert module.main([*words, "G", "F", "D"]) == 1
    printed = capsys.readouterr().out
    assert "outside a bound: G" in printed
    assert "ended early: D, F" in printed
    found = json.loads(file.read_text())["parts"]
    assert found["D"]["reason"].startswith("its time is over")
    assert found["D"]["figures"] == {"before": {"figure": 1.0}}
    assert found["F"]["reason"] == "no room for 7 GiB"
    assert [check["holds"] for check in found["G"]["checks"]] == [True, False]
    assert module.main([*words, "F", "D"]) == 0
    monkeypatch.setattr(module, "UNCHECKED", "D")
    assert module.main([*words, "F"]) == 1


def test_the_3b_shape_of_the_gpu_acceptance(benchmark_module) -> None:
    model, _ = benchmark_module("stand_in").build_published_shape(151936, 0, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_754_622_976
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
