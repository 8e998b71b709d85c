"""verl's configuration with a user's options, checked against verl's own files, classes and look-ups.

verl checks most of its options in Ray's workers, where a mistake ends a run of minutes with a traceback.
"""

import traceback
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any

import torch
import verl.trainer.config
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.checkpoint.checkpoint_handler import CheckpointHandler
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.tracking import Tracking
from verl.workers.rollout.base import _ROLLOUT_REGISTRY

from cppo.errors import UserError, choose_one, did_you_mean, first_line, one_line
from cppo.verl.counterparts import ACTOR, MODEL, ROLLOUT

FOLDERS = (Path(__file__).parent / "config", *map(Path, verl.trainer.config.__path__))
"""Configuration files: ours first, which extend verl's."""
REFUSALS = (AssertionError, ValueError, TypeError, RuntimeError, HydraException, OmegaConfBaseException)
"""The errors of verl for an option."""
SCALARS = {bool, int, float}


def composed(words: Sequence[str]) -> DictConfig:
    """verl's configuration with these options (NAME=VALUE).

    Raises UserError for an option that verl does not have, and for text or a list in place of a number.
    """
    # The defaults of the same engine, without the options' values.
    chosen = [word for word in words if _is_group(word)]
    own = _plain(_compose(chosen, {}), resolve=True)
    config = _compose(words, own)
    _check_kinds(_plain(config, resolve=False), own)
    return config


def check_choices(config: DictConfig) -> None:
    """Let verl's classes and look-ups refuse what they would refuse in a worker. Raises UserError."""
    with _refused():
        validate_config(config, need_reference_policy(config), need_critic(config))
        omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    for name, look_up in _look_ups(config):
        value = OmegaConf.select(config, name)
        with _refused(f"{name} = {value!r}: "):
            look_up(value)


def _engine(config: DictConfig, strategy: Any) -> None:
    """Make the actor's engine settings as verl does, which gives them the actor's strategy."""
    settings = OmegaConf.select(config, f"{ACTOR}.fsdp_config")
    if settings is not None:
        omega_conf_to_dataclass(OmegaConf.merge(settings, {"strategy": strategy}))


def _look_ups(config: DictConfig) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """Options by name, with what raises for a value that verl does not have."""
    yield f"{ACTOR}.strategy", partial(_engine, config)
    for name in ("dtype", "model_dtype"):
        if OmegaConf.select(config, f"{ACTOR}.fsdp_config.{name}"):
            yield f"{ACTOR}.fsdp_config.{name}", PrecisionType.to_dtype
    yield "trainer.resume_mode", _resume
    yield "trainer.logger", _loggers
    if OmegaConf.select(config, f"{MODEL}.external_lib"):  # it may register more in the workers
        return
    zeros = torch.zeros(1)
    yield "algorithm.adv_estimator", get_adv_estimator_fn
    yield "algorithm.kl_penalty", partial(kl_penalty, zeros, zeros)
    yield f"{ACTOR}.kl_loss_type", partial(kl_penalty, zeros, zeros)
    yield f"{ACTOR}.policy_loss.loss_mode", get_policy_loss_fn
    yield f"{ROLLOUT}.name", _one_of({name for name, _ in _ROLLOUT_REGISTRY})
    if config.reward.reward_manager.source == "register":
        from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

        yield "reward.reward_manager.name", _one_of(REWARD_MANAGER)


def _one_of(names: Iterable[str]) -> Callable[[Any], None]:
    def look_up(value: Any) -> None:
        if value not in names:
            raise ValueError(choose_one(value, sorted(names)))

    return look_up


def _loggers(names: Any) -> None:
    for name in [names] if isinstance(names, str) else names:
        _one_of({"tracking", *Tracking.supported_backend})(name)


def _resume(mode: Any) -> None:
    if mode != "resume_path":  # its folder is checked elsewhere
        nothing = SimpleNamespace(resume_mode=mode, resume_from_path=None, _find_latest_checkpoint=lambda: None)
        CheckpointHandler._determine_resume_path(nothing)


@contextmanager
def _refused(named: str = "") -> Iterator[None]:
    """verl's refusals in the block as UserError. An assertion without text is quoted: it names what verl takes."""
    try:
        yield
    except REFUSALS as error:
        cause = error.__cause__ or error
        text = one_line(cause)
        if not str(cause):
            line = traceback.extract_tb(cause.__traceback__)[-1].line or ""
            text = f"verl refuses it: {line}" if line.startswith("assert") else "verl has no such value"
        raise UserError(named + text) from error


def _is_group(word: str) -> bool:
    """Whether an option chooses among configuration files, as `model_engine` does."""
    group = word.lstrip("+~").partition("=")[0].partition("@")[0]
    return any((folder / group).is_dir() for folder in FOLDERS)


def _compose(words: Sequence[str], own: Mapping[str, Any]) -> DictConfig:
    try:
        with initialize_config_dir(str(FOLDERS[0]), version_base=None):
            return compose("cppo", list(words))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_reason(first_line(error), own)) from error


def _reason(text: str, own: Mapping[str, Any]) -> str:
    """The first line of hydra's message, with what to do."""
    if text.startswith("Could not append"):
        return f"{text} (write NAME=VALUE for an option that it lists)"
    begin = "Could not override '"
    if not text.startswith(begin):
        return text
    name = text.removeprefix(begin).partition("'")[0]
    folder, _, last = name.rpartition(".")
    known: Any = own
    for part in folder.split(".") if folder else ():
        known = known.get(part) if isinstance(known, Mapping) else None
    near = did_you_mean(last, known) if isinstance(known, Mapping) else ""
    return f"{name}: verl's configuration lists no such option; {near or '+NAME=VALUE gives it all the same'}"


def _plain(config: DictConfig, *, resolve: bool) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(config, resolve=resolve)
    return found


def _check_kinds(
    given: Mapping[str, Any], own: Mapping[str, Any], place: str = "", types: Collection[type] = ()
) -> None:
    """Compare options with verl's own of the same names, and with the fields of their class in verl.

    An option that refers to another one, `${...}`, is left out: the other one is compared.

    types: of the field that holds these options, for options that do not name their class.
    """
    made = own.get("_target_")
    kinds = _field_kinds(get_class(made) if made else next(iter(types), None)) if given.get("_target_") == made else {}
    for name, value in given.items():
        option, default = f"{place}{name}", own.get(name)
        if name not in own and made and kinds and name not in kinds:
            raise UserError(f"{option}: verl has no such option; {did_you_mean(name, kinds) or 'leave it out'}")
        if name not in own or value is None or (isinstance(value, str) and "${" in value):
            continue
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                one = next((name for name in default if name != "_target_"), "NAME")
                raise UserError(f"{option} = {value!r}: it holds options of its own: give {option}.{one}=VALUE")
            _check_kinds(value, default, f"{option}.", kinds.get(name, ()))
        elif isinstance(value, str | list | dict):
            taken = kinds.get(name) or ({type(default)} if isinstance(default, bool | int | float) else set())
            if taken and taken <= SCALARS:
                expected = "true or false" if taken == {bool} else "a number"
                raise UserError(f"{option}: expected {expected}, got {value!r}")


def _field_kinds(kind: type | None) -> dict[str, set[Any]]:
    """The names of a dataclass's fields -> the types of their values, without None; empty for another class."""
    if kind is None or not is_dataclass(kind):
        return {}
    hints = typing.get_type_hints(kind)
    return {field.name: _alternatives(hints[field.name]) - {NoneType} for field in fields(kind)}


def _alternatives(hint: Any) -> set[Any]:
    return set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else {hint}
