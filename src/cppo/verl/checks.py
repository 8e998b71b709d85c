"""Checks of a run inside verl before Ray starts: mode, CPPO's options, rewards, checkpoints."""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cppo.checkpoints import checkpoint_folders, is_own_checkpoint
from cppo.errors import UserError, choose_one, one_line
from cppo.rewards import DEFAULT_REWARDS, DEFAULT_WEIGHTS
from cppo.runs.checks import check_whole_model
from cppo.verl.batches import MODES
from cppo.verl.options import WHERE, options_from
from cppo.verl.reward import compute_score, load_rewards
from cppo.verl.vision_base import check_base

REWARD_MODULE = "pkg://cppo.verl.reward"
"""Name of our reward module in verl's configuration."""
REWARD = "reward.custom_reward_function"


def check_config(config: DictConfig) -> None:
    """Refuse settings that would fail, or be ignored, during the run.

    Raises UserError for an unknown mode, an engine without rollouts, for CPPO's options and rewards, and for a
    checkpoint of `cppo train`.
    """
    mode = config.trainer.v1.trainer_mode
    if mode not in MODES:
        raise UserError(f"trainer.v1.trainer_mode = {mode!r}: {choose_one(mode, MODES)}")
    if not config.actor_rollout_ref.hybrid_engine:
        raise UserError("actor_rollout_ref.hybrid_engine = false fails inside verl 0.9: leave it at true")
    options_from(_plain(config, WHERE))
    if _has_our_rewards(config):
        load_rewards(*_given_rewards(config))
    _check_checkpoints(config.trainer)


def _has_our_rewards(config: DictConfig) -> bool:
    return bool(OmegaConf.select(config, f"{REWARD}.path") == REWARD_MODULE)


def _given_rewards(config: DictConfig) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    given = _plain(config, f"{REWARD}.reward_kwargs") or {}
    if not isinstance(given, dict):
        raise UserError(f"{REWARD}.reward_kwargs: expected rewards and weights, got {given!r}")
    rewards, weights = given.get("rewards", DEFAULT_REWARDS), given.get("weights", DEFAULT_WEIGHTS)
    for name, values, kinds in (("rewards", rewards, str), ("weights", weights or [], int | float)):
        if not isinstance(values, list | tuple) or not all(isinstance(value, kinds) for value in values):
            what = "names" if kinds is str else "numbers"
            raise UserError(f"{REWARD}.reward_kwargs.{name}: expected a list of {what}, got {values!r}")
    return tuple(rewards), None if weights is None else tuple(weights)


def check_files(config: DictConfig) -> None:
    """Refuse data and models that are missing or broken, rewards that fail, and a model that becomes another one here.

    Paths with a scheme, such as hdfs://, are left to verl.

    Raises UserError.
    """
    for option in ("data.train_files", "data.val_files"):
        given = _plain(config, option)
        for file in [given] if isinstance(given, str) else given or ():
            if "://" not in str(file) and not Path(str(file)).expanduser().exists():
                raise UserError(f"{option}: there is no file {file!r}; `cppo verl-data SPEC --out FILE` writes one")
            if str(file).endswith(".parquet") and "://" not in str(file) and not config.data.custom_cls.path:
                _check_rows(option, Path(str(file)).expanduser(), config)
    if not config.data.train_files:
        raise UserError("data.train_files: give the file to train from; `cppo verl-data SPEC --out FILE` writes one")
    model = str(config.actor_rollout_ref.model.path)
    if "://" not in model and (model[:1] in ("/", ".", "~") or Path(model).exists()):
        model = str(Path(model).expanduser())
        check_whole_model(model)
        if not config.actor_rollout_ref.model.external_lib:  # it may set the base
            check_base("actor_rollout_ref.model.path", model)


def _check_rows(option: str, file: Path, config: DictConfig) -> None:
    """Check that a Parquet file can be read and has the columns of verl's dataset and of our rewards."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(file).names
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{option}: {file} is no Parquet file that can be read: {one_line(error)}") from error
    needed = [str(config.data.prompt_key)]
    if _has_our_rewards(config):
        needed += [str(config.data.reward_fn_key), "reward_model"]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"{option}: {file} lacks the columns {', '.join(missing)} (it has {', '.join(columns)}); `cppo verl-data "
            "SPEC --out FILE` writes verl's layout"
        )
    if _has_our_rewards(config):
        _try_rewards(option, pq.ParquetFile(file), config)


def _try_rewards(option: str, file: Any, config: DictConfig) -> None:
    """Call our rewards once, on a right answer to the first row of a Parquet file.

    Where they fail during a run, verl drops the rollouts, and only the log of a worker has the reason.
    """
    columns = [name for name in ("reward_model", "extra_info") if name in file.schema_arrow.names]
    first = next(file.iter_batches(batch_size=1, columns=columns), None)
    if first is None:
        raise UserError(f"{option}: the file has no rows")
    (row,) = first.to_pylist()
    answer = row["reward_model"].get("ground_truth") if isinstance(row["reward_model"], dict) else None
    if answer is None:
        raise UserError(f"{option}: the first row's `reward_model` has no `ground_truth`, the answer to compare with")
    response = f"<think>\n\n</think>\n\\boxed{{{answer}}}"
    try:
        compute_score("", response, answer, row.get("extra_info"), *_given_rewards(config))
    except UserError as error:
        raise UserError(f"{option}, first row: {error}") from error


def _plain(config: DictConfig, name: str) -> Any:
    node = OmegaConf.select(config, name)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _check_checkpoints(trainer: DictConfig) -> None:
    folder = Path(trainer.default_local_dir)
    if checkpoint_folders(folder):
        raise UserError(f"trainer.default_local_dir: {folder} is a run of `cppo train`; give another folder")
    if trainer.resume_mode != "resume_path":
        return
    named = Path(str(trainer.resume_from_path))
    if is_own_checkpoint(named) or checkpoint_folders(named):
        raise UserError(
            f"trainer.resume_from_path: `cppo train` wrote {named}, and verl cannot resume from it; to start from its "
            f"weights give actor_rollout_ref.model.path={named} trainer.resume_mode=disable"
        )
    if not re.fullmatch(r"global_step_\d+", named.name) or not named.is_dir():
        raise UserError(f"trainer.resume_from_path: {named} is not a checkpoint of verl: give its folder global_step_N")
