"""Mistakes that `python -m cppo.verl` refuses before Ray starts, in one line."""

import sys

import pytest
from cpu_bed.launch import MODES
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError
from verl.trainer import main_ppo
from verl.trainer.ppo.v1 import get_trainer_cls

from cppo.assets import MICRO_DIR
from cppo.errors import UserError
from cppo.verl import checks, versions
from cppo.verl.__main__ import PYTHON, main, user_mistake
from cppo.verl.trainer import PREFIX

OPTIONS = (f"actor_rollout_ref.model.path={MICRO_DIR}", "actor_rollout_ref.rollout.name=vllm")


@pytest.fixture
def refused(capsys):
    """Run `python -m cppo.verl OPTIONS ARGV`, which must end with status 2; returns its line."""

    def run(*argv):
        assert main([*OPTIONS, *map(str, argv)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cppo: error: ")]
        return line.removeprefix("cppo: error: ")

    return run


def test_each_mode_of_verl_has_a_trainer_of_ours():
    assert tuple(MODES) == checks.MODES
    for mode in MODES:
        assert issubclass(get_trainer_cls(PREFIX + mode), get_trainer_cls(mode))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("trainer.v1.trainer_mode=async", "trainer.v1.trainer_mode = 'async'"),
        ("data.trian_files=a", "trian_files"),
        ("data.train_files", "data.train_files"),
        ("data.train_files=[a.parquet]", "data.train_files: there is no file 'a.parquet'"),
        ("--nodes=2", "--nodes=2: write options of verl as NAME=VALUE"),
        ("+actor_rollout_ref.rollout.custom.cppo.method=cppo", "write NAME=VALUE for an option that it lists"),
        ("+actor_rollout_ref.rollout.custom.cppo.trained_answers=description_reward", "asks the policy"),
        ("reward.custom_reward_function.reward_kwargs.rewards=accuracy", "rewards: expected a list of names"),
        ("reward.custom_reward_function.reward_kwargs.weights=[a,b]", "weights: expected a list of numbers"),
        ("+actor_rollout_ref.rollout.custom.cppo.perception_wieght=1", "did you mean `perception_weight`?"),
        ("actor_rollout_ref.rollout.custom.cppo.method=cppo-kl", "cppo-kl"),
        ("reward.custom_reward_function.reward_kwargs.rewards=[acuracy,format]", "did you mean `accuracy`?"),
        ("reward.custom_reward_function.reward_kwargs.weights=[1]", "1 weight (1) for 2 rewards"),
        ("reward.custom_reward_function.reward_kwargs.rewards=[accuracy,length]", "length"),
    ],
)
def test_options(refused, option, named):
    assert named in refused(option)


def test_a_file_of_options(tmp_path, capsys):
    """Its options count like those of the command line, which win."""
    file = tmp_path / "options.yaml"
    file.write_text(f"trainer.v1.trainer_mode: async\nactor_rollout_ref.model.path: {MICRO_DIR}\n")
    assert main(["--config", str(file), *OPTIONS]) == 2
    assert "trainer.v1.trainer_mode = 'async'" in capsys.readouterr().err
    assert main(["--config", str(file), *OPTIONS, "trainer.v1.trainer_mode=now"]) == 2
    assert "trainer.v1.trainer_mode = 'now'" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    assert main(["--config"]) == 2
    file.write_text("extends: cppo-3b\nbeta: 0\n")
    capsys.readouterr()
    assert main(["--config", str(file)]) == 2
    assert f"`cppo verl-config --config {file} --out FILE.yaml`" in capsys.readouterr().err


def test_a_model_that_is_not_there(refused, tmp_path):
    data = tmp_path / "rows.parquet"
    data.write_bytes(b"")
    files = [f"data.train_files={data}", f"data.val_files={data}"]
    assert "no folder" in refused(*files, f"actor_rollout_ref.model.path={tmp_path / 'nothing'}")
    assert "not a model folder" in refused(*files, f"actor_rollout_ref.model.path={tmp_path}")


def test_what_verl_refuses_is_one_line(refused):
    line = refused("actor_rollout_ref.actor.loss_agg_mode=mean")
    assert "loss_agg_mode" in line


def test_versions_come_first(refused, monkeypatch):
    monkeypatch.setattr(versions, "installed", {"verl": "0.8.0"}.get)
    assert "verl 0.8.0 is installed" in refused("nothing=1")


def test_checkpoints_of_the_trainer(refused, tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    resume = "trainer.resume_mode=resume_path"
    line = refused(resume, f"trainer.resume_from_path={checkpoint}")
    assert "`cppo train`" in line
    assert f"actor_rollout_ref.model.path={checkpoint}" in line
    assert "`cppo train`" in refused(resume, f"trainer.resume_from_path={tmp_path}")
    assert "global_step_N" in refused(resume, f"trainer.resume_from_path={tmp_path / 'nothing'}")
    assert "give another folder" in refused(f"trainer.default_local_dir={tmp_path}")


def test_a_mistake_that_an_actor_finds():
    def raised_by_two_actors(cause):
        first = RayTaskError("worker", "Traceback", cause).as_instanceof_cause()
        return RayTaskError("runner", "Traceback", first).as_instanceof_cause()

    assert str(user_mistake(raised_by_two_actors(UserError("too few tokens")))) == "too few tokens"
    assert user_mistake(raised_by_two_actors(ValueError("a fault"))) is None


@pytest.mark.parametrize(
    ("folder", "given", "expected"),
    [
        ("/own env/bin", (), "'/own env/bin/python'"),
        ("/env/bin", (), None),
        ("/own env/bin", (f"{PYTHON}=/other/python",), "/other/python"),
    ],
)
def test_rays_workers_start_from_a_folder_with_a_space(tmp_path, monkeypatch, folder, given, expected):
    """Ray hands the interpreter's name to a shell as it is."""
    file = tmp_path / "rows.parquet"
    file.touch()
    seen = []
    monkeypatch.setattr(sys, "executable", f"{folder}/python")
    monkeypatch.setattr(main_ppo, "run_ppo", lambda config, runner: seen.append(OmegaConf.select(config, PYTHON)))
    assert main([*OPTIONS, f"data.train_files={file}", f"data.val_files={file}", *given]) == 0
    assert seen == [expected]
