"""Studies: their figures by hand, and the page that holds what they found."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from cppo.evaluation.dependency import score_dependency
from cppo.views import ViewSampler

RESULTS = Path(__file__).parents[2] / "docs" / "results"


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
