"""What becomes of a run, its folder and its checkpoints when something goes wrong around it."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from small_model import SHORT_RUN

from cppo.checkpoints import damage
from cppo.cli.main import main
from cppo.errors import UserError
from cppo.recipes import RunDirectory
from cppo.runs.lock import LOCK_FILE, folder_lock

OPTIONS = {
    **SHORT_RUN,
    "data": "tasks:digits?n=8",
    "eval_data": "tasks:digits?n=4",
    "max_completion_length": 6,
    "perception_gate": "none",
    "save_steps": 1,
    "max_steps": 3,
    "probe_steps": 0,
    "final_eval_samples": 2,
}
# Sends the signal that CPPO_TEST_SIGNAL names while the second step's rewards are made.
SIGNALLING = """
import os
def reward(completions, trainer_state=None, **columns):
    if trainer_state is not None and trainer_state.global_step == 1:
        os.kill(os.getpid(), int(os.environ["CPPO_TEST_SIGNAL"]))
    return [float(len(completion[0]["content"]) % 3) for completion in completions]
"""


@pytest.fixture(scope="module")
def workplace(small_model, tmp_path_factory):
    """A folder with a recipe, a reward and an uninterrupted run of three steps."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "reward.py").write_text(SIGNALLING)
    recipe = {**OPTIONS, "model": small_model, "rewards": [f"{folder / 'reward.py'}:reward"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    os.environ["CPPO_TEST_SIGNAL"] = "0"  # which only asks whether the process is there
    assert train(folder, folder / "run") == 0
    return folder


def train(workplace, run, *options):
    return main(["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(run), *map(str, options)])


def weights(run):
    return (run / "model.safetensors").read_bytes()


def checkpoints(run):
    return sorted(path.name for path in run.iterdir() if "checkpoint-" in path.name)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_a_signal_ends_a_run_after_its_step_and_auto_goes_on(workplace, tmp_path, monkeypatch, capsys, name, status):
    run = tmp_path / "run"
    monkeypatch.setenv("CPPO_TEST_SIGNAL", str(int(signal.Signals[name])))
    assert train(workplace, run, "--save_strategy", "no", "--resume_from_checkpoint", "auto") == status
    told = capsys.readouterr().err
    assert f"{name}: the run stops after this step" in told
    assert f"{run / 'checkpoint-2'} is complete" in told
    assert told.endswith(f"cppo: stopped by {name}\n")
    assert damage(run / "checkpoint-2") is None
    assert not RunDirectory(run).summary.exists()
    monkeypatch.setenv("CPPO_TEST_SIGNAL", "0")
    assert train(workplace, run, "--resume_from_checkpoint", "auto") == 0
    assert weights(run) == weights(workplace / "run")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_resume_names_changed_files_of_own_functions(workplace, tmp_path, monkeypatch, capsys):
    """Only those: an unchanged file in another folder causes no warning."""
    monkeypatch.setenv("CPPO_TEST_SIGNAL", "0")
    resume = ("--resume_from_checkpoint", workplace / "run" / "checkpoint-2", "--final_eval_samples", 1)
    assert train(workplace, tmp_path / "same", *resume) == 0
    err = capsys.readouterr().err
    assert "has changed" not in err
    assert "cppo: warning: 100% of the responses in the latest 1 logged steps reach the limit" in err
    reward = workplace / "reward.py"
    reward.write_text(f"{SIGNALLING}# changed\n")
    try:
        assert train(workplace, tmp_path / "other", *resume) == 0
    finally:
        reward.write_text(SIGNALLING)
    assert f"other inputs than the original ({reward} has changed): it will differ" in capsys.readouterr().err


def test_a_signal_ends_supervised_fine_tuning_too(small_model, tmp_path, monkeypatch, capsys):
    from cppo.runs.recorder import RunRecorder

    def sft(run, *options):
        fixed = {"model": small_model, "data": "tasks:digits?n=8", "per_device_train_batch_size": 4}
        fixed |= {"use_cpu": True, "bf16": False, "output_dir": run, "max_steps": 3, "save_strategy": "no"}
        words = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
        return main(["sft", "--config", "micro-sft", *words, *options])

    def signalling(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunRecorder, "on_step_end", signalling)
        assert sft(run) == 143
    assert f"{run / 'checkpoint-2'} is complete; the same command with --resume" in capsys.readouterr().err
    assert damage(run / "checkpoint-2") is None
    assert not (run / LOCK_FILE).exists()
    assert sft(run, "--resume_from_checkpoint", "auto") == 0
    assert sft(tmp_path / "whole") == 0
    assert weights(run) == weights(tmp_path / "whole")


def test_a_signal_before_the_first_step_ends_at_once(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cppo.runs.run.answer_all", lambda *given, **how: os.kill(os.getpid(), signal.SIGTERM))
    assert train(workplace, tmp_path / "run") == 143
    told = capsys.readouterr().err
    assert "there is no checkpoint" in told
    assert told.endswith("cppo: stopped by SIGTERM\n")


def test_a_run_killed_in_its_last_evaluation_is_finished_by_a_resume(workplace, tmp_path, monkeypatch, capsys):
    from cppo.runs import run as module

    run, answer_all = tmp_path / "run", module.answer_all

    def killed(trainer, source, label, **how):
        if label == "after":
            raise KeyboardInterrupt
        return answer_all(trainer, source, label, **how)

    with monkeypatch.context() as patched:
        patched.setattr(module, "answer_all", killed)
        assert train(workplace, run) == 130
    assert train(workplace, run) == 2
    assert "holds an unfinished run; continue it with --resume_from_checkpoint auto" in capsys.readouterr().err
    assert train(workplace, run, "--resume_from_checkpoint", "true") == 0
    assert weights(run) == weights(workplace / "run")
    finished, whole = (json.loads(RunDirectory(path).summary.read_text()) for path in (run, workplace / "run"))
    assert finished["after"] == whole["after"]
    assert finished["gain"] == whole["gain"]
    assert train(workplace, run, "--resume_from_checkpoint", "true") == 2
    assert "is at step 3 already; raise max_steps" in capsys.readouterr().err


def test_a_resume_sets_the_abandoned_branch_aside(workplace, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(workplace / "run", run)
    options = ("--resume_from_checkpoint", run / "checkpoint-1", "--max_steps", 2, "--learning_rate", 0.25)
    assert train(workplace, run, *options) == 0
    assert checkpoints(run) == ["abandoned-checkpoint-2", "abandoned-checkpoint-3", "checkpoint-1", "checkpoint-2"]
    assert f"it is now {run / 'abandoned-checkpoint-3'}" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 0.25
    rates = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rates[1] == pytest.approx(0.25 / 2, rel=1e-12)
    assert RunDirectory(run).find_checkpoint(True) == run / "checkpoint-2"


def test_a_folder_has_one_run_at_a_time(workplace, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    hold = (
        "import sys, time, pathlib\nfrom cppo.runs.lock import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(run)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for options in ((), ("--overwrite", "true"), ("--resume_from_checkpoint", "auto")):
            assert train(workplace, run, *options) == 2
            assert re.search(rf"{run} is in use by process {holder.pid} on \S+ since 20", capsys.readouterr().err)
        holder.kill()
    assert json.loads((run / LOCK_FILE).read_text())["process"] == holder.pid
    with folder_lock(run):
        assert json.loads((run / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list(run.iterdir()) == []


def test_a_damaged_lock_file_is_taken_over(tmp_path):
    (tmp_path / LOCK_FILE).write_text("no JSON")
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()


@pytest.mark.parametrize(
    "files",
    [
        {"metrics.jsonl": "mine"},
        {"config.json": "{}", "model.safetensors": ""},
        {"notes/today.txt": "x"},
        {"config.yaml": "mine: true"},
        {"README.md": "---\nlicense: mit\n---\n"},
    ],
)
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_folder_with_files_of_others_is_refused(workplace, tmp_path, capsys, files, overwrite):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert train(workplace, tmp_path, "--overwrite", overwrite) == 2
    assert f"{tmp_path} holds files that no run wrote" in capsys.readouterr().err
    found = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == files


@pytest.mark.parametrize("model", ["", "checkpoint-2"])
def test_a_run_does_not_replace_its_own_model(workplace, tmp_path, capsys, monkeypatch, model):
    run = tmp_path / "run"
    shutil.copytree(workplace / "run", run)
    monkeypatch.chdir(run)
    for name in (str(run / model), model or "."):
        assert train(workplace, run, "--model", name, "--overwrite", "true") == 2
        assert "the run would replace its own model" in capsys.readouterr().err
    assert weights(run) == weights(workplace / "run")


# Weights


@pytest.fixture
def without_a_tensor(small_model, tmp_path):
    """A copy of the small model whose file lacks a weight, and the weight's name."""
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "visual" in name and tensors[name].ndim == 2)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, name


def test_missing_weights_are_refused_by_every_command(workplace, without_a_tensor, tmp_path, capsys):
    folder, name = without_a_tensor
    part = name.rpartition("visual")[2]
    for argv in (
        ["eval", "--model", folder, "--data", "tasks:digits?n=2"],
        ["train", "--config", workplace / "tiny.yaml", "--model", folder, "--output_dir", tmp_path / "run"],
        ["sft", "--config", "micro-sft", "--model", folder, "--output_dir", tmp_path / "sft", "--max_steps", 1],
        ["export", "--model", folder, "--out", tmp_path / "plain"],
    ):
        assert main(list(map(str, argv))) == 2, argv[0]
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("cppo: error: model: the weights in")
        assert part in told


@pytest.mark.parametrize("size", [0, 3, 1000, 200_000])
def test_a_model_that_is_cut_off_is_one_line(small_model, tmp_path, capsys, size):
    shutil.copytree(small_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    assert file.stat().st_size > size
    file.write_bytes(file.read_bytes()[:size])
    for argv in (["eval", "--data", "tasks:digits?n=2"], ["export", "--out", str(tmp_path / "plain")]):
        assert main([*argv, "--model", str(tmp_path / "model")]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith(f"cppo: error: model: the weights in {tmp_path / 'model'} cannot be read: ")


def test_weights_without_a_use_are_a_warning(small_model, tmp_path, capsys):
    shutil.copytree(small_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.old.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    argv = ["eval", "--model", str(tmp_path / "model"), "--data", "tasks:digits?n=1", "--max_new_tokens", "2"]
    assert main(argv) == 0
    assert "holds weights that the model does not use: model.language_model.old.weight" in capsys.readouterr().err


def test_a_resume_refuses_a_checkpoint_that_lacks_a_weight(workplace, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(workplace / "run", run)
    file = run / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    assert train(workplace, run, "--resume_from_checkpoint", run / "checkpoint-2") == 2
    assert "checkpoint-2 cannot be resumed from: model.safetensors has" in capsys.readouterr().err
    (run / "checkpoint-2" / "manifest.json").unlink()  # as cppo 0.1.0 left it
    assert train(workplace, run, "--resume_from_checkpoint", run / "checkpoint-2") == 2
    assert "lack" in capsys.readouterr().err.splitlines()[-1]


# Disk


def test_a_folder_that_goes_while_a_run_writes_is_one_line(workplace, tmp_path, capsys, monkeypatch):
    from cppo.runs.recorder import RunRecorder

    run, on_log = tmp_path / "run", RunRecorder.on_log

    def removed(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 2:
            shutil.rmtree(run)
        return on_log(self, args, state, control, logs, **kwargs)

    monkeypatch.setattr(RunRecorder, "on_log", removed)
    assert train(workplace, run) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cppo: error")]
    assert len(told) == 1
    assert f"{run / 'metrics.jsonl'} cannot be written: No such file or directory" in told[0]


def test_a_disk_that_is_full_when_the_model_is_saved_is_one_line(workplace, tmp_path, capsys, monkeypatch):
    from cppo.runs import run as module

    run, train_until_stopped = tmp_path / "run", module.train_until_stopped
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*given):
        train_until_stopped(*given)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(weights(workplace / "run")) // 2, hard))

    try:
        with monkeypatch.context() as patched:
            patched.setattr(module, "train_until_stopped", limited)
            assert train(workplace, run) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(rf"cppo: error: {run}/\S+ cannot be written: .*File too large", capsys.readouterr().err)
    assert damage(run / "checkpoint-3") is None
    assert train(workplace, run, "--resume_from_checkpoint", "auto") == 0
    assert weights(run) == weights(workplace / "run")


def test_rows_of_metrics_outlive_a_resume_that_cannot_write(workplace, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(workplace / "run", run)
    before = (run / "metrics.jsonl").read_text()

    def full(self, content, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        RunDirectory(run).begin(checkpoint=run / "checkpoint-2", overwrite=False)
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("option", "value"), [("optim", "sgd"), ("freeze_vision_tower", "true"), ("use_peft", "true")])
def test_a_resume_cannot_change_which_weights_are_trained(workplace, tmp_path, capsys, option, value):
    run = tmp_path / "run"
    shutil.copytree(workplace / "run", run)
    resume = ("--resume_from_checkpoint", run / "checkpoint-2", f"--{option}", value)
    assert train(workplace, run, *resume) == 2
    assert f"{option} was" in capsys.readouterr().err


def test_transformers_own_saving_on_a_signal_is_refused(workplace, tmp_path, capsys):
    assert train(workplace, tmp_path / "run", "--enable_jit_checkpoint", "true") == 2
    assert "saves in the middle of a step" in capsys.readouterr().err
