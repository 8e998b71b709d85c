"""`cppo eval --suite` from end to end on a tiny model and small data sets in the layouts of the benchmarks."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cppo.cli.main import main
from cppo.evaluation.benchmarks import BENCHMARKS

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("wemath", "mathvision", "pope")


@pytest.fixture
def stand_ins(monkeypatch):
    """The script that makes small data sets in the layouts of the benchmarks, for those of NAMES alone."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("paper_suite")
    wanted = {BENCHMARKS[name].hub for name in NAMES}
    some = {hub: made for hub, made in script.REPOSITORIES.items() if hub in wanted}
    monkeypatch.setattr(script, "REPOSITORIES", some)
    return script


@pytest.fixture
def folder(tmp_path_factory, stand_ins):
    """A folder with the data sets of NAMES, as ORG/NAME."""
    root = tmp_path_factory.mktemp("benchmarks")
    stand_ins.write(root)
    return str(root)


def command(model, folder, *options, suite=NAMES):
    argv = ["eval", "--model", model, "--suite", *suite, "--benchmark_folder", folder, "--max_new_tokens", "6"]
    return main([*argv, "--device", "cpu", *options])


def test_a_table_and_figures(small_model, folder, tmp_path, capsys):
    file, responses = tmp_path / "figures.json", tmp_path / "responses"
    options = ["--samples", "3", "--prompt_suffix", "Put it in a box.", "--json", str(file)]
    assert command(small_model, folder, *options, "--responses", str(responses)) == 0
    shown = capsys.readouterr().out
    how = "avg@3, temperature 1, top_p 1, at most 6 new tokens; answers are read by rule; 95 % intervals\n"
    assert shown.startswith(how)
    assert re.search(
        r"^We-Math testmini +10 of 1,740 +score \(strict\) +\d+\.\d %  \[.* extraction$", shown, re.MULTILINE
    )
    assert re.search(r"^POPE +12 of 9,000 +F1 +", shown, re.MULTILINE)
    assert re.search(r"^mean of 2 of the paper's 7 +\d", shown, re.MULTILINE)
    assert "POPE: unverified, not in the mean" in shown

    figures = json.loads(file.read_text())
    assert (figures["samples"], figures["temperature"], figures["top_p"]) == (3, 1.0, 1.0)
    assert list(figures["benchmarks"]) == list(NAMES)
    assert figures["paper_mean"]["of"] == ["wemath", "mathvision"]
    headlines = [figures["benchmarks"][name]["figures"] for name in ("wemath", "mathvision")]
    by_hand = (headlines[0]["score (strict)"]["mean"] + headlines[1]["accuracy"]["mean"]) / 2
    assert figures["paper_mean"]["mean"] == pytest.approx(by_hand, rel=1e-12)
    assert set(figures["benchmarks"]["mathvision"]["by"]) == {"level", "subject"}
    assert set(figures["benchmarks"]["wemath"]["pass_at_k"]) == {"1", "2"}

    lines = [json.loads(line) for line in (responses / "wemath.jsonl").read_text().splitlines()]
    assert lines[0]["benchmark"] == "wemath"
    assert len(lines) == 11
    assert lines[1]["prompt"].endswith(" Put it in a box.")
    assert lines[1]["categories"] == {"problem": "2steps_0", "key": "2steps_1"}


def test_a_stopped_suite_goes_on(small_model, folder, tmp_path, monkeypatch, capsys):
    argv = ["--samples", "2", "--batch_size", "4", "--json"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert command(small_model, folder, *argv, f"{whole}.json", "--responses", str(whole)) == 0
    part.mkdir()
    (part / "wemath.jsonl").write_bytes((whole / "wemath.jsonl").read_bytes())
    some = (whole / "mathvision.jsonl").read_bytes().splitlines(keepends=True)
    (part / "mathvision.jsonl").write_bytes(b"".join(some[:4]) + some[4][:30])
    assert command(small_model, folder, *argv, f"{part}.json", "--responses", str(part)) == 0
    assert json.loads(Path(f"{part}.json").read_text()) == json.loads(Path(f"{whole}.json").read_text())
    for name in NAMES:
        assert (part / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    monkeypatch.setattr("cppo.evaluation.load_model", None)  # what is answered needs no model
    stored = part / "pope.jsonl"
    lines = stored.read_text()
    assert '"correct": [0.0, 0.0]' in lines
    stored.write_text(lines.replace('"correct": [0.0, 0.0]', '"correct": [1.0, 1.0]'))  # by other rules
    assert command(small_model, folder, *argv, f"{part}.json", "--responses", str(part)) == 0
    assert json.loads(Path(f"{part}.json").read_text()) == json.loads(Path(f"{whole}.json").read_text())
    capsys.readouterr()
    assert command(small_model, folder, "--samples", "3", "--responses", str(part)) == 2
    assert "samples was 2, now 3" in capsys.readouterr().err


def test_quick_asks_once(small_model, folder, tmp_path, monkeypatch):
    suites = importlib.import_module("cppo.evaluation.benchmarks.suites")
    short = suites.Suite((BENCHMARKS["wemath"],), samples=1, limit=4)
    monkeypatch.setitem(suites.SUITES, "quick", short)
    file = tmp_path / "figures.json"
    assert command(small_model, folder, "--json", str(file), suite=["quick"]) == 0
    figures = json.loads(file.read_text())
    assert (figures["samples"], figures["temperature"]) == (1, 1.0)
    assert figures["benchmarks"]["wemath"]["n"] in (3, 4)
    assert command(small_model, folder, "--temperature", "0", "--limit", "8", "--json", str(file), suite=["quick"]) == 0
    figures = json.loads(file.read_text())
    assert figures["temperature"] == 0.0
    assert figures["benchmarks"]["wemath"]["n"] in (6, 7)


def test_what_is_unverified_does_not_enter_the_mean(small_model, folder, tmp_path, monkeypatch):
    suites = importlib.import_module("cppo.evaluation.benchmarks.suites")
    monkeypatch.setitem(suites.BENCHMARKS, "mathvision", replace(BENCHMARKS["mathvision"], verified=False))
    file = tmp_path / "figures.json"
    assert command(small_model, folder, "--samples", "1", "--json", str(file), suite=["wemath", "mathvision"]) == 0
    assert json.loads(file.read_text())["paper_mean"]["of"] == ["wemath"]


def test_a_response_may_be_as_long_as_in_the_papers_harness():
    from cppo.cli.eval import _parser
    from cppo.cli.eval_suite import asked_suite

    arguments = _parser().parse_all(["--model", "micro", "--suite", "paper"])
    asked_suite(arguments)
    assert (arguments.samples, arguments.temperature, arguments.max_new_tokens) == (16, 1.0, 2048)


def test_the_script_of_the_documents(stand_ins, small_model, tmp_path, capsys):
    options = ["--model", small_model, "--suite", "pope", "--limit", "6", "--samples", "1", "--max_new_tokens", "4"]
    assert stand_ins.main([str(tmp_path / "new"), *options, "--device", "cpu"]) == 0
    assert re.search(r"^POPE +6 of 9,000 +F1 +\d", capsys.readouterr().out, re.MULTILINE)
    assert stand_ins.main([]) == 2


def test_the_list_of_benchmarks(capsys):
    assert main(["eval", "--list_benchmarks"]) == 0
    shown = capsys.readouterr().out
    for name, one in BENCHMARKS.items():
        assert re.search(rf"^{name} +{one.size:,} +.*hub:{one.hub} ", shown, re.MULTILINE)
        assert one.licence in shown
        assert one.answers in shown
        assert one.sources.metric in shown
    assert shown.count("; verified") == sum(one.verified for one in BENCHMARKS.values())


def test_what_goes_without_a_suite_and_what_not_with_one(refused, small_model, tmp_path):
    model = ["eval", "--model", small_model]
    assert refused(*model) == "give --data or --suite"
    assert refused("eval", "--data", "tasks:digits") == "give --model: `micro`, a folder or a Hugging Face name"
    assert refused(*model, "--data", "tasks:digits", "--benchmark_folder", "x") == "--benchmark_folder needs --suite"
    for option in (["--data", "tasks:digits"], ["--card"], ["--blank"], ["--by", "level"], ["--columns", "{}"]):
        assert refused(*model, "--suite", "pope", *option).startswith(f"{option[0]} does not go with --suite")
    assert "did you mean `pope`" in refused(*model, "--suite", "pop")
    file = tmp_path / "file"
    file.write_text("")
    assert "it is a folder" in refused(*model, "--suite", "pope", "--responses", file)
    line = refused(*model, "--suite", "pope", "--benchmark_folder", tmp_path)
    assert line.startswith(f"POPE: there is no folder {tmp_path}/lmms-lab/POPE: run `hf download lmms-lab/POPE ")
