"""A first run on twenty pictures of one's own: the recipe for few rows, and what a start on a CPU chooses."""

import json

import pytest
import yaml
from pictures import picture

from cppo.cli.main import main

ROWS = 20
SHORT = ["--max_completion_length", "8", "--max_steps", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A JSONL file of twenty rows, a picture each."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(ROWS):
        picture(number, (40, 32)).save(folder / f"{number}.png")
        rows.append({"prompt": "What is it?", "images": [f"{number}.png"], "answer": str(number), "response": "It."})
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "mine.jsonl"


def train(*argv, command="train"):
    assert main([command, *map(str, argv)]) == 0


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_few_rows_train_on_a_cpu_in_float32(pictures, small_model, tmp_path, capsys):
    run = tmp_path / "run"
    train("--config", "few-rows", "--model", small_model, "--data", pictures, "--output_dir", run, *SHORT)
    error = capsys.readouterr().err
    assert error.count("training runs on the CPU, in float32") == 1
    assert config_of(run)["bf16"] is False
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "reward" in line] == [1, 2]
    assert (run / "adapter_model.safetensors").is_file()


def test_supervised_fine_tuning_chooses_float32_too(pictures, small_model, tmp_path, capsys):
    run = tmp_path / "run"
    train("--model", small_model, "--data", pictures, "--output_dir", run, "--max_steps", 1, command="sft")
    assert capsys.readouterr().err.count("training runs on the CPU, in float32") == 1
    assert config_of(run)["bf16"] is False


def test_a_precision_that_is_given_stays(pictures, small_model, tmp_path, capsys, refused):
    argv = ["--config", "few-rows", "--model", small_model, "--data", pictures, "--output_dir", tmp_path / "run"]
    assert "bf16 is asked for" in refused("train", *argv, "--bf16")
    train(*argv, *SHORT, "--bf16", "--use_cpu", "--dry_run")
    assert "in float32" not in capsys.readouterr().err
