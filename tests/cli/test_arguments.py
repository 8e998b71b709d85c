"""Mistakes in arguments and files: one line, exit status 2, before torch is imported."""

import json
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from cppo.cli import main as cli
from cppo.cli.parser import COUNT, Parser, add_data_options, check_output_file, number_in
from cppo.cli.trained import add_answer_options, answer_settings
from cppo.errors import UserError
from cppo.recipes import load_recipe
from cppo.recipes.run_dir import CONFIG_HEADER
from cppo.runs.checks import check_options

# Runs the command line in a fresh interpreter, then says whether torch got imported.
RUNNER = """
import sys
from cppo.cli.main import main
status = main(sys.argv[1:])
print("torch" if "torch" in sys.modules else "no torch")
sys.exit(status)
"""


def run_cli(*argv):
    return subprocess.run([sys.executable, "-c", RUNNER, *map(str, argv)], capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def _no_run_here(tmp_path, monkeypatch):
    """The default output folder, `runs/NAME`, is new whatever stands where the tests are started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    """A folder that passes the checks made before torch: nothing in it can be loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vision_config": {}}))
    return folder


@pytest.mark.parametrize("argv", [["train", "--help"], ["sft", "--help"], ["train", "--learning_rat", "1"]])
def test_help_and_misspelt_options_need_no_array_library(argv):
    program = "import sys; from cppo.cli.main import main; main(sys.argv[1:])"
    program += "; print(sorted({'numpy', 'PIL', 'torch', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]"
    assert ("--help" in argv) == (done.stderr == "")


def test_a_mistake_ends_with_status_2_one_line_and_no_torch(tmp_path, model):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "columns.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    reasons = {
        "empty": "empty.jsonl: there are no rows",
        "broken": "line 1: is not valid JSON",
        "columns": "no row has the column 'prompt'",
    }
    data = [(["--data", tmp_path / f"{name}.jsonl", "--model", model], words) for name, words in reasons.items()]
    out = ["--output_dir", tmp_path / "run"]
    cases = [
        *((["train", *argv, *out], words) for argv, words in data),
        *((["eval", *argv], words) for argv, words in data),
        *((["sft", "--config", "micro-warmup", *argv, *out], words) for argv, words in data),
        (["train", "--perception_gate", "correct"], "perception_gate = 'correct' needs perception_gate_reward"),
        (
            ["train", "--perception_gate", "correct", "--perception_gate_reward", "acuracy_reward"],
            "cppo: error: perception_gate_reward = 'acuracy_reward' is not one of the reward functions; did you mean "
            "`accuracy_reward`? choose one of accuracy_reward, format_reward\n",
        ),
        (
            ["train", "--perception_memory", "sequential", "--scorer", "kernel"],
            "perception_memory = 'sequential' needs scorer = 'shared'",
        ),
        (
            ["train", "--perception_rollouts_per_group", "1", "--perception_normalization", "token"],
            "perception_rollouts_per_group = 1 needs perception_normalization",
        ),
        (["train", "--view_crop_side", "0.9", "0.3"], "view_crop_side = [0.9, 0.3]: give [low, high]"),
        (["train", "--view_noise_rectangles", "0"], "view_noise_rectangles = 0: give a whole number of at least 1"),
        (["train", "--loss_type", "foo"], "--loss_type: 'foo' is unknown; choose one of"),
        (["train", "--model_init_kwargs", "foo"], "model_init_kwargs: expected a mapping such as {key: value}"),
        (["train", "--lerning_rate", "3"], "did you mean `--learning_rate`?"),
        (["train", "--data", "nope.jsonl", "--model", model], "data 'nope.jsonl': there is no such file"),
        (["train", "--model", tmp_path / "gone"], "model: there is no folder"),
        (["eval", "--model", model, "--data", "tasks:nope"], "unknown task 'nope'"),
    ]
    for argv, words in cases:
        result = run_cli(*argv)
        assert result.returncode == 2, argv
        assert result.stdout == "no torch\n", argv
        assert result.stderr.startswith("cppo: error: "), argv
        assert words in result.stderr, argv
        assert result.stderr.count("\n") == 1, argv


def test_help_needs_no_torch():
    result = run_cli("train", "--help")
    assert result.returncode == 0
    assert result.stdout.endswith("no torch\n")
    for option in ("--config", "--model", "--perception_weight", "--output_dir", "--help-all"):
        assert option in result.stdout
    assert "--adam_beta1" not in result.stdout


def test_help_all_lists_inherited_fields(capsys):
    assert cli.main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--adam_beta1" in text
    assert "--num_generations" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["trian", "did you mean `train`"]),
        (["train", "--lerning_rate", "3"], ["--lerning_rate", "did you mean `--learning_rate`"]),
        (["train", "--lerning-rate=3"], ["--lerning-rate", "did you mean `--learning_rate`"]),
        (["train", "--max-prompt-length", "9"], ["--max-prompt-length", "here it is `max_prompt_tokens`"]),
        (["sft", "--dtype", "bfloat16"], ["--dtype", "here it is `model_init_kwargs`, with {dtype: bfloat16}"]),
        (["train", "--method", "pappo"], ["--method: 'pappo' is unknown; did you mean `papo`? choose one of grpo,"]),
        (["train", "--loss_type", "GRP"], ["--loss_type: 'GRP' is unknown; did you mean `grpo`? choose one of grpo"]),
        (["train", "--scorer", "zzz"], ["--scorer: 'zzz' is unknown; choose one of shared, kernel, plain"]),
        (["train", "--config", "micor"], ["nor a packaged name; did you mean `micro`? choose one of"]),
        (["train", "--data", "tasks:digit"], ["unknown task 'digit'; did you mean `digits`? choose one of digits"]),
        (["data", "chek"], ["'chek' is unknown; did you mean `check`?"]),
        (["data", "check", "x", "--split", "tst"], ["argument --split: 'tst' is unknown; did you mean `test`?"]),
        (["train", "--zzzzqq", "3"], ["--zzzzqq", "--help"]),
        (["train", "stray"], ["stray"]),
        (["train", "--max_steps"], ["--max_steps", "expected"]),
        (["train", "--learning_rate", "abc"], ["--learning_rate", "a number", "'abc'"]),
        (["train", "--max_steps", "1.5"], ["--max_steps", "a whole number", "'1.5'"]),
        (["train", "--bf16", "maybe"], ["--bf16", "true or false", "'maybe'"]),
        (["train", "--method", "gppo"], ["--method", "'gppo'", "cppo", "papo"]),
        (["train", "--num_generations", "0"], ["--num_generations", "[1, inf)"]),
        (["train", "--num_generations", "1"], ["num_generations = 1", "advantage_baseline = 'prompt'"]),
        (["train", "--reward_weights", "a", "b"], ["--reward_weights", "a list", "number"]),
        (["train", "--columns", "3"], ["columns: '3'", "mapping"]),
        (["train", "--max_steps", "0"], ["max_steps: 0 trains nothing"]),
        (["sft", "--data", "tasks:digits", "--max_steps", "0"], ["max_steps: 0 trains nothing"]),
        (["train", "--columns", "{a: b}"], ["'a' is unknown; choose one of prompt"]),
        (["train", "--config", "nope"], ["'nope'", "micro"]),
        (["train", "--final_eval_samples", "-1"], ["--final_eval_samples", "[0, inf)"]),
        (["sft"], ["sft", "no `data` is given"]),
        (["sft", "--config", "micro"], ["micro", "cppo train"]),
        (["eval", "--model", "micro"], ["--data"]),
        (
            ["eval", "--model", "micro", "--data", "tasks:digits", "--samples", "0"],
            ["--samples", "whole number in [1, inf)"],
        ),
        (["methods", "gppo"], ["'gppo'", "did you mean", "cppo", "papo"]),
        (["train", "--max_steps", "-2"], ["--max_steps", "[-1, inf)"]),
        (["eval", "--model", "micro", "--data", "no.jsonl", "--card", "nope"], ["--card: 'nope' is unknown"]),
        (["train", "--max_pixels", "783"], ["--max_pixels: 783 is outside [784, 100000000]"]),
        (["data", "check", "x", "--max_pixels", "783"], ["--max_pixels: expected a whole number in [784, inf)"]),
        (["recipes"], ["required: list|copy"]),
        (["recipes", "copy", "nope"], ["'nope'", "micro"]),
    ],
)
def test_arguments(refused, argv, words):
    message = refused(*argv)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "processes", "words"),
    [
        ({"num_generations": 3}, 1, "per_device_train_batch_size = 128: 1 x 128 rollouts must be a multiple of 3,"),
        ({"num_generations": 3}, 3, None),
        ({"num_generations": 3, "gradient_accumulation_steps": 2}, 1, "give --per_device_train_batch_size 126"),
        ({"per_device_train_batch_size": 3, "steps_per_generation": 2}, 2, "give --per_device_train_batch_size 2"),
        ({"per_device_train_batch_size": 1}, 4, "give --per_device_train_batch_size 2"),
        ({"generation_batch_size": 320}, 1, "1 x 320 rollouts must be a multiple of 128"),
        ({"generation_batch_size": 320}, 1, "give --generation_batch_size 256"),
        ({"generation_batch_size": 384, "num_generations": 3}, 1, None),
        ({"eval_strategy": "steps", "num_generations_eval": 5}, 2, "per_device_eval_batch_size = 8: 2 x 8 rollouts"),
    ],
)
def test_groups_are_whole(monkeypatch, options, processes, words):
    recipe = load_recipe("train", "micro", options)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if words is None:
        check_options(recipe)
    else:
        with pytest.raises(UserError, match=re.escape(words)):
            check_options(recipe)


def test_a_number_lies_in_its_interval_and_is_written_in_digits_where_it_is_whole():
    assert (COUNT("12"), number_in("(0, 1]")("1"), number_in("[0, inf)")("1e3")) == (12, 1.0, 1000.0)
    for text in ("0", "-1", "1.0", "1e3", "1_000", " 5", "+5", "²", "inf", ""):
        with pytest.raises(ArgumentTypeError, match=re.escape(f"a whole number in [1, inf), got {text!r}")):
            COUNT(text)
    for text in ("0", "1.1", "nan", "inf", "half"):
        with pytest.raises(ArgumentTypeError, match=re.escape(f"a number in (0, 1], got {text!r}")):
            number_in("(0, 1]")(text)


def test_missing_eval_data_file(refused, model):
    assert "held.jsonl" in refused("train", "--model", model, "--eval_data", "held.jsonl")


def test_model_folder_without_config(refused, tmp_path):
    message = refused("train", "--model", tmp_path)
    assert str(tmp_path) in message
    assert "config.json" in message


def test_model_config_that_is_not_json(refused, model):
    (model / "config.json").write_text("{")
    assert "not valid JSON" in refused("eval", "--model", model, "--data", "tasks:digits")


def test_model_without_a_vision_tower(refused, model):
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "no vision tower" in refused("train", "--model", model)


def test_output_dir_below_a_file(refused, model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    message = refused("train", "--model", model, "--output_dir", file / "run")
    assert "output_dir" in message
    assert str(file) in message


def test_nothing_to_resume(refused, model, tmp_path):
    run = tmp_path / "run"
    message = refused("train", "--model", model, "--output_dir", run, "--resume_from_checkpoint")
    assert "no complete checkpoint" in message
    message = refused("train", "--model", model, "--output_dir", run, "--resume_from_checkpoint", tmp_path / "gone")
    assert "gone cannot be resumed from: there is no such folder" in message


@pytest.mark.parametrize("named", ["run", "run/global_step_20", "run/global_step_20/actor"])
def test_what_verl_wrote(refused, model, tmp_path, named):
    actor = tmp_path / "run" / "global_step_20" / "actor"
    actor.mkdir(parents=True)
    (actor / "model_world_size_2_rank_0.pt").write_bytes(b"")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    argv = ["--output_dir", tmp_path / "mine", "--resume_from_checkpoint", tmp_path / named]
    commands = ["train", "--model", model, *argv], ["eval", "--model", tmp_path / named, "--data", "tasks:digits"]
    for command in commands:
        message = refused(*command)
        assert "verl wrote it" in message
        assert f"--local_dir {actor} --target_dir DIR" in message
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "model.safetensors").write_bytes(b"")
    for command in commands:
        assert f"its model is {actor / 'huggingface'}" in refused(*command)


def test_a_finished_run_is_not_overwritten(refused, model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG_HEADER)
    (run / "summary.json").write_text("{}")
    message = refused("train", "--model", model, "--output_dir", run)
    assert "finished run" in message
    assert "--overwrite" in message


def test_final_evaluation_needs_data(refused, model, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "data": "tasks:digits", "final_eval_samples": 5}))
    argv = ["train", "--config", recipe, "--output_dir", tmp_path / "run"]
    assert "eval_data" in refused(*argv)
    assert "eval_data" in refused(*argv, "--final_eval_samples", 0, "--eval_strategy", "steps")


def test_json_file_that_cannot_be_written(refused, model, tmp_path):
    message = refused("eval", "--model", model, "--data", "tasks:digits", "--json", tmp_path / "no" / "x.json")
    assert "--json" in message


def test_overview_and_version(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cppo ")


def test_a_closed_pipe_is_no_traceback():
    """As `cppo methods | head -1`: the reader closes before all is written."""
    command = [sys.executable, "-m", "cppo", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_runs_without_standard_streams(tmp_path, closed):
    copied = f'exec "$0" -m cppo recipes copy micro {closed}'
    assert subprocess.run(["sh", "-c", copied, sys.executable], cwd=tmp_path).returncode == 0
    assert (tmp_path / "micro.yaml").is_file()


def test_recipes_list_and_copy(capsys, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert "micro" in listed
    assert "cppo-paper" in listed
    assert cli.main(["recipes", "copy", "micro"]) == 0
    assert capsys.readouterr().out.strip() == "micro.yaml"
    assert yaml.safe_load((tmp_path / "micro.yaml").read_text())["model"] == "micro"
    assert "exists already" in refused("recipes", "copy", "micro")
    assert cli.main(["recipes", "copy", "micro", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "micro.yaml").read_text()


def test_bf16_without_a_gpu_is_told_with_the_options_to_give(refused, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2 + 2?", "answer": "4", "response": "4"}\n')
    message = refused("sft", "--data", data, "--model", "micro", "--bf16", "--output_dir", tmp_path / "run")
    assert "no GPU" in message
    assert "add --use_cpu true --bf16 false" in message


def test_a_run_folder_without_a_model_names_its_latest_checkpoint(refused, tmp_path):
    for step in (1, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
    message = refused("eval", "--model", tmp_path, "--data", "tasks:digits")
    assert f"its latest checkpoint is {tmp_path / 'checkpoint-12'}" in message


def test_a_given_setting_wins_over_the_run_directorys_and_that_over_the_default():
    parser = Parser(prog="cppo eval")
    add_data_options(parser, required=False)
    add_answer_options(parser)
    trained = {"max_completion_length": 80, "system_prompt": "Look.", "max_pixels": 900, "columns": "trl"}
    trained |= {"prompt_suffix": "Think.", "min_side": 28}
    names = ("max_new_tokens", "system_prompt", "prompt_suffix", "min_pixels", "max_pixels", "min_side", "columns")
    given = ["--max-new-tokens", "5", "--system_prompt", "", "--prompt_suffix", "", "--min_pixels", "4"]
    for words, expected in (
        ([], (80, "Look.", "Think.", None, 900, 28, "trl")),
        ([*given, "--min_side", "9", "--columns", "{}"], (5, "", "", 4, 900, 9, {})),
    ):
        assert answer_settings(parser.parse_all(words), trained) == dict(zip(names, expected, strict=True))
    assert answer_settings(parser.parse_all([]), {}) == dict(zip(names, (512, *[None] * 6), strict=True))


@pytest.mark.parametrize(("module", "told"), [("trl.trainer.utils", True), ("transformers", True), ("my_views", False)])
def test_a_name_that_a_library_lacks_is_one_line(module, told, monkeypatch, capsys):
    """Another version of TRL may lack what CPPO imports from it; a fault of any other import stays to be seen."""

    def lacks(name):
        raise ImportError(f"cannot import name 'gone'\nfrom '{module}'", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", lacks)
    if not told:
        with pytest.raises(ImportError, match="gone"):
            cli.main(["methods"])
        return
    assert cli.main(["methods"]) == 2
    assert capsys.readouterr().err == (
        f"cppo: error: cannot import name 'gone' from '{module}'; "
        "install the versions that docs/reference/versions.md names\n"
    )


def test_several_processes_check_one_output_file_at_once(tmp_path):
    """None makes the file or removes it, so none stumbles over another, and what another writes stays."""
    file = tmp_path / "out.json"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: check_output_file("--json", str(file)), range(500)))
    assert list(tmp_path.iterdir()) == []
    file.write_text("kept")
    check_output_file("--json", str(file))
    assert file.read_text() == "kept"
