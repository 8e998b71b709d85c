"""What a run tells: loggers, evaluations, best checkpoint, what a resume changes; and what a failed start leaves."""

import importlib.machinery
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HTTPError
from small_model import SHORT_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cppo.cli.main import main
from cppo.errors import UserError
from cppo.recipes import load_recipe, recipe_names
from cppo.runs.checks import check_model, check_recipe
from cppo.runs.prepare import prepare_run
from cppo.runs.sources import load_sources

OPTIONS = {
    **SHORT_RUN,
    "data": "tasks:digits?n=8",
    "eval_data": "tasks:digits?n=8",
    "eval_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "reward",
    "per_device_eval_batch_size": 2,
    "perception_gate": "none",
    "perception_selector": "all",  # an untrained model may show no entropy shift, and then no loss is logged
    "save_steps": 1,
    "max_steps": 2,
}


class StandIn(types.ModuleType):
    """A module found like an installed one; whatever is called on it is recorded."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "99.0"
        self.calls = MagicMock()
        self.__path__ = []
        self.Error = self.ConfigError = RuntimeError

    def __getattr__(self, name):
        return getattr(self.calls, name)


@pytest.fixture(scope="module")
def told(small_model, tmp_path_factory):
    """A run with three loggers: its folder, what it printed, what the loggers received."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"model": small_model, **OPTIONS}))
    loggers = {name: StandIn(name) for name in ("wandb", "trackio")}
    with pytest.MonkeyPatch.context() as patch:
        for name in (*loggers, "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
            patch.setitem(sys.modules, name, loggers.get(name) or StandIn(name))
        for name, module in list(sys.modules.items()):
            for logger in loggers if name.startswith("trl.") else ():
                if f"is_{logger}_available" in vars(module):  # it looked once, when it was imported
                    patch.setattr(module, logger, loggers[logger], raising=False)
        output = patch_output(patch)
        argv = ["train", "--config", str(folder / "tiny.yaml"), "--output_dir", str(folder / "run")]
        assert main([*argv, "--report_to", "[tensorboard, wandb, trackio]"]) == 0, output
    return folder, "".join(output), loggers


def patch_output(patch):
    """The list that collects what is written to stdout and stderr from now on."""
    written = []
    for stream in (sys.stdout, sys.stderr):
        patch.setattr(stream, "write", written.append)
    return written


def test_tensorboard_receives_the_perception_metrics(told):
    folder, _, _ = told
    (events,) = (folder / "run").rglob("*tfevents*")
    log = EventAccumulator(str(events.parent)).Reload()
    rows = [yaml.safe_load(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "perception/cpl" in row]
    for name in ("perception/cpl", "perception/entropy_removing", "reward"):
        read = [(scalar.step, scalar.value) for scalar in log.Scalars(f"train/{name}")]
        # A step that let no rollout through the gate has no perception loss, and TensorBoard no value of it.
        logged = [row for row in trained if row[name] is not None]
        assert logged
        assert read == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged]
    assert len(log.Scalars("eval/reward")) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_loggers_receive_them_too(told, name):
    received = [call.args[0] for call in told[2][name].calls.log.call_args_list]
    rows = [yaml.safe_load(line) for line in (told[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    for sent, logged in (("train/perception/cpl", "perception/cpl"), ("eval/reward", "eval_reward")):
        expected = [(row["step"], pytest.approx(row[logged], rel=1e-6)) for row in rows if logged in row]
        assert [(values["train/global_step"], values[sent]) for values in received if sent in values] == expected
        assert len(expected) == 2
    told[2]["wandb"].calls.login.assert_called_once_with()


def test_evaluations_and_the_best_checkpoint_are_told(told):
    folder, text, _ = told
    for step in (1, 2):
        assert f"step {step}/2  evaluation: reward 0." in text
    best = re.escape(f"best       {folder / 'run' / 'checkpoint-'}")
    assert re.search(best + r"[12], eval_reward [\d.]+ \(the model below\)\n", text)


def test_a_resume_names_what_it_changes(told, tmp_path, capsys):
    run = str(shutil.copytree(told[0] / "run", tmp_path / "run"))
    again = ["train", "--config", f"{run}/config.yaml", "--output_dir", run, "--resume_from_checkpoint", "true"]
    again += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none", "--save_steps", "9"]
    assert main([*again, "--max_steps", "3"]) == 0
    error = capsys.readouterr().err
    assert "->" not in error
    assert f"the run resumes from {run}/checkpoint-2\n" in error
    assert main([*again, "--max_steps", "4", "--per_device_train_batch_size", "8", "--seed", "7"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "->" in line]
    assert "seed: 42 -> 7" in line
    assert "per_device_train_batch_size: 4 -> 8" in line
    assert line.count("->") == 2
    assert main([*again, "--max_steps", "9", "--method", "papo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "of a run with method cppo; add --method cppo, or use its recipe with --config" in line


@pytest.mark.parametrize(
    "wrong", [["--report_to", "nonesuch"], ["--num_generations", "3"], ["--data", "nowhere.jsonl"]]
)
def test_a_failed_start_leaves_no_empty_folder(told, tmp_path, refused, wrong):
    refused("train", "--config", told[0] / "tiny.yaml", "--output_dir", tmp_path / "new" / "run", *wrong)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_tiny_needs_a_recipe(small_model, tmp_path, refused, monkeypatch):
    argv = ["train", "--model", small_model, "--output_dir", tmp_path / "run", "--report_to", "x"]
    assert "report_to" in refused(*argv)
    monkeypatch.setattr("cppo.cli.train.SMALL_BYTES", 0)
    message = refused(*argv)
    assert message.startswith(f"--model {small_model} needs a recipe")
    named = set(re.findall(r"[a-z]+-[a-z0-9]+", message.partition("--config few")[2])) | {"few-rows"}
    assert {name for name in named if name in recipe_names()} == {"few-rows", "lora-24gb", "cppo-3b", "cppo-7b"}
    assert "report_to" in refused(*argv, "--config", "micro")


def test_a_start_shows_what_it_begins_with(told):
    block = told[1][told[1].index("recipe ") :].splitlines()[:6]
    assert block == [
        f"recipe     {told[0] / 'tiny.yaml'}, method cppo",
        f"model      {load_recipe('train', str(told[0] / 'tiny.yaml')).options.model}",
        "rows       8",
        "batch      2 prompts x 2 rollouts a step, 2 prompts generated together, micro-batches of 4 rollouts",
        "lengths    prompts of any length, responses up to 8 tokens",
        "learning   rate 1e-06, schedule linear, 2 steps",
    ]


def test_held_out_data_that_is_trained_on_is_told(told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("".join(f'{{"prompt": "{n}?", "answer": "{n}"}}\n' for n in range(3)))
    Path("other.jsonl").write_text('{"prompt": "x?", "answer": "1"}\n')
    for held_out, warns in ((["other.jsonl", "mine.jsonl"], True), (["other.jsonl"], False)):
        given = {"data": "mine.jsonl", "eval_data": held_out, "eval_limit": 1, "per_device_train_batch_size": 2}
        recipe = load_recipe("train", str(told[0] / "tiny.yaml"), {**given, "final_eval_samples": 1})
        prepare_run(recipe, load_sources(recipe))
        assert ("mine.jsonl is both data and eval_data" in capsys.readouterr().err) == warns


def test_a_folder_that_was_there_stays(told, tmp_path):
    argv = ["train", "--config", str(told[0] / "tiny.yaml"), "--output_dir", str(tmp_path), "--data", "nowhere.jsonl"]
    assert main(argv) == 2
    assert tmp_path.is_dir()


def test_a_missing_logger_is_found_before_torch_is_loaded(told, tmp_path):
    program = (
        "import sys; from cppo.cli.main import main;"
        f"status = main(['train', '--config', {str(told[0] / 'tiny.yaml')!r}, '--output_dir', 'run',"
        " '--report_to', 'wandb']);"
        "sys.exit(status if 'torch' not in sys.modules else 9)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert run.stderr == "cppo: error: report_to: wandb is not installed; pip install 'cppo[wandb]'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (HTTPError("no route"), "the hub did not answer: no route"),
        (ConnectionError("offline mode is enabled"), "the hub did not answer: offline mode"),
    ],
)
def test_a_model_that_the_hub_cannot_give_is_one_line(monkeypatch, answer, part):
    """One request decides; the libraries would wait through six."""
    ask = MagicMock(side_effect=answer)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    with pytest.raises(UserError, match="model: nobody/none is neither") as caught:
        check_model("nobody/none")
    assert part in str(caught.value)
    assert ask.call_count == 1


def test_a_folder_that_is_not_there_is_told_beside_its_neighbours(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", MagicMock(side_effect=ConnectionError("offline")))
    for name in ("first", "second"):
        Path("runs", name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"model: there is no folder runs/frist; runs has first, second$"):
        check_model("runs/frist")


@pytest.mark.parametrize(("option", "package"), [("use_vllm", "vllm"), ("use_liger_kernel", "liger-kernel")])
def test_a_package_that_an_option_needs_is_asked_for_first(monkeypatch, option, package):
    find_spec, module = importlib.util.find_spec, package.replace("-", "_")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == module else find_spec(name))
    with pytest.raises(UserError, match=f"{option} needs the package {package}; pip install {package}$"):
        check_recipe(load_recipe("train", "micro", {option: True}))


def test_a_model_in_the_cache_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(Path("config.json")))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", MagicMock(side_effect=AssertionError))
    check_model("somebody/something")
