"""A first run on twenty pictures of one's own: the recipe for few rows, what a CPU chooses, and `cppo init`."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pictures import picture
from published_shapes import THREE_B

from cppo.cli.main import main
from cppo.options import check_group_sizes, schema
from cppo.recipes import load_recipe
from cppo.runs.memory_plan import need
from cppo.runs.memory_work import DDP, FSDP2, LORA
from cppo.runs.model_shapes import read_shapes
from cppo.runs.recipe_plan import recipe_work

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
    argv = ["--config", "few-rows", "--model", small_model, "--data", pictures, "--output_dir", run, *SHORT]
    train(*argv, "--dry_run")
    captured = capsys.readouterr()
    assert captured.err.count("training runs on the CPU, with weights of dtype bfloat16") == 1
    assert "weights trained, bfloat16 on cpu" in captured.out
    train(*argv, "--model_init_kwargs", "{dtype: float32}")
    assert capsys.readouterr().err.count("training runs on the CPU, in float32") == 1
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


# cppo init


@pytest.fixture(scope="module")
def metadata_folder(pictures, tmp_path_factory):
    """The same rows as a folder of pictures with a metadata.jsonl, in the layout of `datasets`."""
    folder = tmp_path_factory.mktemp("folder")
    rows = [json.loads(line) for line in pictures.read_text().splitlines()]
    for row in rows:
        (name,) = row.pop("images")
        shutil.copy(pictures.parent / name, folder / name)
        row["file_name"] = name
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the configuration of Qwen2.5-VL-3B alone."""
    folder = tmp_path_factory.mktemp("3B")
    THREE_B.save_pretrained(folder)
    return folder


def init(file, *argv):
    assert main(["init", *map(str, argv), "--out", str(file)]) == 0
    return file.read_text()


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_init_writes_a_recipe_that_trains(layout, pictures, metadata_folder, tmp_path, monkeypatch, capsys):
    """Twenty pictures, the micro model and a CPU; with images, since the folder names them otherwise."""
    monkeypatch.chdir(tmp_path)
    data = pictures if layout == "file" else metadata_folder
    text = init(tmp_path / "mine.yaml", "--data", data, "--model", "micro", "--machine", "cpu")
    assert f"train      cppo train --config {tmp_path / 'mine.yaml'}" in capsys.readouterr().out
    assert "20 usable rows, 0 bad, each with 1 image of up to 40 x 32 pixels" in text
    train("--config", "mine.yaml", "--max_steps", 3, "--per_device_train_batch_size", 16)
    steps = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "reward" in line] == [1, 2, 3]
    assert any(line.get("perception/gated_fraction") is not None for line in steps)


def test_every_choice_of_init_has_its_reason(pictures, tmp_path):
    text = init(tmp_path / "mine.yaml", "--data", pictures, "--model", "micro", "--machine", "cpu")
    blocks = text.strip().split("\n\n")
    assert all(block.startswith("# ") for block in blocks)
    assert yaml.safe_load(text)["num_generations"] == 8


def test_init_asks_for_the_form_only_where_instructions_help(pictures, small_model, tmp_path):
    """`micro` and its descendants have the form as tokens; a tokenizer that spells it in pieces reads instructions."""
    argv = ["--data", pictures, "--machine", "cpu"]
    for name, model in (("micro", "micro"), ("descendant", small_model)):
        text = init(tmp_path / f"{name}.yaml", *argv, "--model", model)
        assert "prompt_suffix" not in yaml.safe_load(text)
        assert "docs/start/micro.md teaches it your pictures" in text
    other = shutil.copytree(small_model, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace(json.dumps("| ?\\\\boxed\\{")[1:-1], ""))
    text = init(tmp_path / "other.yaml", *argv, "--model", other)
    assert "\\boxed{}" in yaml.safe_load(text)["prompt_suffix"]
    assert "docs/start/micro.md" not in text


def test_init_chooses_a_folder_that_is_free(pictures, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_model, "runs/sft")
    argv = ["--data", pictures, "--model", "runs/sft", "--machine", "cpu"]
    assert yaml.safe_load(init(Path("sft.yaml"), *argv))["output_dir"] == "runs/sft-2"
    train("--config", "sft.yaml", "--dry_run", *SHORT)


@pytest.mark.parametrize(
    ("machine", "rows", "adapter", "launcher"),
    [
        ("1x24", 20, True, "cppo train"),
        ("1x80", 2000, False, "cppo train"),
        ("8x80", 2000, False, "cppo recipes copy 8gpu-fsdp2 && accelerate launch"),
        ("8x24", 2000, False, "cppo recipes copy 8gpu-fsdp2 && accelerate launch"),
    ],
)
def test_init_for_gpus_holds_by_the_plan(machine, rows, adapter, launcher, published, tmp_path, capsys):
    """What it writes takes no more than nine tenths of each GPU, its batches are whole, and the dry run counts it."""
    file = tmp_path / "gpu.yaml"
    argv = ["--data", f"tasks:digits?n={rows}", "--model", published, "--machine", machine]
    init(file, *argv)
    assert f"train      {launcher}" in capsys.readouterr().out
    recipe = load_recipe("train", str(file))
    assert recipe.options.use_peft is adapter
    gpus, memory = map(int, machine.split("x"))
    work = recipe_work(recipe, gpus)
    way = LORA if adapter else FSDP2 if gpus > 1 else DDP
    found = need(read_shapes(str(published)), way, replace(work, generation_slice=work.num_generations))
    assert max(found.update, found.rollouts) <= 0.9 * memory * 2**30
    inherited = {name: field.default for name, field in schema("train").inherited.items()}
    check_group_sizes({**inherited, **recipe.config}, gpus)
    rollouts = gpus * recipe.config["per_device_train_batch_size"] * recipe.config["steps_per_generation"]
    assert rollouts <= rows * recipe.config["num_generations"]


def test_a_dry_run_of_a_recipe_for_a_gpu_counts_without_one(pictures, small_model, tmp_path, capsys):
    file = tmp_path / "gpu.yaml"
    init(file, "--data", pictures, "--model", small_model, "--machine", "1x24")
    train("--config", file, "--dry_run", "--output_dir", tmp_path / "run")
    assert "untried    " in capsys.readouterr().out


def test_init_never_replaces_a_file_and_says_what_is_missing(pictures, published, tmp_path, refused, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    argv = ["--data", pictures, "--model", "micro", "--machine", "cpu"]
    assert "exists already" in refused("init", *argv, "--out", file)
    assert file.read_text() == "mine"
    other = ["--out", tmp_path / "other.yaml"]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert refused("init", "--model", "micro", *other).startswith(
        "init needs --data and --machine: there is no terminal"
    )
    assert "expected here, cpu, or GPUS x GiB" in refused("init", *argv[:4], "--machine", "2 cards", *other)
    assert "there is no such folder" in refused("init", *argv, "--out", tmp_path / "no" / "file.yaml")
    assert "does not fit" in refused("init", *argv[:2], "--model", published, "--machine", "1x4", *other)
    assert not (tmp_path / "other.yaml").exists()


def test_init_asks_on_a_terminal(pictures, tmp_path, monkeypatch):
    answers = iter([str(pictures), "", "micro", "cpu"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert "model: micro" in init(tmp_path / "mine.yaml")
