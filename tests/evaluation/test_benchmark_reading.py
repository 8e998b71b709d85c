"""Each benchmark is read from small data sets in exactly its layout, through the hub's client and from a folder."""

import importlib
import io
from pathlib import Path

import pytest
from pyarrow import parquet

from cppo.errors import UserError
from cppo.evaluation import ItemResult
from cppo.evaluation.benchmarks import BENCHMARKS, choose_suite, read_benchmark

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
KEPT = {
    "logicvista": 6,
    "mathvista": 6,
    "dynamath": 30,
    "wemath": 10,
    "mathvision": 6,
    "mathverse": 20,
    "mmmu_pro_vision": 6,
    "geometry3k": 6,
    "mmk12": 6,
    "pope": 12,
    "hallusionbench": 8,
}
"""How many rows of the stand-ins are asked: LogicVista's has one without an answer."""


@pytest.fixture
def stand_ins(monkeypatch):
    """The module that makes data sets in the layouts of the benchmarks."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("paper_suite")


@pytest.fixture
def small(stand_ins):
    """Makes the files of a benchmark's data set."""
    return lambda name: stand_ins.repository(BENCHMARKS[name].hub)


def changed(files, change):
    """The files with each table changed."""
    new = dict(files)
    for path in filter(lambda path: path.endswith(".parquet"), files):
        buffer = io.BytesIO()
        parquet.write_table(change(parquet.read_table(io.BytesIO(files[path]))), buffer)
        new[path] = buffer.getvalue()
    return new


def answered(asked, reply):
    """Results of two samples each, which say `reply(question)`."""
    items = []
    for name, question in asked.questions.items():
        responses = (reply(question),) * 2
        right = tuple(asked.right(name, responses))
        items.append(ItemResult(name, question.answer, responses, right, (1.0, 1.0), images=1))
    return items


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_layout_is_read_through_the_hub(hub, small, name):
    benchmark = BENCHMARKS[name]
    hub.add(benchmark.hub, small(name))
    asked = read_benchmark(benchmark)
    assert len(asked.source) == len(asked.questions) == KEPT[name]
    assert asked.source.skipped == []
    for record in asked.source:
        question = asked.questions[record.id]
        assert [image.size for image in record.images] == [(64, 64)]
        assert record.answer == question.answer
    assert set(benchmark.unit) | set(benchmark.by) <= set(question.facts)
    perfect = asked.figures(answered(asked, lambda question: rf"<think> ? </think> \boxed{{{question.answer}}}"))
    assert perfect.headline.mean == 1.0
    nothing = asked.figures(answered(asked, lambda question: r"\boxed{neither}"))
    assert nothing.headline.mean == 0.0


def test_a_folder_stands_in_the_hubs_place(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(stand_ins, "REPOSITORIES", {"lmms-lab/POPE": stand_ins.REPOSITORIES["lmms-lab/POPE"]})
    stand_ins.write(tmp_path)
    assert len(read_benchmark(BENCHMARKS["pope"], folder=str(tmp_path)).source) == 12
    with pytest.raises(UserError, match=r"there is no folder .*geometry3k"):
        read_benchmark(BENCHMARKS["geometry3k"], folder=str(tmp_path))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_column_that_is_missing_is_named(hub, small, name):
    benchmark = BENCHMARKS[name]
    column = benchmark.columns[-1]
    hub.add(benchmark.hub, changed(small(name), lambda table: table.drop_columns(column)))
    with pytest.raises(UserError) as caught:
        read_benchmark(benchmark)
    assert repr(column) in str(caught.value)
    assert benchmark.title in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_and_a_configuration_that_are_missing_are_named(hub, stand_ins, small):
    rows = stand_ins.mathverse()["testmini"]
    hub.add("AI4Math/MathVerse", stand_ins.repository("AI4Math/MathVerse", {"other": rows}))
    with pytest.raises(UserError, match=r"MathVerse testmini .*no split 'testmini'.* other"):
        read_benchmark(BENCHMARKS["mathverse"])
    files = small("mmmu_pro_vision")
    hub.add("MMMU/MMMU_Pro", {**files, "README.md": files["README.md"].replace(b"name: vision", b"name: standard")})
    with pytest.raises(UserError, match=r"MMMU-Pro vision .*no configuration 'vision'.* standard"):
        read_benchmark(BENCHMARKS["mmmu_pro_vision"])


def test_a_row_of_another_layout_is_named(hub, small):
    def without_answers(table):
        return table.set_column(table.column_names.index("answer"), "answer", [["no option"] * len(table)])

    def without_golds(table):
        return table.set_column(table.column_names.index("ground_truth"), "ground_truth", [["2π"] * len(table)])

    hub.add("DynaMath/DynaMath_Sample", changed(small("dynamath"), without_golds))
    with pytest.raises(UserError, match=r"DynaMath: row 2 \(split sample_variant1\) has an unexpected layout"):
        read_benchmark(BENCHMARKS["dynamath"])
    hub.add("AI4Math/MathVista", changed(small("mathvista"), without_answers))
    with pytest.raises(UserError, match=r"MathVista testmini: row 1 \(split testmini\) has an unexpected layout"):
        read_benchmark(BENCHMARKS["mathvista"])


def test_without_the_hub_one_line_says_what_to_fetch_and_where_to_put_it(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        read_benchmark(BENCHMARKS["wemath"])
    line = str(caught.value)
    assert "`hf download We-Math/We-Math --repo-type dataset --local-dir DIR/We-Math/We-Math`" in line
    assert "--benchmark_folder DIR" in line
    assert "\n" not in line


def test_a_limit_keeps_whole_units_from_all_over_the_data(hub, small):
    hub.add("DynaMath/DynaMath_Sample", small("dynamath"))
    hub.add("AI4Math/MathVerse", small("mathverse"))
    dynamath = BENCHMARKS["dynamath"]
    asked = read_benchmark(dynamath, limit=25)
    seeds = [question.facts["seed"] for question in asked.questions.values()]
    assert len(seeds) == 20
    assert sorted(map(seeds.count, set(seeds))) == [10, 10]
    assert len(read_benchmark(dynamath, limit=3).source) == 10
    verse = read_benchmark(BENCHMARKS["mathverse"], limit=10)
    assert [record.id for record in verse.source] == sorted(verse.questions, key=lambda name: int(name.split(":")[1]))
    whole = read_benchmark(BENCHMARKS["mathverse"])
    assert set(verse.questions) < set(whole.questions)


def test_two_benchmarks_are_not_resampled_alike(hub, small):
    """Else the interval of their mean would be that of one."""
    parts = []
    for name in ("geometry3k", "mmk12"):
        hub.add(BENCHMARKS[name].hub, small(name))
        asked = read_benchmark(BENCHMARKS[name])
        first = list(asked.questions.values())[:3]
        parts.append(asked.figures(answered(asked, lambda one, first=first: one.answer if one in first else "no")))
    assert parts[0].headline == parts[1].headline
    assert not (parts[0].headline_draws == parts[1].headline_draws).all()


def test_suites_by_name():
    paper = choose_suite(["paper"])
    assert [one.name for one in paper.benchmarks] == [name for name, one in BENCHMARKS.items() if one.in_paper]
    assert (len(paper.benchmarks), paper.samples, paper.limit) == (7, 16, None)
    quick = choose_suite(["quick", "pope", "mathvista"])
    assert (len(quick.benchmarks), quick.samples, quick.limit) == (8, 1, 200)
    assert [one.name for one in choose_suite(["pope", "mmk12", "pope"]).benchmarks] == ["pope", "mmk12"]
    with pytest.raises(UserError, match="did you mean `mathvista`"):
        choose_suite(["mathvsta"])
