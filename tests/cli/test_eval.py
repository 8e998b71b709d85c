"""`cppo eval`: sampling, categories, stored responses and the perception card, from end to end on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
from pictures import write_rows

from cppo.cli.eval_report import category_rows, report_lines
from cppo.cli.main import main
from cppo.cli.trained import trained_recipe
from cppo.evaluation import EvalResult, ItemResult, mean_interval
from cppo.files import content_fingerprint, model_fingerprint


@pytest.fixture
def data(tmp_path):
    """Seven rows with a picture each, in categories; one is unlike any text that should reach a terminal."""
    columns = [
        {
            "answer": str(number),
            "level": [1, 2, 10][number % 3],
            "meta": {"source": "\u001b[31mred\u001b[0m" if number == 6 else "plain"},
        }
        for number in range(7)
    ]
    return write_rows(tmp_path / "data.jsonl", columns)


@pytest.fixture
def scripted(monkeypatch):
    """A model that answers 1 whatever it is asked, in half of its samples; the images that it was shown, by call."""
    calls = []

    class Scripted:
        def answer(self, prompts, images, *, streams, **options):
            calls.append(images)
            return [f"<think> ? </think> \\boxed{{{1 if stream.random() < 0.5 else 'no'}}}" for stream in streams]

    monkeypatch.setattr("cppo.evaluation.load_model", lambda *args, **kwargs: (Scripted(), None))
    return calls


def command(model, *options):
    return ["eval", "--model", model, "--max_new_tokens", "6", "--device", "cpu", *options]


def evaluate(model, *options):
    return main(command(model, *options))


def figures(file):
    return json.loads(file.read_text())


def test_every_response_does_not_depend_on_the_batch(small_model, data, tmp_path):
    stored = {}
    for size in ("1", "5", "64"):
        argv = ["--data", data, "--samples", "3", "--temperature", "1.5", "--batch_size", size]
        assert evaluate(small_model, *argv, "--responses", str(tmp_path / f"{size}.jsonl")) == 0
        stored[size] = (tmp_path / f"{size}.jsonl").read_text()
    assert stored["1"] == stored["5"] == stored["64"]
    lines = [json.loads(line) for line in stored["1"].splitlines()]
    assert lines[0]["cppo_eval"] == 1
    assert len(lines) == 8
    assert len({text for line in lines[1:] for text in line["responses"]}) > 3
    assert lines[1]["prompt"] == "What is in picture 0?"


def test_a_stopped_evaluation_goes_on(small_model, data, tmp_path, monkeypatch, capsys, scripted):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    argv = ["--data", data, "--samples", "2", "--batch_size", "4", "--card", "blank", "shuffle"]
    assert evaluate(small_model, *argv, "--responses", str(whole), "--json", str(tmp_path / "whole.json")) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:11]) + lines[11][:20])
    scripted.clear()
    options = ["--json", str(tmp_path / "part.json"), "--by", "level"]
    assert evaluate(small_model, *argv, "--responses", str(part), *options) == 0
    # of 3 x 7 items 10 were there: 7 clean and 3 blank ones. The third blank one is asked again with the fourth, for
    # they share a batch.
    assert sum(map(len, scripted)) == 2 * (5 + 7)
    assert [json.loads(line)["responses"] for line in part.read_bytes().splitlines()[1:]] == [
        json.loads(line)["responses"] for line in lines[1:]
    ]
    ours, theirs = figures(tmp_path / "part.json"), figures(tmp_path / "whole.json")
    assert {name: ours[name] for name in theirs} == theirs
    scripted.clear()
    monkeypatch.setattr("cppo.evaluation.load_model", None)  # where nothing is missing no model is loaded
    assert evaluate(small_model, *argv, "--responses", str(part), "--limit", "5") == 0
    assert not scripted
    capsys.readouterr()


def test_responses_of_another_evaluation_are_refused(small_model, data, tmp_path, refused, scripted):
    file = tmp_path / "r.jsonl"
    assert evaluate(small_model, "--data", data, "--responses", str(file)) == 0
    before = file.read_bytes()

    def check(*options, words, path=data):
        error = refused(*command(small_model, "--data", path, "--responses", file, *options))
        assert error.startswith("--responses: ")
        assert words in error

    check("--samples", "2", words="samples was 1, now 2")
    check("--dtype", "bfloat16", words='dtype was "float32", now "bfloat16"')
    check("--tolerance", "0.1", words="tolerance was 0.0, now 0.1")
    check("--system_prompt", "Think.", words='system_prompt was null, now "Think."')
    text = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("picture 6", "picture six"))
    check(words="data was", path=str(tmp_path / "other.jsonl"))
    assert file.read_bytes() == before
    lines = before.decode().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1] + '{"condition": "clean"}\n' + lines[2])
    check(words="line 3 is damaged")
    for values in ({"responses": [5]}, {"responses": [None]}, {"correct": ["x"]}, {"choices": [5]}):
        file.write_text(lines[0] + lines[1] + json.dumps(json.loads(lines[2]) | values) + "\n")
        check(words="line 3 is damaged")
    swapped = json.loads(lines[2]) | {"id": "other"}
    file.write_text(lines[0] + lines[1] + json.dumps(swapped) + "\n")
    check(words="has 'other' where the data has")
    for foreign in ("my notes", '{"a": 1}\n', "[1]\n", '{"cppo_eval": 2}\n'):
        file.write_text(foreign)
        check(words="was not written by cppo eval")
        assert file.read_text() == foreign
    file.write_bytes(b"\xff\xfe\n")
    check(words="not UTF-8")


def test_fingerprints_tell_contents_not_places(small_model, data, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(small_model, copy)
    assert model_fingerprint(copy) == model_fingerprint(Path(small_model))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(copy) != model_fingerprint(Path(small_model))
    assert content_fingerprint(Path(shutil.copy(data, copy))) == content_fingerprint(Path(data))


def test_large_files_are_sampled_to_their_ends(tmp_path, monkeypatch):
    from cppo import files

    monkeypatch.setattr(files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(files, "BLOCK_BYTES", 10)
    file = tmp_path / "large.jsonl"
    content = bytearray(10_000)
    file.write_bytes(content)
    first = content_fingerprint(file)
    for place in (0, 9_999):
        changed = bytearray(content)
        changed[place] = 1
        file.write_bytes(changed)
        assert content_fingerprint(file) != first


def test_avg_pass_at_k_and_categories(small_model, data, tmp_path, capsys, scripted):
    file, responses = tmp_path / "f.json", tmp_path / "r.jsonl"
    argv = ["--data", data, "--samples", "6", "--by", "level", "meta.source", "--json", str(file)]
    assert evaluate(small_model, *argv, "--responses", str(responses)) == 0
    found = figures(file)
    stored = [json.loads(line) for line in responses.read_text().splitlines()[1:]]
    right = [sum(line["correct"]) for line in stored]
    assert right[1] == sum("boxed{1}" in text for text in stored[1]["responses"]) > 0
    assert sum(right) == right[1]
    assert found["accuracy"] == pytest.approx(right[1] / 6 / 7, abs=1e-12)
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    assert found["pass_at_k"]["1"]["mean"] == pytest.approx(found["accuracy"], abs=1e-12)
    assert [(row["value"], row["n"]) for row in found["by"]["level"]] == [("1", 3), ("2", 2), ("10", 2)]
    assert found["by"]["level"][1]["accuracy"] == pytest.approx(right[1] / 6 / 2, abs=1e-12)
    assert stored[2]["categories"] == {"level": "10", "meta.source": "plain"}
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:6]] == [
        *("items", "avg@6", "pass@1", "pass@2", "pass@4", "format"),
    ]
    assert "6 samples each, temperature 1, top_p 1" in out
    assert "\x1b" not in out
    assert "\ufffd[31mred" in out
    assert evaluate(small_model, *argv, "--pass_k", "3", "6") == 0
    assert list(figures(file)["pass_at_k"]) == ["3", "6"]


def test_the_card(small_model, data, tmp_path, capsys):
    file = tmp_path / "f.json"
    assert evaluate(small_model, "--data", data, "--card", "--blank", "--json", str(file)) == 0
    card = {row["condition"]: row for row in figures(file)["card"]}
    assert list(card) == ["clean", "blank", "trained_preserving", "held_out_preserving", "held_out_removing"]
    assert card["clean"]["n"] == 7
    assert card["blank"]["accuracy"]["mean"] == figures(file)["blank_accuracy"]
    assert figures(file)["trained_views"]["preserving"] == ["color_jitter", "perspective", "rotation"]
    out = capsys.readouterr().out
    assert "perception card" in out
    assert "held_out_removing: one of strong_blur, pixelate, shuffle\n" in out
    published = "color_jitter, perspective, rotation (published; the model's own are not known)"
    assert f"trained_preserving: one of {published}" in out
    assert "held_out_removing" in out


def test_the_card_takes_the_runs_own_views(small_model, data, tmp_path, scripted):
    """A rotation by 0 degrees is no change, which no published view is."""
    run = tmp_path / "run"
    shutil.copytree(small_model, run)
    (run / "config.yaml").write_text(
        f"model: {small_model}\ndata: {data}\noutput_dir: gone\n"
        "preserving_views: [rotation]\nview_rotation_degrees: 0.0\nremoving_views: [crop]\n"
    )
    assert evaluate(str(run), "--data", data, "--card", "trained_preserving", "trained_removing") == 0
    clean, preserving, removing = ([one.tobytes() for (one,) in images] for images in scripted)
    assert preserving == clean
    assert all(one != other for one, other in zip(removing, clean, strict=True))


def test_tasks_have_columns(small_model, capsys, scripted):
    data = ["--data", "tasks:digits?n=3", "tasks:chart?n=2&level=2"]
    assert evaluate(small_model, *data, "--by", "family", "level", "answer") == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("chart", "digits"))] == [
        ["chart", "2"],
        ["digits", "3"],
    ]
    assert evaluate(small_model, *data, "--by", "colour") == 2
    assert "tasks:digits: no row has the column 'colour'; the rows have 'family', 'seed', " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--by", "levle"],
            "no row has the column 'levle'; the rows have 'prompt', 'images', 'answer', 'level', 'meta'",
        ),
        (["--samples", "4", "--pass_k", "2", "8"], "--pass_k 8 needs at least 8 samples an item, but --samples is 4"),
        (["--samples", "4", "--temperature", "0"], "4 samples would all be the same"),
        (["--top_p", "0.9"], "--top_p needs sampling"),
        (["--top_p", "0", "--samples", "2"], "--top_p: expected a number in (0, 1], got '0'"),
        (["--temperature", "nan"], "expected a number in [0, inf), got 'nan'"),
        (["--card", "blurr"], "--card: 'blurr' is unknown; did you mean `blur`? choose one of clean, blank"),
        (["--responses", "/nowhere/r.jsonl"], "--responses: cannot write /nowhere/r.jsonl"),
        (["--responses", "a.json", "--json", "a.json"], "both name a.json"),
    ],
)
def test_mistakes_are_one_line(small_model, data, tmp_path, refused, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*command(small_model, "--data", data, *options))


def test_a_card_needs_images(small_model, tmp_path, refused):
    (tmp_path / "text.jsonl").write_text('{"prompt": "3 + 4?", "answer": "7"}\n')
    assert "has an image" in refused(*command(small_model, "--data", tmp_path / "text.jsonl", "--card"))


def test_the_trained_views_are_the_runs_own(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model: gone\ndata: gone.jsonl\noutput_dir: gone\nremoving_views: [crop]\nview_crop_side: [0.3, 0.4]\n"
    )
    views = trained_recipe(str(tmp_path))["views"]
    assert views.removing_families == ("crop",)
    assert views.strengths.crop_side == (0.3, 0.4)
    (tmp_path / "config.yaml").write_text("model: gone\ndata: gone.jsonl\nremoving_views: ['gone.py:f']\n")
    taken = trained_recipe(str(tmp_path))
    assert "views" not in taken
    assert "there is no file gone.py" in taken["views_error"]
    (tmp_path / "config.yaml").write_text("learning_rate: [1]\nnonsense: 3\n")
    assert "views" not in trained_recipe(str(tmp_path))


def test_the_trained_tolerance_needs_no_file_of_another_reward(tmp_path):
    (tmp_path / "config.yaml").write_text("rewards: ['gone.py:f', 'accuracy?tolerance=0.1']\n")
    assert trained_recipe(str(tmp_path))["tolerance"] == 0.1


def test_long_tables_are_cut_and_counted():
    items = tuple(ItemResult(str(n), "1", ("",), (float(n % 2),), (0.0,), 1) for n in range(80))
    result = EvalResult(items, 1)
    rows = category_rows(result, [f"c{n // 2}" for n in range(80)])
    assert len(rows) == 40
    assert rows[0] == {"value": "c0", "n": 2, "accuracy": 0.5, "accuracy_ci95": list(mean_interval([1.0, 0.0]))}
    report = {**result.to_dict(), "temperature": 0.0, "top_p": 1.0, "skipped_rows": 0, "by": {"c" * 99: rows}}
    lines = report_lines(report, ())
    assert lines[-1] == "... and 10 more (all of them with --json)"
    assert max(map(len, lines)) < 100
