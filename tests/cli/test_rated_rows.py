"""Rows that a run sorts and leaves out by their ratings, and what it refuses."""

import json
from pathlib import Path

import pytest
from pictures import picture
from small_model import SHORT_RUN

from cppo.cli.main import main
from cppo.data.ratings import RATINGS
from cppo.data.readers import load_records
from cppo.line_file import LineFile
from cppo.recipes import load_recipe
from cppo.runs.sources import load_sources

ENTROPY = [0.9, 0.1, 0.5, 0.0, 0.7, 0.3]
DISCRETE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
CONFIDENCE = [0.25, 1.0, 0.5, 1.0, 0.375, 0.75]
ACCURACY = [0.0, 1.0, 0.5, 0.25, 0.375, 0.75]


@pytest.fixture
def rated(tmp_path):
    """Six rows, and the file of their ratings."""
    for number in range(6):
        picture(number, (56, 56)).save(tmp_path / f"{number}.png")
    file, ratings = tmp_path / "rows.jsonl", tmp_path / "ratings.jsonl"
    write(file, range(6))
    source, lines = load_records(str(file)), LineFile(str(ratings), RATINGS, {"samples": 8}, "--out")
    for index in range(6):
        cells = {
            "accuracy": ACCURACY[index],
            "confidence": CONFIDENCE[index],
            "clusters": 1,
            "answers": [["1", 8, 1.0]],
        }
        entropies = {"semantic_entropy": ENTROPY[index], "discrete_semantic_entropy": DISCRETE[index]}
        lines.append({"row": source.content_digest(index), "id": source[index].id, **cells, **entropies})
    return str(file), str(ratings)


def write(file, numbers):
    rows = [{"prompt": f"What is {n}?", "images": [f"{n}.png"], "answer": str(n)} for n in numbers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(rated, **options):
    """The answers of the rows to train on, in their order."""
    recipe = load_recipe("train", "micro", {"data": rated[0], "data_ratings": rated[1], **options})
    return [record.answer for record in load_sources(recipe).train]


def test_stages_sort_by_entropy_from_low_to_high(rated, tmp_path):
    assert answers(rated, data_stages=2) == ["3", "1", "5", "2", "4", "0"]
    assert answers(rated, data_stages=2, data_order="discrete_semantic_entropy") == ["0", "1", "2", "3", "4", "5"]
    # The content of a row finds its rating, wherever the row stands; some rows may be gone.
    write(tmp_path / "rows.jsonl", [5, 0, 3])
    assert answers(rated, data_stages=3) == ["3", "5", "0"]


def test_a_band_leaves_rows_out(rated, capsys):
    assert answers(rated, data_confidence_band=[0.25, 0.75]) == ["0", "2", "4", "5"]
    assert "2 of 6 rows are left out of training; 4 have confidence in [0.25, 0.75]" in capsys.readouterr().err
    assert answers(rated, data_accuracy_band=[0.0, 0.5]) == ["0", "2", "3", "4"]
    both = {"data_accuracy_band": [0.3, 1.0], "data_confidence_band": [0.0, 0.8], "data_stages": 2}
    assert answers(rated, **both) == ["5", "2", "4"]


def test_a_run_trains_on_what_is_left(rated, small_model, tmp_path, capsys):
    options = {**SHORT_RUN, "max_steps": 2, "data_stages": 2, "data_ratings": rated[1], "output_dir": tmp_path / "run"}
    options |= {"data": rated[0], "model": small_model, "data_confidence_band": "[0.3, 1]", "final_eval_samples": 0}
    options |= {"per_device_train_batch_size": 2, "probe_steps": 0, "data_order": "discrete_semantic_entropy"}
    argv = ["train", "--config", "micro", *(word for name, value in options.items() for word in (f"--{name}", value))]
    assert main(list(map(str, argv))) == 0
    shown = capsys.readouterr().err
    assert "1 of 6 rows are left out of training" in shown
    order = "confidence in [0.3, 1], 2 stages from low to high discrete_semantic_entropy"
    assert f"order      {order}, as rated in {rated[1]}\n" in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows_outside_bands"] == 1
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["data_stage"] for line in logged if "data_stage" in line] == [1, 2]
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "data_stages: 2" in config
    assert "data_order: discrete_semantic_entropy" in config


def test_a_resume_takes_the_same_rows_in_the_same_order(rated, small_model, tmp_path, capsys, refused):
    data, ratings = rated
    options = {**SHORT_RUN, "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2, "model": small_model}
    options |= {"data": data, "data_stages": 2, "data_ratings": ratings, "output_dir": tmp_path / "run"}
    options |= {"final_eval_samples": 0, "probe_steps": 0}

    def train(**changed):
        given = {**options, **changed}.items()
        return ["train", "--config", "micro", *(str(word) for name, value in given for word in (f"--{name}", value))]

    assert main(train()) == 0
    resume = {"max_steps": 2, "resume_from_checkpoint": tmp_path / "run" / "checkpoint-1"}
    text = Path(ratings).read_text(encoding="utf-8")
    # The order of the rows is what counts, not the figures that it came from.
    Path(ratings).write_text(text.replace('"semantic_entropy": 0.9', '"semantic_entropy": 0.95'), encoding="utf-8")
    assert main(train(**resume, output_dir=tmp_path / "same")) == 0
    Path(ratings).write_text(text.replace('"semantic_entropy": 0.9', '"semantic_entropy": 0.2'), encoding="utf-8")
    other = train(**resume, output_dir=tmp_path / "other")
    assert "had other training rows, or these in another order: a file of `data` or" in refused(*other)
    # Another option announces the difference, in one line with the rows.
    assert main([*other, "--learning_rate", "1e-5"]) == 0
    assert "learning_rate: 0.0001 -> 1.0e-05; other training rows): it will differ" in capsys.readouterr().err


def test_what_is_refused(rated, tmp_path, refused):
    data, ratings = rated

    def check(*options, words):
        error = refused("train", "--config", "micro", "--data", data, "--output_dir", tmp_path / "run", *options)
        assert words in error

    check("--data_ratings", ratings, words="data_ratings: nothing uses the ratings: set data_stages above 1")
    check("--data_confidence_band", "[0, 1]", words="data_confidence_band = [0, 1] needs data_ratings")
    check("--data_order", "discrete_semantic_entropy", words="needs data_ratings: give the file that `cppo data rate`")
    for band in ("[0.5]", "[0.9, 0.1]", "[0, 2]"):
        check("--data_ratings", ratings, "--data_accuracy_band", band, words="give two fractions, [low, high]")
    narrow = ("--data_ratings", ratings, "--data_confidence_band", "[0.1, 0.2]")
    check(*narrow, words=f"{data}: no row has confidence in [0.1, 0.2]; confidence is 0.25 to 1")
    check("--data_ratings", tmp_path / "gone.jsonl", "--data_stages", "2", words="No such file")
    check("--data_ratings", data, "--data_stages", "2", words="was not written by cppo data rate")
    write(tmp_path / "rows.jsonl", [0, 1, 2])
    picture(9, (56, 56)).save(tmp_path / "1.png")
    check("--data_ratings", ratings, "--data_stages", "2", words=f"{ratings} has no rating of {data} line 2: the row")
