"""An archive holds a finished study: the same bytes each time, the same results, and nothing hostile gets through."""

import json
import lzma
import tracemalloc
from copy import deepcopy
from pathlib import Path

import pytest

from cppo.cli.main import main
from cppo.comparison import definitions, pool
from cppo.comparison.finished import MOST_BYTES, MOST_LINE_BYTES, RESULT, read_archive
from cppo.comparison.jobs import Source, study_jobs
from cppo.comparison.study import load_study
from cppo.errors import UserError

TIMED = {"timing_steps": 2, "timing_repeats": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, study_writer, stub_command) -> Path:
    """A folder with a finished study's cells, in `out`, and their archive, `mine.jsonl.xz`; no test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["compare", "--config", study_writer(folder, **TIMED), "--archive", str(folder / "mine.jsonl.xz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "COMMAND", stub_command)
        assert main(words) == 0
    return folder


@pytest.fixture
def archive(finished) -> Path:
    return finished / "mine.jsonl.xz"


def read(file: Path):
    return json.loads(file.read_text())


def test_an_archive_holds_every_result_sorted_by_path(finished, archive, tmp_path):
    out = finished / "out"
    loose = {str(file.parent.relative_to(out)): read(file) for file in out.rglob(RESULT)}
    with lzma.open(archive, "rt", encoding="utf-8") as text:
        records = [json.loads(line) for line in text]
    assert [record["path"] for record in records] == sorted(loose)
    assert {record["path"]: record["result"] for record in records} == loose == read_archive(archive)
    assert [path.partition("/")[0] for path in sorted(loose)] == ["cells"] * 4 + ["start"] + ["timing"] * 2
    again = tmp_path / "again.jsonl.xz"
    assert main(["compare", "--config", str(finished / "mine.yaml"), "--report_only", "--archive", str(again)]) == 0
    assert again.read_bytes() == archive.read_bytes()


def test_an_archive_shows_what_its_folder_shows(finished, archive, write_study, stub_cells, tmp_path):
    """Nothing is run, and no cell is written to disk."""
    again, out = tmp_path / "again.jsonl.xz", tmp_path / "out"
    file = write_study(cells_from=[str(archive)], **TIMED)
    assert main(["compare", "--config", file, "--archive", str(again)]) == 0
    assert sorted(found.name for found in out.rglob("*")) == ["report.html", "results.json", "summary.md"]
    from_folder, from_archive = (read(folder / "results.json") for folder in (finished / "out", out))
    for results in (from_folder, from_archive):
        del results["command"], results["study"]["output_dir"], results["study"]["cells_from"]
    assert from_archive == from_folder
    assert from_archive["cost"]["digits"]["cppo"]["alone"] is True
    assert again.read_bytes() == archive.read_bytes()


def test_another_study_takes_equal_cells_from_an_archive(finished, archive, write_study, stub_cells, tmp_path, capsys):
    methods = [{"method": "cppo", "perception_weight": 0.5}, "grpo"]
    assert main(["compare", "--config", write_study(methods=methods, cells_from=[str(archive)])]) == 0
    assert f"3 taken from {archive}" in capsys.readouterr().err  # the start, and grpo with both seeds
    assert len(stub_cells.read_text().splitlines()) == 2
    path = Path("out", "cells/digits/grpo/seed-1", RESULT)
    assert read(tmp_path / path) == read(finished / path)


def test_cells_of_earlier_definitions_are_reported_from_an_archive_and_never_mixed(
    archive, write_study, stub_cells, capsys, monkeypatch
):
    later = {**definitions.CHANGES, "method cppo": ("something else",)}
    monkeypatch.setattr(definitions, "CHANGES", later)
    assert main(["compare", "--config", write_study(cells_from=[str(archive)])]) == 0
    assert "with other definitions than the code has now: method cppo: 1, now 2\n" in capsys.readouterr().err
    assert not stub_cells.exists()
    # With cells that the archive lacks the study is run, and takes over what still means the same.
    assert main(["compare", "--config", write_study(seeds=3, cells_from=[str(archive)])]) == 0
    assert f"3 taken from {archive}" in capsys.readouterr().err
    assert len(stub_cells.read_text().splitlines()) == 1 + 3


def test_an_archive_is_of_a_finished_study(finished, study_writer, tmp_path, refused, capsys):
    none = tmp_path / "none" / "mine.jsonl.xz"
    assert "there is no folder" in refused("compare", "--config", finished / "mine.yaml", "--archive", none)
    more, file = study_writer(finished, "more", seeds=3), tmp_path / "mine.jsonl.xz"
    assert main(["compare", "--config", more, "--report_only", "--archive", str(file)]) == 2
    assert f"{file} is not written: 2 cells are unfinished" in capsys.readouterr().err
    assert not file.exists()


def packed(*records, **options) -> bytes:
    text = "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in records)
    return lzma.compress(text.encode(), **options)


ONE, TWO = {"path": "a", "result": {}}, {"path": "b", "result": {}}
LARGE_WINDOW = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
HOSTILE = {
    "no xz": (b"PK\x03\x04" * 9, "not supported"),
    "nothing": (b"", "cut off"),
    "cut off": (packed(ONE)[:-9], "cut off"),
    "a flipped byte": (packed(ONE)[:30] + b"\xff" + packed(ONE)[31:], "orrupt"),
    "a second stream": (packed(ONE) + packed(TWO), "something follows its end"),
    "a window of 1 GiB": (packed(ONE, filters=LARGE_WINDOW), "emory"),
    "no JSON": (lzma.compress(b"{\n"), "Expecting"),
    "nested too deeply": (lzma.compress(b"[" * 100_000 + b"\n"), "nested too deeply"),
    "no UTF-8": (lzma.compress(b'{"path":"a","result":"\xff"}\n'), "utf-8"),
    "half a character": (lzma.compress(b'{"path":"a","result":"\\ud800"}\n'), "surrogates"),
    "too many digits": (lzma.compress(b'{"path":"a","result":' + b"9" * 9999 + b"}\n"), "integer string"),
    "a list": (packed([1, 2]), "line 1 was not written by it"),
    "no path": (packed(ONE, {"result": {}}), "line 2 was not written by it"),
    "other keys": (packed({**ONE, "more": 1}), "line 1 was not written by it"),
    "no end of the last line": (lzma.compress(b'{"path":"a","result":{}}'), "line 1 was not written by it"),
    "not sorted": (packed(TWO, ONE), "line 2 was not written by it"),
    "a path twice": (packed(ONE, ONE), "line 2 was not written by it"),
    "a line too long": (packed({"path": "a", "result": "0" * MOST_LINE_BYTES}, preset=0), "4 MiB a line"),
}


@pytest.mark.parametrize(("content", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path, content, reason):
    file = tmp_path / "mine.jsonl.xz"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_archive(file)
    assert str(error.value).startswith(f"{file}: cannot be read as an archive of cppo compare: ")
    assert reason in str(error.value)


def test_a_bomb_is_not_unpacked(tmp_path):
    file = tmp_path / "mine.jsonl.xz"
    for size, reason in ((MOST_BYTES + 1, "at most 128 MiB"), (MOST_BYTES, "Expecting")):
        file.write_bytes(lzma.compress(b"\n" * size, preset=0))
        tracemalloc.start()
        with pytest.raises(UserError, match=reason):
            read_archive(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * MOST_BYTES


def test_a_hostile_archive_stops_the_command_in_one_line(write_study, tmp_path, refused):
    file = tmp_path / "mine.jsonl.xz"
    file.write_bytes(packed(ONE)[:-9])
    assert "cut off" in refused("compare", "--config", write_study(), "--cells_from", file)
    assert not (tmp_path / "out").exists()


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels else []


def first_evaluation(**entries):
    return lambda result: result["evaluations"][0].update(entries)


WRONG = {
    "no options": (lambda result: result.pop("options"), "options"),
    "another task": (lambda result: result.update(task="chart"), "task"),
    "another seed": (lambda result: result.update(seed=7), "seed"),
    "steps without length": (lambda result: result.update(step_seconds=[0.0]), "step_seconds"),
    "no steps": (lambda result: result.update(step_cpu_seconds=[]), "step_seconds"),
    "memory as text": (lambda result: result.update(peak_mib="1"), "peak_mib"),
    "an infinite time": (lambda result: result.update(seconds=float("inf")), "seconds"),
    "definitions as text": (lambda result: result["identity"].update(definitions="x"), "definitions"),
    "no evaluation": (lambda result: result.update(evaluations=[]), "evaluations"),
    "another step": (first_evaluation(step=5), "evaluations"),
    "other marks": (first_evaluation(correct={"clean": "0121", "blank": "0101"}), "evaluations"),
    "a condition too few": (first_evaluation(correct={"clean": "0101"}), "evaluations"),
    "two numbers of items": (first_evaluation(correct={"clean": "0101", "blank": "010"}), "evaluations"),
    "a score as text": (first_evaluation(detectors={"k3": {"auprc": "1"}}), "evaluations"),
    "conditions as numbers": (lambda result: result["identity"]["evaluation"].update(conditions=[1]), "evaluation"),
    "a score too large to draw": (first_evaluation(detectors={"k3": {"auprc": 1e300}}), "evaluations"),
    "deep options": (lambda result: result["options"].update(x=deep(50)), "its depth"),
}


@pytest.mark.parametrize(("change", "wrong"), WRONG.values(), ids=WRONG)
def test_a_result_that_no_cell_writes_is_named(finished, archive, change, wrong):
    job = study_jobs(load_study(str(finished / "mine.yaml")))[-1]
    results = deepcopy(read_archive(archive))
    change(results[job.path])
    with pytest.raises(UserError) as error:
        Source(archive, results).like(job)
    assert f"{archive / job.path / RESULT} is not what cppo compare writes for this cell (wrong: {wrong});" in str(
        error.value
    )


def test_metrics_that_are_no_numbers_are_a_result_all_the_same(finished, archive):
    """Training may diverge; what it logged is kept."""
    job = study_jobs(load_study(str(finished / "mine.yaml")))[-1]
    results = deepcopy(read_archive(archive))
    results[job.path]["training"]["kl"] = [None, float("nan")]
    assert Source(archive, results).like(job).result() == results[job.path]


def test_cells_that_answered_other_numbers_of_items_are_not_compared(archive, write_study, tmp_path, refused):
    results, file = read_archive(archive), tmp_path / "other.jsonl.xz"
    for one in results["cells/digits/cppo/seed-1"]["evaluations"]:
        one["correct"] = {name: marks + "1" for name, marks in one["correct"].items()}
    file.write_bytes(packed(*({"path": path, "result": result} for path, result in results.items())))
    error = refused("compare", "--config", write_study(cells_from=[str(file)]))
    assert error == "digits: its cells answered different numbers of items: 4, 5"
