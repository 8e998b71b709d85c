"""Mistakes that `python -m cppo.verl` refuses before Ray starts, in one line."""

import sys
from importlib.metadata import version

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cpu_bed import launch
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError
from verl.trainer import main_ppo
from verl.trainer.ppo.v1 import get_trainer_cls

from cppo.assets import MICRO_DIR
from cppo.data import load_records
from cppo.errors import UserError
from cppo.verl import versions
from cppo.verl.__main__ import PYTHON, main, user_mistake
from cppo.verl.batches import MODES
from cppo.verl.checks import check_config
from cppo.verl.composed import check_choices, composed
from cppo.verl.data import write_parquet
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


@pytest.fixture
def files(tmp_path):
    """Options that name data in verl's layout."""
    file = tmp_path / "rows.parquet"
    write_parquet(load_records("tasks:digits", limit=2), file, "digits")
    return [f"data.train_files={file}", f"data.val_files={file}"]


def test_each_mode_of_verl_has_a_trainer_of_ours():
    assert tuple(launch.MODES) == MODES
    for mode in MODES:
        assert issubclass(get_trainer_cls(PREFIX + mode), get_trainer_cls(mode))


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("trainer.v1.trainer_mode=async", "trainer.v1.trainer_mode = 'async'"),
        (
            "data.trian_files=a",
            "data.trian_files: verl's configuration lists no such option; did you mean `train_files`?",
        ),
        ("data.new_option=a", "+NAME=VALUE gives it all the same"),
        (
            "+actor_rollout_ref.rollout.temperatur=1",
            "rollout.temperatur: verl has no such option; did you mean `te",
        ),
        (
            "+actor_rollout_ref.actor.fsdp_config.nothing=1",
            "fsdp_config.nothing: verl has no such option; leave it",
        ),
        ("actor_rollout_ref.rollout.custom=5", "custom = 5: it holds options of its own: give"),
        ("actor_rollout_ref.actor=5", "actor = 5: it holds options of its own"),
        ("data=5", "Config group override"),
        ("model_engine=none", "Could not find 'model_engine/none'"),
        ("actor_rollout_ref.rollout.n=many", "actor_rollout_ref.rollout.n: expected a number, got 'many'"),
        ("trainer.save_freq=[1]", "trainer.save_freq: expected a number, got [1]"),
        ("data.shuffle=maybe", "data.shuffle: expected true or false, got 'maybe'"),
        ("actor_rollout_ref.hybrid_engine=false", "leave it at true"),
        (
            "trainer.resume_mode=disabel",
            "trainer.resume_mode = 'disabel': Invalid resume_mode: disabel. Must be 'auto",
        ),
        ("trainer.logger=[console,wandbb]", "did you mean `wandb`? choose one of clearml"),
        ("algorithm.adv_estimator=grop", "algorithm.adv_estimator = 'grop': Unknown advantage estimator"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanila", "loss_mode = 'vanila': Unsupported loss mode"),
        ("actor_rollout_ref.actor.kl_loss_type=k9", "kl_loss_type = 'k9': verl has no such value"),
        ("actor_rollout_ref.actor.strategy=fsdp3", "actor.strategy = 'fsdp3': strategy fsdp3 not supported"),
        ("actor_rollout_ref.actor.fsdp_config.dtype=bf61", "fsdp_config.dtype = 'bf61': unexpected precision"),
        (
            "actor_rollout_ref.actor.optim.lr_scheduler_type=linear",
            "verl refuses it: assert self.lr_scheduler_type in ",
        ),
        ("actor_rollout_ref.rollout.name=vlm", "rollout.name = 'vlm': did you mean `vllm`?"),
        ("actor_rollout_ref.rollout.mode=sync", "Rollout mode 'sync' has been removed"),
        ("reward.reward_manager.name=naiv", "reward_manager.name = 'naiv': did you mean `naive`?"),
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


@pytest.mark.parametrize(
    "words",
    [
        "trainer.resume_mode=disable trainer.logger=file +trainer.remove_previous_ckpt_in_save=true",
        "actor_rollout_ref.rollout.n=${data.train_batch_size} actor_rollout_ref.actor.kl_loss_type=k3+",
        "algorithm.rollout_correction.rollout_is_threshold=0.5_2.0 actor_rollout_ref.actor.loss_agg_mode=token-sum",
        "actor_rollout_ref.model.external_lib=a_module actor_rollout_ref.rollout.name=its_engine",
        "+ray_kwargs.ray_init.num_gpus=1 +actor_rollout_ref.rollout.engine_kwargs.vllm.seed=1",
        "trainer.v1.colocate_async.num_warmup_batches=1.5 trainer.total_training_steps=null",
    ],
)
def test_options_that_verl_takes(words):
    config = composed([*OPTIONS, *words.split()])
    check_config(config)
    check_choices(config)


def test_the_micro_models_other_vision_tower(refused, files):
    """verl 0.9 takes only versions of transformers that ignore the rotary base in its configuration."""
    line = refused(*files)
    assert "rotary base 100 and uses 10000" in line
    assert f"{version('transformers')} is installed, since verl {version('verl')} takes no later one" in line


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


def test_a_model_that_is_not_there(refused, files, tmp_path):
    assert "no folder" in refused(*files, f"actor_rollout_ref.model.path={tmp_path / 'nothing'}")
    assert "not a model folder" in refused(*files, f"actor_rollout_ref.model.path={tmp_path}")


def test_a_file_that_verl_cannot_read(refused, files, tmp_path):
    other = tmp_path / "other.parquet"
    other.write_text("no table")
    named = f"data.val_files={other}"
    assert f"data.val_files: {other} is no Parquet file that can be read" in refused(files[0], named)
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), other)
    assert "lacks the columns data_source, reward_model (it has prompt, answer)" in refused(files[0], named)
    table = pq.read_table(tmp_path / "rows.parquet")
    pq.write_table(table.slice(0, 0), other)
    assert refused(files[0], named) == "data.val_files: the file has no rows"
    pq.write_table(table.drop(["reward_model"]).append_column("reward_model", [["rule", "rule"]]), other)
    assert "`reward_model` has no `ground_truth`" in refused(files[0], named)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            "def mine(completions, facts, **_): return [1.0]",
            "mine needs facts, but the row's `extra_info` does not have it",
        ),
        ("def mine(completions, **_): return [1 / 0]", "failed in own.py line 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_fails_on_the_first_row(refused, files, tmp_path, function, told):
    own, given = tmp_path / "own.py", "reward.custom_reward_function.reward_kwargs"
    own.write_text(f"{function}\n")
    line = refused(*files, f"{given}.rewards=['{own}:mine']", f"{given}.weights=[1]")
    assert line.startswith("data.train_files, first row: ")
    assert told in line


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
def test_rays_workers_start_from_a_folder_with_a_space(files, monkeypatch, folder, given, expected):
    """Ray hands the interpreter's name to a shell as it is."""
    seen = []
    monkeypatch.setattr(sys, "executable", f"{folder}/python")
    monkeypatch.setattr(main_ppo, "run_ppo", lambda config, runner: seen.append(OmegaConf.select(config, PYTHON)))
    assert main([*OPTIONS, *files, "actor_rollout_ref.model.external_lib=cpu_bed.micro", *given]) == 0
    assert seen == [expected]
