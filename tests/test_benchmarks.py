"""The benchmarks measure what they say; the step's cost is run on sizes that say nothing about speed."""

import importlib
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from cppo.evaluation import load_model, prompt_inputs
from cppo.evaluation.dependency import score_dependency
from cppo.views import ViewSampler

ROOT = Path(__file__).parents[1]
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "docs" / "results"
CASE = "400/100/400-G5-half"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch):
    """Import a file of the folder `benchmarks`."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)

    return load


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


def test_detectors_by_hand(benchmark_module, tmp_path: Path) -> None:
    """Average precision by its definition, over the tokens of three items."""
    module, file = benchmark_module("detectors"), tmp_path / "detectors.json"
    task = "digits?noise=150"
    words = ["--model", "start=micro", "--task", task, "--items", "3", "--resamples", "5", "--json", str(file)]
    module.main(words)
    cells = {(cell["view"], cell["score"]): cell for cell in json.loads(file.read_text())["cells"]}
    assert {view for view, _ in cells} == {*module.VIEWS, module.LARGER}
    model, processor = module.load_model("micro", device="cpu", dtype=None)
    records = module.load_records(f"tasks:{task}&seed=4001", split="test", limit=3)
    items = list(module.scored_items(model, processor, records, module.view_samplers(4001), 80))
    twice = {str(seed): ViewSampler(seed, removing_families=("static",)) for seed in (4001, 4002)}
    scores = score_dependency(model, processor, records, twice, max_new_tokens=80).scores
    for row, item in enumerate(items):
        both = [scores[draw]["js"][row].tolist() for draw in twice]
        length = len(item["truth"])
        assert item[module.LARGER, "js"][0] == pytest.approx(list(map(max, *both))[:length], abs=1e-9)
    for (view, score), cell in cells.items():
        pairs = [(v, t) for item in items for v, t in zip(item[view, score][0], item["truth"], strict=True)]
        true, precision = sum(t for _, t in pairs), 0.0
        for value in {v for v, t in pairs if t}:
            above = [t for v, t in pairs if v >= value]
            precision += sum(t for v, t in pairs if v == value) / true * sum(above) / len(above)
        assert cell["auprc"] == pytest.approx(precision, abs=1e-9)
        assert cell["chance"] == pytest.approx(true / len(pairs))
        kept = [t for item in items for flag, t in zip(item[view, score][1], item["truth"], strict=True) if flag]
        assert cell["precision"] == pytest.approx(sum(kept) / len(kept))
        assert cell["recall"] == pytest.approx(sum(kept) / true)
        for name in ("auprc", "precision", "recall"):
            low, high = cell[f"{name}_ci95"]
            assert 0 <= low <= high <= 1
    assert cells["static", "js"]["auprc"] > 0.9


def test_alignment_of_expected_gradients_by_hand(benchmark_module) -> None:
    """Squared lengths from all pairs of different batches, and a jackknife that leaves out each batch in turn."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(50, generator=generator)
    reward = shared + torch.randn(9, 50, generator=generator)
    term = 0.2 * shared + 0.1 * torch.randn(7, 50, generator=generator)

    def square(rows: list[torch.Tensor]) -> float:
        pairs = [(a @ b).item() for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    def by_hand(r: list[torch.Tensor], t: list[torch.Tensor]) -> tuple[float, float]:
        inner = sum((a @ b).item() for a in r for b in t) / (len(r) * len(t))
        return inner / math.sqrt(square(r) * square(t)), math.sqrt(square(t) / square(r))

    rows, others = list(reward), list(term)
    found = benchmark_module("gradient_alignment").alignment(reward, term)
    for place, name in enumerate(("cosine", "length")):
        value = by_hand(rows, others)[place]
        left_out = [
            [by_hand(rows[:i] + rows[i + 1 :], others)[place] for i in range(9)],
            [by_hand(rows, others[:i] + others[i + 1 :])[place] for i in range(7)],
        ]
        variance = sum((len(v) - 1) / len(v) * sum((x - sum(v) / len(v)) ** 2 for x in v) for v in left_out)
        assert found[name] == pytest.approx(value, abs=1e-4)
        width = 1.959964 * math.sqrt(variance)
        assert found[f"{name}_ci95"] == pytest.approx([value - width, value + width], abs=2e-4)
    for name, true in (("cosine", 1.0), ("length", 0.2)):
        low, high = found[f"{name}_ci95"]
        assert low < true < high
    noise = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert benchmark_module("gradient_alignment").alignment(reward[:, :2], noise)["cosine"] is None


def test_holms_correction(benchmark_module) -> None:
    """Each p value against its own share of 5 %; the first that fails ends it, though a later one would pass."""
    holm = benchmark_module("evidence").holm
    assert holm({"a": 0.6, "b": 0.02, "c": 0.001, "d": 0.012}) == ["c", "d", "b"]
    assert holm({"a": 0.0126, "b": 0.02, "c": 0.021, "d": 0.022}) == []
    assert holm({"a": 0.001, "b": 0.03, "c": 0.04}) == ["a"]


@pytest.fixture(scope="module")
def evidence_folder(tmp_path_factory) -> Path:
    """The archives of all studies, and the page without what is made from them."""
    if not RESULTS.exists():
        pytest.skip("the source distribution leaves the results out")
    folder = tmp_path_factory.mktemp("evidence")
    page = re.sub(
        r"(?s)(<!-- (?:table|holm|short):.*? ?-->\n).*?(<!-- end -->)", r"\1\2", (RESULTS / "evidence.md").read_text()
    )
    assert "|---|" not in page
    (folder / "evidence.md").write_text(page)
    for archive in RESULTS.glob("*.jsonl.xz"):
        (folder / archive.name).symlink_to(archive)
    return folder


def test_the_evidence_page_holds_what_the_studies_found(benchmark_module, evidence_folder: Path) -> None:
    benchmark_module("evidence").main([str(evidence_folder)])
    page = (RESULTS / "evidence.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"figures/\S+\.svg", page))
    studies = [archive.name.removesuffix(".jsonl.xz") for archive in RESULTS.glob("*.jsonl.xz")]
    assert len(studies) == 11
    expected = {"evidence.md", *(f"{study}.md" for study in studies), *shown}
    written = {file for file in evidence_folder.rglob("*") if file.suffix in (".md", ".svg")}
    assert {str(file.relative_to(evidence_folder)) for file in written} == expected
    for name in expected:
        assert (evidence_folder / name).read_bytes() == (RESULTS / name).read_bytes(), name


def test_a_table_against_another_method(benchmark_module, evidence_folder: Path) -> None:
    evidence = benchmark_module("evidence")
    results = evidence.results_of(evidence_folder, "evidence-unlimited", "papo")
    rows = evidence.differences(results)
    others = ("grpo", "grpo+views", "cppo", "cppo-likelihood-all-tokens")
    assert list(rows) == [(task, other) for task in ("digits", "chart", evidence.OVER_TASKS) for other in others]
    final = {(c["task"], c["method"], c["seed"]): c["accuracy"]["clean"][-1] for c in results["cells"]}
    pairs = [final["chart", "cppo", seed] - final["chart", "papo", seed] for seed in range(100, 110)]
    found = rows["chart", "cppo"]["clean"]
    assert found["mean"] == pytest.approx(sum(pairs) / 10, abs=1e-9)
    spread = math.sqrt(sum((x - found["mean"]) ** 2 for x in pairs) / 9 / 10)
    assert found["high"] - found["mean"] >= 1.96 * spread
    marker = "<!-- table: evidence-unlimited evidence-prior of cppo,papo at equal time means -->\n<!-- end -->"
    asked = evidence.TABLE.fullmatch(marker).groupdict()
    lines = list(evidence.table(evidence_folder, asked))
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        [f"| {study}", evidence.OVER_TASKS, method] for study in ("unlimited", "prior") for method in ("cppo", "papo")
    ]
    over_tasks = evidence.results_of(evidence_folder, "evidence-unlimited", None)["over_tasks"]
    assert evidence.points(over_tasks["cppo"]["clean"]["equal_time"]) in lines[2]


@pytest.mark.parametrize(
    ("by_seeds", "by_both", "said"),
    [
        ("cu", "cu", "both"),
        ("", "u", "unseen"),
        ("cu", "", "by seeds alone"),
        ("c", "", "neither"),
        ("", "", "neither"),
    ],
)
def test_the_short_table_names_the_correction(benchmark_module, by_seeds, by_both, said) -> None:
    """Of two differences, those that survive over seeds and items; if none does, whether both do over seeds."""
    asked = {"c": "clean", "u": "unseen"}
    assert benchmark_module("evidence").surviving(asked, by_seeds, by_both) == said


def test_vllm_agreement_by_hand(benchmark_module, small_model, monkeypatch) -> None:
    """An engine whose log-probability of one token of each response is 0.25 nats off."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "evaluation" / "stand_in"))
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


def test_laid_faults_are_counted_by_hand(benchmark_module, tmp_path: Path) -> None:
    rows = benchmark_module("faults.rows")
    laid, numbers = rows.lay(tmp_path, "half a PNG", 2, random.Random(0))
    whole = [number for number, row in enumerate(laid, start=1) if _decodes(tmp_path / row["images"][0])]
    assert len(laid) == 12
    assert sorted({*range(1, 13)} - set(whole)) == sorted(numbers)


def _decodes(file: Path) -> bool:
    try:
        Image.open(file).load()
    except OSError:
        return False
    return True


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
