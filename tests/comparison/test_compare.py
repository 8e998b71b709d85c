"""`cppo compare` from end to end, with a quick process in the place of each cell's."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from cppo.cli.compare import free_gpus, free_workers
from cppo.cli.main import main
from cppo.comparison import pool
from cppo.comparison.finished import RESULT
from cppo.comparison.jobs import Job, study_jobs
from cppo.comparison.pool import run_jobs, share_done
from cppo.comparison.results import _costs
from cppo.comparison.study import load_study
from cppo.comparison.tables import _cost_table


def wait_until(reached, seconds=60):
    """Fails where `reached` does not hold in time."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached in {seconds} s"
        time.sleep(0.05)


def ran(file):
    return len(file.read_text().splitlines()) if file.exists() else 0


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def test_results_table_and_page(write_study, stub_cells, capsys):
    assert main(["compare", "--config", write_study()]) == 0
    results = read(stub_cells.parent)
    assert results["command"].startswith("cppo compare --config")
    assert [(cell["method"], cell["seed"], cell["task"]) for cell in results["cells"]] == [
        ("grpo", 0, "digits"), ("cppo", 0, "digits"), ("grpo", 1, "digits"), ("cppo", 1, "digits"),
    ]  # fmt: skip
    cell = results["cells"][1]
    assert cell["steps"] == [0, 1, 2]
    assert cell["accuracy"]["clean"] == [0.25, 0.75, 0.75]  # the start is evaluated with the first method's recipe
    assert cell["training"]["reward"] == [0.25, 0.5]
    assert results["other_prompts"] == []
    difference = results["comparison"]["digits"]["methods"]["cppo"]["difference"]["clean"]
    assert difference["equal_steps"]["mean"] == 0.5
    assert difference["equal_steps"]["n"] == 2
    # grpo ends after 2 x 1 s, when cppo at 2 s a step has made its first step.
    assert results["comparison"]["digits"]["equal_time_seconds"] == 2.0
    assert results["comparison"]["digits"]["methods"]["cppo"]["steps_at_equal_time"] == 1.0
    assert difference["equal_time"]["mean"] == 0.5
    output = capsys.readouterr()
    assert "clean 75.0 (+50.0 [+50.0, +50.0])" in output.out
    assert "(): points of difference from grpo, []: 95 % interval over seeds. An interval without width" in output.out
    assert "5/5  digits, cppo, seed 1  under 1 min left" in output.err
    assert "| cppo | 2 | +50.0 [+50.0, +50.0] {-41.9, +141.9} |" in (stub_cells.parent / "summary.md").read_text()
    assert "<svg" in (stub_cells.parent / "report.html").read_text()
    for text in (output.err, *((stub_cells.parent / file).read_text() for file in ("summary.md", "report.html"))):
        assert [text.count(f"digits/cppo/seed-{seed}: nothing is learned") for seed in (0, 1)] == [1, 1]
        assert "digits/grpo/seed-0:" not in text


def test_what_has_finished_is_never_run_again(write_study, stub_cells):
    file = write_study()
    assert main(["compare", "--config", file]) == 0
    assert ran(stub_cells) == 5
    assert main(["compare", "--config", file]) == 0
    assert ran(stub_cells) == 5
    variant = {"label": "half", "method": "cppo", "perception_weight": 0.005}
    assert main(["compare", "--config", write_study(methods=["grpo", "cppo", variant], seeds=3)]) == 0
    assert ran(stub_cells) == 5 + 2 + 3
    (stub_cells.parent / "cells/digits/half/seed-1" / RESULT).unlink()
    assert main(["compare", "--config", write_study(methods=["grpo", "cppo", variant], seeds=3)]) == 0
    assert ran(stub_cells) == 11


def test_cells_of_another_study_count_where_their_options_are_equal(write_study, stub_cells, tmp_path, capsys):
    assert main(["compare", "--config", write_study()]) == 0
    louder = {"method": "cppo", "perception_weight": 0.5}
    other = {"methods": [louder, "grpo", "papo"], "seeds": 3, "output_dir": str(tmp_path / "other")}
    file = write_study(name="other", cells_from=[str(stub_cells.parent)], **other)
    capsys.readouterr()
    assert main(["compare", "--config", file]) == 0
    assert f"3 taken from {stub_cells.parent}" in capsys.readouterr().err  # the start, and grpo with seeds 0 and 1
    assert ran(tmp_path / "other" / "runs.txt") == 3 + 1 + 3
    copied = read(tmp_path / "other" / "cells/digits/grpo/seed-1", RESULT)
    assert copied == read(stub_cells.parent / "cells/digits/grpo/seed-1", RESULT)
    assert ran(stub_cells) == 5
    assert main(["compare", "--config", write_study(cells_from=[str(tmp_path / "none")])]) == 2
    assert f"cells_from: {tmp_path}/none: no such folder" in capsys.readouterr().err


def test_other_options_are_refused_and_named(write_study, stub_cells, capsys):
    assert main(["compare", "--config", write_study()]) == 0
    changed = write_study(methods=["grpo", {"method": "cppo", "perception_weight": 0.5}], eval_items=5)
    assert main(["compare", "--config", changed]) == 2
    assert "start/digits was run with other options (evaluation); give --rerun" in capsys.readouterr().err
    changed = write_study(methods=["grpo", {"method": "cppo", "perception_weight": 0.5}])
    assert main(["compare", "--config", changed]) == 2
    assert "cppo/seed-0 was run with other options (perception_weight)" in capsys.readouterr().err
    assert ran(stub_cells) == 5
    assert main(["compare", "--config", changed, "--rerun"]) == 0
    assert ran(stub_cells) == 7


def test_a_failed_cell_stops_no_other(write_study, stub_cells, capsys):
    methods = ["grpo", {"label": "wild", "method": "cppo", "learning_rate": 1.0}, "cppo"]
    assert main(["compare", "--config", write_study(methods=methods, seeds=1)]) == 1
    output = capsys.readouterr()
    assert "digits, wild, seed 0 failed with status 1" in output.err
    assert "  the learning rate is too high" in output.err
    assert output.err.strip().endswith("the same command tries them again: digits, wild, seed 0")
    assert ran(stub_cells) == 3
    assert read(stub_cells.parent)["unfinished"] == ["digits, wild, seed 0"]
    assert "two" in (stub_cells.parent / "cells/digits/wild/seed-0/log.txt").read_text()


def test_report_only_runs_nothing(write_study, stub_cells, capsys):
    file = write_study()
    assert main(["compare", "--config", file, "--report_only"]) == 2
    assert "no cell in" in capsys.readouterr().err
    assert main(["compare", "--config", file]) == 0
    before = read(stub_cells.parent)
    (stub_cells.parent / "results.json").unlink()
    assert main(["compare", "--config", file, "--report_only"]) == 0
    assert read(stub_cells.parent) == before
    assert ran(stub_cells) == 5
    changed = write_study(methods=["grpo", {"method": "cppo", "perception_weight": 0.5}])
    capsys.readouterr()
    assert main(["compare", "--config", changed, "--report_only"]) == 2
    assert "cppo/seed-0 was run with other options (perception_weight)" in capsys.readouterr().err


def test_timing_runs_alone_and_in_turn(write_study, stub_cells):
    assert main(["compare", "--config", write_study(timing_steps=2, timing_repeats=2, seeds=1)]) == 0
    order = [line.split("/out/")[1] for line in stub_cells.read_text().splitlines()]
    assert order[3:] == [f"timing/digits/{label}/round-{n}" for n in (0, 1) for label in ("grpo", "cppo")]
    assert read(stub_cells.parent)["cost"]["digits"]["cppo"]["alone"] is True


def test_times_are_those_alone_only_where_every_method_has_them(write_study, stub_cells):
    assert main(["compare", "--config", write_study(timing_steps=2, timing_repeats=1, seeds=1)]) == 0
    file = write_study(timing_steps=2, timing_repeats=1, seeds=2)
    assert main(["compare", "--config", write_study(timing_steps=2, timing_repeats=1, seeds=2)]) == 0  # no other times
    (stub_cells.parent / "timing/digits/cppo/round-0" / RESULT).unlink()
    assert main(["compare", "--config", file, "--report_only"]) == 0
    assert {cost["alone"] for cost in read(stub_cells.parent)["cost"]["digits"].values()} == {False}


def test_equal_time_takes_the_mean_step():
    run = {"task": "digits", "label": "grpo", "device": "cpu", "peak_mib": 1.0, "code": "a"}
    slow = {**run, "label": "cppo", "code": "b", "step_seconds": [9.0] * 3, "step_cpu_seconds": [2.0] * 3}
    grpo = {**run, "step_seconds": [7.0] * 3, "step_cpu_seconds": [1.0, 1.0, 4.0]}
    study = SimpleNamespace(variants=[SimpleNamespace(label="grpo"), SimpleNamespace(label="cppo")])
    costs = _costs(study, "digits", [grpo, slow], [grpo])
    assert (costs["grpo"]["step_cpu_seconds"], costs["grpo"]["compared_seconds"]) == (1.0, 2.0)
    assert costs["cppo"]["compared_seconds"] == 2.0
    results = {"cost": {"digits": costs}, "study": {"control": "grpo"}}
    assert "TIMED BY 2 VERSIONS" in _cost_table(results, "digits").caption
    costs["cppo"]["code"] = ["a"]
    assert "VERSIONS" not in _cost_table(results, "digits").caption
    alone = _costs(study, "digits", [grpo, slow], [grpo, slow])
    assert (alone["grpo"]["compared_seconds"], alone["cppo"]["compared_seconds"]) == (7.0, 9.0)
    warm = {**grpo, "step_seconds": [70.0, 7.0, 8.0]}
    assert _costs(study, "digits", [], [warm, slow])["grpo"]["compared_seconds"] == 7.5
    # On a GPU the processor's clock says little, and the wall's counts for cells too.
    on_gpu = _costs(study, "digits", [{**one, "device": "cuda"} for one in (grpo, slow)], [])
    assert (on_gpu["grpo"]["compared_seconds"], on_gpu["cppo"]["compared_seconds"]) == (7.0, 9.0)
    peaks = [{**grpo, "peak_mib": peak} for peak in (5.0, 90.0, 2.0)]
    assert _costs(study, "digits", peaks, [])["grpo"]["peak_mib"] == 5.0


def test_other_prompts_are_told(write_study, stub_cells):
    other = {"label": "other", "method": "cppo", "learning_rate": 3.0}
    assert main(["compare", "--config", write_study(methods=["grpo", other])]) == 0
    assert read(stub_cells.parent)["other_prompts"] == ["other"]
    assert (
        "all methods saw the same prompts in the same order, EXCEPT other. The"
        in (stub_cells.parent / "summary.md").read_text()
    )


def test_changed_files_are_not_the_same_data(write_study, stub_cells, tmp_path, capsys):
    data, reward, view, score = (tmp_path / name for name in ("rows.jsonl", "mine.py", "mine_too.py", "score.py"))
    score.write_text("def fall(anchor, removing):\n    return anchor.logps - removing.logps\n")
    view.write_text("def same(image, rng):\n    return image\n")
    data.write_text('{"prompt": "a", "answer": "1"}\n')
    reward.write_text("def zero(completions, **columns):\n    return [0.0] * len(completions)\n")
    task = {"data": str(data), "eval_data": str(data), "rewards": ["accuracy", f"{reward}:zero"]}
    task["removing_views"], task["perception_score"] = [f"{view}:same"], f"{score}:fall"
    file = write_study(tasks={"rows": task}, seeds=1)
    assert main(["compare", "--config", file]) == 0
    data.write_text('{"prompt": "a", "answer": "2"}\n')
    assert main(["compare", "--config", file]) == 2
    assert "start/rows was run with other options (contents_of_files)" in capsys.readouterr().err
    data.write_text('{"prompt": "a", "answer": "1"}\n')
    assert main(["compare", "--config", file]) == 0
    reward.write_text(reward.read_text().replace("0.0", "1.0"))
    assert main(["compare", "--config", file]) == 2
    assert "cells/rows/grpo/seed-0 was run with other options (contents_of_files)" in capsys.readouterr().err
    reward.write_text(reward.read_text().replace("1.0", "0.0"))
    score.write_text(score.read_text().replace("- removing.logps", ""))
    assert main(["compare", "--config", file]) == 2
    assert "cells/rows/grpo/seed-0 was run with other options (contents_of_files)" in capsys.readouterr().err
    score.write_text("def fall(anchor, removing):\n    return anchor.logps - removing.logps\n")
    assert main(["compare", "--config", file]) == 0
    view.write_text("def same(image, rng):\n    return image.copy()\n")
    assert main(["compare", "--config", file]) == 2
    assert "start/rows was run with other options (contents_of_files)" in capsys.readouterr().err
    assert ran(stub_cells) == 3


def test_rows_are_read_before_the_first_cell(write_study, stub_cells, tmp_path, capsys, refused):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "a", "answer": "1"}\n')
    task = {"data": str(data), "eval_data": str(data)}
    error = refused("compare", "--config", write_study(tasks={"rows": task}, seeds=1))
    assert "rows, grpo: " in error
    assert "no row has the column 'prompt'; the rows have 'question', 'answer'" in error
    assert ran(stub_cells) == 0
    file = write_study(tasks={"rows": {**task, "columns": {"prompt": "question"}}}, seeds=1)
    assert main(["compare", "--config", file]) == 0
    assert f"warning: {data} is both data and eval_data" in capsys.readouterr().err
    data.unlink()
    assert main(["compare", "--config", file, "--report_only"]) == 2


def test_a_cell_that_cannot_be_written_stops_no_other(write_study, stub_cells, capsys, monkeypatch):
    begin = Job.begin

    def full_disk(job):
        if job.name == "digits, cppo, seed 0":
            raise OSError(errno.ENOSPC, "No space left on device")
        begin(job)

    monkeypatch.setattr(Job, "begin", full_disk)
    assert main(["compare", "--config", write_study(seeds=1)]) == 1
    assert "digits, cppo, seed 0 cannot be started: " in capsys.readouterr().err
    assert ran(stub_cells) == 2
    text = (stub_cells.parent / "summary.md").read_text()
    assert "1 cell finished, 1 not: digits, cppo, seed 0." in text


def test_each_worker_has_a_gpu_of_its_own(study, stub_cells):
    jobs = study_jobs(study)[1:3]
    run_jobs(jobs, workers=2, threads=1, finished=lambda *_: None, gpus=["4", "7"])
    assert [job.result()["gpu"] for job in jobs] == ["4", "7"]


@pytest.mark.parametrize(
    ("content", "share"),
    [(None, 0.0), ('{"step": 3, "last_step": 12}', 0.25), ('{"step": 3, "last_step": 0}', 0.0), ("[", 0.0), ("3", 0.0)],
)
def test_the_share_of_its_steps_that_a_cell_has_done(study, content, share):
    job = study_jobs(study)[1]
    job.begin()
    if content is not None:
        (job.folder / "progress.json").write_text(content)
    assert share_done(job) == share
    job.begin()  # a new try forgets how far the last one came
    assert share_done(job) == 0.0


@pytest.mark.parametrize(("given", "found"), [(None, ["0", "1"]), ("5,3", ["5", "3"])])
def test_the_gpus_that_may_be_used(write_study, monkeypatch, given, found):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert free_gpus(load_study(write_study())) == []  # its cells train on the CPU
    study = load_study(write_study(options={"max_steps": 2, "use_cpu": False}))
    assert free_gpus(study) == found
    assert free_workers(study, found) == 2


def test_sigterm_ends_the_cells_with_the_command(write_study, stub_cells):
    slow = {"label": "slow", "method": "cppo", "learning_rate": 2.0}
    file = write_study(methods=["grpo", slow], seeds=1, workers=1)
    program = "import sys; from cppo.comparison import pool; pool.COMMAND = tuple(sys.argv[1:3]); "
    program += "from cppo.cli.main import main; sys.exit(main(sys.argv[3:]))"
    argv = [sys.executable, "-c", program, *pool.COMMAND, "compare", "--config", file]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    log = stub_cells.parent / "cells/digits/slow/seed-0/log.txt"
    wait_until(lambda: log.is_file() and log.read_text().count("\n"))
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1].endswith("cppo: stopped\n")
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)
    assert ran(stub_cells) == 2  # the start and the finished cell stay


def test_a_second_command_is_refused(write_study, stub_cells, capsys):
    from cppo.cli.compare import only_one

    study = load_study(write_study())
    with only_one(study.output_dir):
        assert main(["compare", "--config", write_study()]) == 2
    assert "another `cppo compare` is running" in capsys.readouterr().err


def test_stopping_ends_the_processes(write_study, stub_cells):
    study = load_study(write_study(options={"max_steps": 2, "learning_rate": 2.0}, seeds=1))
    jobs = study_jobs(study)
    processes = [pool.start(job, threads=1) for job in jobs[:2]]
    try:
        wait_until(lambda: all(job.log.read_text() for job in jobs[:2]))
    finally:
        pool.stop(processes)
    for process in processes:
        assert process.returncode == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
    assert not any(job.result() for job in jobs)


def test_an_unreadable_result_is_named(write_study, stub_cells, capsys):
    file = write_study()
    assert main(["compare", "--config", file]) == 0
    (stub_cells.parent / "cells/digits/grpo/seed-0" / RESULT).write_text("{")
    assert main(["compare", "--config", file]) == 2
    assert "remove it to run the cell again" in capsys.readouterr().err
