"""Columns that look like a misspelt name of one that is read are reported, by every command that reads rows first."""

import json

import pytest
import yaml
from pictures import picture

from cppo.cli.main import main
from cppo.data import load_rows

LINE = "column 'imgaes' in 8 rows; did you mean 'images'?"


@pytest.fixture
def misspelt(tmp_path):
    """A file of eight rows whose pictures stand in `imgaes`."""
    picture(0, (40, 32)).save(tmp_path / "a.png")
    rows = [{"prompt": f"What, {n}?", "imgaes": ["a.png"], "answer": "1"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("extra", "columns", "lines"),
    [
        ({"imgs": []}, None, ["column 'imgs' in 1 row; did you mean 'images'?"]),
        ({"Image": "a.png"}, None, ["column 'Image' in 1 row; did you mean 'image'?"]),
        ({"respnse": "one"}, None, ["column 'respnse' in 1 row; did you mean 'response'?"]),
        ({"pictur": []}, {"images": "picture"}, ["column 'pictur' in 1 row; did you mean 'picture'?"]),
        ({"imgaes": None}, None, []),
        ({"answers": ["1"]}, None, []),
        ({"qid": 3, "source": "book"}, None, []),
        ({"choice": "A"}, {"choices": None}, []),
    ],
)
def test_only_what_looks_misspelt_is_reported(extra, columns, lines):
    """A row that has the column itself has another one beside it."""
    row = {"prompt": "?", "answer": "1"}
    rows = [{**row, **extra}, {**row, **({"picture": None} if columns else {})}]
    assert load_rows(rows, columns=columns).unread == lines


def test_data_check_and_init_report_it(misspelt, tmp_path, capsys):
    assert main(["data", "check", misspelt]) == 1
    captured = capsys.readouterr()
    assert f"unread      {LINE}" in captured.out
    assert captured.err.count("a misspelt column is not read") == 1
    assert main(["data", "check", misspelt, "--columns", "{images: null}"]) == 0
    assert "unread" not in capsys.readouterr().out
    out = tmp_path / "mine.yaml"
    assert main(["init", "--data", misspelt, "--model", "micro", "--machine", "cpu", "--out", str(out)]) == 0
    assert f"unread     {LINE}" in capsys.readouterr().out
    assert yaml.safe_load(out.read_text())["method"] == "grpo"


def test_a_start_reports_it(misspelt, small_model, tmp_path, capsys):
    sizes = ["--per_device_train_batch_size", "4", "--num_generations", "2", "--max_completion_length", "4"]
    argv = ["--model", small_model, "--data", misspelt, "--method", "grpo", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *argv, *sizes, "--dry_run"]) == 0
    assert f"cppo: warning: {misspelt}: nothing reads {LINE}" in capsys.readouterr().err


def test_data_check_counts_the_rows_where_a_whole_column_is_missing(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": "1"}) + "\n")
    assert main(["data", "check", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "rows        1, none of them usable\n"
    assert "no row has the column 'prompt'" in captured.err
