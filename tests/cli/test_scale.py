"""Recipes and launchers for several GPUs, as far as a CPU goes: they parse, build, and train on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from cppo.cli.main import main
from cppo.errors import UserError
from cppo.recipes import accelerate_files, load_recipe, recipe_names
from cppo.recipes.run_dir import CONFIG_HEADER
from cppo.runs.prepare import build_config

ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


def train_recipes():
    return [name for name in recipe_names() if name.startswith(("cppo-", "lora-", "vllm-"))]


@pytest.mark.parametrize("name", train_recipes())
def test_recipes_of_large_models_build_and_train(name, small_model, capsys):
    """Three real batches with the recipe's own options, but for sizes, device and rollouts without vLLM."""
    group = load_recipe("train", name).config["num_generations"]
    sizes = ["--per_device_train_batch_size", group, "--steps_per_generation", 2, "--gradient_accumulation_steps", 1]
    short = ["--max_completion_length", "8", "--max_steps", "3", "--use_vllm", "false"]
    options = ["--model", small_model, "--data", "tasks:digits?n=8", *sizes, *short, *ON_CPU]
    assert main([*map(str, ["train", "--config", name, *options, "--dry_run"])]) == 0
    plan = capsys.readouterr().out
    assert f"x {group} responses" in plan
    assert "accuracy_reward x 0.9, format_reward x 0.1" in plan


@pytest.mark.parametrize(
    ("name", "model", "data"),
    [
        ("cppo-3b", "3B", "hub:TIGER-Lab/ViRL39K:train"),
        ("cppo-7b", "7B", "hub:TIGER-Lab/ViRL39K:train"),
        ("vllm-colocate", "3B", "hub:TIGER-Lab/ViRL39K:train"),
        ("vllm-server", "3B", "hub:TIGER-Lab/ViRL39K:train"),
    ],
)
def test_recommended_recipes_say_what_they_are(name, model, data):
    recipe = load_recipe("train", name)
    assert recipe.options.model == f"Qwen/Qwen2.5-VL-{model}-Instruct"
    assert recipe.options.data == data
    assert recipe.options.columns == "virl39k"
    assert recipe.output_dir == f"runs/{name}"
    processes = 4 if name == "vllm-server" else 8
    rollouts = processes * recipe.config["per_device_train_batch_size"]
    assert rollouts * recipe.config["steps_per_generation"] == 512 * 5
    assert rollouts * recipe.config["gradient_accumulation_steps"] == 64 * 5


@pytest.mark.parametrize(("name", "mode"), [("vllm-colocate", "colocate"), ("vllm-server", "server")])
def test_vllm_recipes_make_a_configuration(name, mode):
    recipe = load_recipe("train", name, {"use_cpu": True, "bf16": False})
    args = build_config(recipe)
    assert (args.use_vllm, args.vllm_mode) == (True, mode)
    # A server takes its length from its own command line.
    assert args.vllm_max_model_length == (8192 if mode == "colocate" else None)


def test_a_recipe_may_extend_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("extends: cppo-paper\nlearning_rate: 1.0e-5\n")
    Path("own.yaml").write_text("extends: mine.yaml\ndata: my.jsonl\n")
    (tmp_path / "deep").mkdir()
    Path("deep/base.yaml").write_text("extends: micro\nlearning_rate: 2.0e-5\n")
    Path("deep/own.yaml").write_text("extends: base.yaml\n")
    assert load_recipe("train", "deep/own.yaml").config["learning_rate"] == 2.0e-5
    own, paper = load_recipe("train", "own.yaml"), load_recipe("train", "cppo-paper")
    assert own.options.data == "my.jsonl"
    assert own.options.columns is None
    assert own.config == {**paper.config, "learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, "extends itself, through a.yaml, b.yaml"),
        ({"a": "extends: nothing"}, "recipe 'nothing': no such file"),
        ({"a": "extends: [micro]"}, "is neither the name of a recipe nor a file"),
    ],
)
def test_recipes_that_extend_nothing(texts, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_recipe("train", "a.yaml")


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("1gpu", DistributedType.NO, 1, 1),
        ("2nodes-fsdp2", DistributedType.FSDP, 2, 16),
        ("8gpu-fsdp2", DistributedType.FSDP, 1, 8),
        ("8gpu-zero3", DistributedType.DEEPSPEED, 1, 8),
    ],
)
def test_accelerate_reads_our_configurations(name, kind, machines, processes):
    file = accelerate_files()[name]
    config = load_config_from_file(str(file))
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    given = yaml.safe_load(file.read_text())
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "cppo", "train"])
    if kind != DistributedType.DEEPSPEED:  # which must be installed for this
        arguments = _validate_launch_command(arguments)[0]
        assert arguments.use_fsdp == (kind == DistributedType.FSDP)
        assert arguments.mixed_precision == "bf16"
    for options in (given.get("fsdp_config") or {}, given.get("deepspeed_config") or {}):
        for option in options:
            assert hasattr(arguments, option), option


def test_configurations_are_listed_and_copied(capsys, tmp_path):
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    for name, file in accelerate_files().items():
        assert f"{name} " in listed
        assert main(["recipes", "copy", name, str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.yaml").read_text() == file.read_text()


def launch(processes, *words):
    """A command under torchrun, or alone."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "cppo"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else ["-m", "cppo"]), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def launch_train(model, folder, processes, *options):
    sizes = ["--num_generations", "2", "--per_device_train_batch_size", str(8 // processes), "--max_steps", "2"]
    rest = ["--max_completion_length", "8", "--perception_gate", "none", "--gradient_checkpointing", "false"]
    data = ["--data", "tasks:digits?n=12", "--eval_data", "tasks:digits?n=9", "--final_eval_samples", "9"]
    named = ["train", "--config", "micro", "--model", model, "--output_dir", str(folder)]
    return launch(processes, *named, *data, *sizes, *rest, *options)


def test_the_same_command_under_torchrun(small_model, tmp_path):
    """Two processes answer the same held-out items as one, write each file once, and say each thing once."""
    runs = {count: launch_train(small_model, tmp_path / str(count), count) for count in (1, 2)}
    for count, run in runs.items():
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("before ") == 1
        assert run.stderr.count("step 2/2") == 1
        steps = [
            json.loads(line)["step"] for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == [1, 2]
    before = [json.loads((tmp_path / str(count) / "summary.json").read_text())["before"] for count in (1, 2)]
    assert before[0] == before[1]
    assert before[0]["n"] == 9


def test_sft_under_torchrun(small_model, tmp_path):
    """An earlier run's checkpoints are removed, and each file is written, by the first process alone."""
    folder = tmp_path / "run"
    (folder / "checkpoint-7").mkdir(parents=True)
    (folder / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7}')
    (folder / "config.yaml").write_text(CONFIG_HEADER)
    sizes = ["--per_device_train_batch_size", "2", "--max_steps", "2", "--gradient_checkpointing", "false"]
    data = ["--data", "tasks:digits?n=12", "--logging_steps", "1"]
    named = ["sft", "--model", small_model, "--output_dir", str(folder), "--overwrite"]
    run = launch(2, *named, *data, *sizes, *ON_CPU)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("model ") == 1
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not (folder / "checkpoint-7").exists()


def test_a_mistake_that_the_first_process_does_not_see_is_said_too(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("cppo.errors.PATIENCE_SECONDS", 0.0)
    assert main(["tarin"]) == 2
    assert capsys.readouterr().err.startswith("cppo: error: unknown command `tarin`")


def test_only_training_is_for_several_processes(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main(["inspect", "--model", "micro", "--data", "tasks:digits"]) == 2
    assert capsys.readouterr().err == (
        "cppo: error: `cppo inspect` runs in one process: start it without accelerate launch or torchrun\n"
    )
    assert main(["train", "--data", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: reset by peer"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0"),
    ],
)
def test_a_process_that_loses_another_says_so_in_one_line(monkeypatch, refused, error):
    monkeypatch.setattr("cppo.cli.train.run", Mock(side_effect=error))
    assert refused("train").startswith("another process of this run has ended, so this one ends too")


def test_other_errors_of_torch_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("cppo.cli.train.run", Mock(side_effect=RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        main(["train"])


def test_a_mistake_under_torchrun_is_said_once_and_is_the_cause_at_the_end(small_model, tmp_path):
    run = launch_train(small_model, tmp_path / "run", 2, "--data", "nothing.jsonl")
    assert run.returncode != 0
    said = "cppo: error: data 'nothing.jsonl': there is no such file"
    first, *_, cause, border = run.stderr.strip().splitlines()
    assert (first, cause, set(border)) == (said, f"  traceback : {said}", {"="})
    assert run.stderr.count("cppo: error: ") == 2
