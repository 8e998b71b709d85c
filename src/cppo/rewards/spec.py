"""A reward named in one line: a built-in with its options, or a function of a module or file.

`accuracy?tolerance=0.01`, `format?form=published`, `length?max_completion_len=4096&soft_punish_cache=512`,
`my_package.rewards:brevity`, `rewards.py:brevity`, `trl.rewards:get_cosine_scaled_reward?max_len=1000`. With options,
the named function is called with them and returns the reward function.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cppo.errors import UserError, choose_one
from cppo.imports import check_import_path, failure, import_object, own_file
from cppo.parsing import parse_yaml
from cppo.rewards.asking import ASK_POLICY

RewardFunction = Callable[..., Any]

BUILT_IN = {
    "accuracy": "cppo.rewards:get_accuracy_reward",
    "format": "cppo.rewards:get_format_reward",
    "description": "cppo.rewards.description:get_description_reward",
    "facts": "cppo.rewards.facts:get_facts_reward",
    "length": "trl.rewards:get_soft_overlong_punishment",
    "repetition": "trl.rewards:get_repetition_penalty_reward",
    "word_repetition": "cppo.rewards.facts:get_word_repetition_reward",
}
"""Rewards without an import path, by name: functions that take the options and return the reward."""
TRAINER_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
    "prompt_opens",
    ASK_POLICY,
)
"""Arguments of a reward beside the columns of the data, from TRL and from our trainer."""


@dataclass(frozen=True)
class RewardSpec:
    """`path` is `module:function` or `file.py:function`; with `options` None the function itself is the reward."""

    text: str
    path: str
    options: dict[str, Any] | None = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The user's file with the function; None for a built-in or a module."""
        return own_file(self.path)

    @property
    def needs_trl(self) -> bool:
        """Whether the function is TRL's, or calls one of TRL's."""
        return self.path.startswith("trl.") or self.path == BUILT_IN["word_repetition"]

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of `BUILT_IN`, by name or by path."""
        return self.path in BUILT_IN.values()


def parse_reward(text: str) -> RewardSpec:
    """Read one reward's name, without importing it.

    Raises UserError for a name that is neither a built-in nor an import path, a file or module that does not exist, or
    an option that is not name=value.
    """
    name, mark, query = text.partition("?")
    options = _options(text, query) if mark else None
    if name in BUILT_IN:
        return RewardSpec(text, BUILT_IN[name], options or {})
    if not check_import_path(name, f"rewards: {text!r}"):
        raise UserError(
            f"rewards: {name!r} is unknown; {choose_one(name, BUILT_IN)}, or give module:function or file.py:function"
        )
    return RewardSpec(text, name, options)


def check_rewards(rewards: Sequence[str], weights: Sequence[float] | None) -> list[RewardSpec]:
    """Read every reward's name, and check the weights.

    Raises UserError as `parse_reward` does, and for no reward, a repeated one, or another number of weights.
    """
    if not rewards:
        raise UserError("rewards: give at least one, e.g. accuracy")
    specs = [parse_reward(text) for text in rewards]
    doubles = [text for text in rewards if list(rewards).count(text) > 1]
    if doubles:
        raise UserError(f"rewards: {doubles[0]!r} is given twice")
    check_weights(rewards, weights)
    return specs


def check_weights(rewards: Sequence[str], weights: Sequence[float] | None) -> None:
    """Check that each reward has a weight, if weights are given. Raises UserError with what to add or remove."""
    if weights is None or len(weights) == len(rewards):
        return
    many, kind = abs(len(weights) - len(rewards)), "weight" if len(weights) < len(rewards) else "reward"
    surplus = "reward" if kind == "weight" else "weight"
    ones = " ".join("1" for _ in rewards)
    raise UserError(
        f"reward_weights: {_count(len(weights), 'weight')} ({', '.join(f'{weight:g}' for weight in weights)}) for "
        f"{_count(len(rewards), 'reward')} ({', '.join(rewards)}): add {_count(many, kind)} or remove "
        f"{_count(many, surplus)}; `--reward_weights {ones}` gives each reward the weight 1"
    )


def reward_names(rewards: Any) -> list[str]:
    """Names of a trainer's rewards: of functions, of models, or the given names of models."""
    listed = rewards if isinstance(rewards, list | tuple) else [rewards]
    return [one if isinstance(one, str) else _name(one) for one in listed]


def number_tolerance(specs: Sequence[RewardSpec]) -> float:
    """The tolerance of the accuracy reward among `specs`; 0 without one."""
    found = [spec.options or {} for spec in specs if spec.path == BUILT_IN["accuracy"]]
    return found[0].get("tolerance", 0.0) if found else 0.0


def load_reward(spec: RewardSpec) -> RewardFunction:
    """The function itself; for a user's own file or module, this runs its code.

    Raises UserError if it cannot be imported, is no function, or refuses its options. The returned function raises
    UserError, with file and line, if the user's code raises anything.
    """
    function = import_object(spec.path, f"rewards: {spec.text!r}")
    if spec.options is not None:
        try:
            inspect.signature(function).bind(**spec.options)
            function = function(**spec.options)
        except (Exception, SystemExit) as error:  # unknown or missing options, or an error of the user's code
            called = "a function that is named with `?` is called with these options, and returns the reward function"
            raise UserError(f"rewards: {spec.text!r}: {error} ({called})") from error
    if not callable(function) or isinstance(function, type):
        raise UserError(f"rewards: {spec.text!r} is of type {type(function).__name__}, not a function")
    if not _takes_all_columns(function):
        raise UserError(
            f"rewards: {spec.text!r} must take **kwargs, as every column is passed by name; a function that "
            "returns a reward function is called with the options after `?`"
        )
    return function if spec.is_built_in else _with_clear_errors(function, f"rewards: {spec.text!r}")


def named_rewards(rewards: Any) -> Any:
    """A trainer's rewards, with a function for each built-in's name or import path.

    Any other text, a model's name, is unchanged. Raises UserError as `load_reward` does.
    """
    if isinstance(rewards, list | tuple):
        return [named_rewards(one) for one in rewards]
    is_named = isinstance(rewards, str) and (rewards.partition("?")[0] in BUILT_IN or ":" in rewards)
    return load_reward(parse_reward(rewards)) if is_named else rewards


def guarded_rewards(rewards: Any) -> Any:
    """A trainer's rewards; each function raises UserError for invalid rewards, such as NaN, and for `sys.exit`.

    Other exceptions are unchanged, as are models and names of models.
    """
    if isinstance(rewards, list | tuple):
        return [guarded_rewards(one) for one in rewards]
    if not callable(rewards) or hasattr(rewards, "forward"):
        return rewards
    return _with_clear_errors(rewards, f"reward_funcs: {_name(rewards)!r}", (SystemExit,))


def reward_columns(function: RewardFunction) -> dict[str, bool]:
    """The columns of the data that a reward function has as parameters, and whether each is required (no default)."""
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in _parameters(function).items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in TRAINER_ARGUMENTS
    }


def trainer_arguments(function: RewardFunction) -> list[str]:
    """The trainer's arguments that a reward function requires beside `completions`: parameters without a default."""
    parameters = _parameters(function)
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    asked = {ASK_POLICY} & set(parameters)
    return [name for name in TRAINER_ARGUMENTS if name in needed | asked and name != "completions"]


def _with_clear_errors(
    function: RewardFunction, what: str, caught: tuple[type[BaseException], ...] = (Exception, SystemExit)
) -> RewardFunction:
    """The function; errors in `caught` and invalid rewards become a UserError that begins with `what`.

    The function gets copies of the completions and of the columns' lists, and may change them.
    """

    def failed(error: BaseException) -> UserError:
        told = failure(error, what)
        if isinstance(error, KeyError):
            told = UserError(f"{told}; the data's columns are passed to the parameters with their names")
        return told

    def checked(found: Any, completions: Sequence[Any]) -> list[float | None]:
        wanted = f"{what} must return a list of {len(completions)} numbers, or None, one a completion"
        if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
            raise UserError(f"{wanted}; it returned {type(found).__name__}")
        values = list(found)
        if len(values) != len(completions):
            raise UserError(f"{wanted}; it returned {len(values)}")
        numbers: list[float | None] = []
        for place, value in enumerate(values):
            try:
                if isinstance(value, str | bytes):
                    raise TypeError
                numbers.append(None if value is None else float(value))
            except (TypeError, ValueError, RuntimeError) as error:
                kind = type(value).__name__
                raise UserError(f"{wanted}; for completion {place} it returned an object of type {kind}") from error
            if value is not None and math.isnan(value):
                raise UserError(f"{wanted}; for completion {place} it returned nan")
        return numbers

    async def awaited(*, completions: Sequence[Any], **columns: Any) -> Any:
        try:
            found = await function(**_copies(completions, columns))
        except caught as error:
            raise failed(error) from error
        return checked(found, completions)

    def called(*, completions: Sequence[Any], **columns: Any) -> Any:
        try:
            found = function(**_copies(completions, columns))
        except caught as error:
            raise failed(error) from error
        return checked(found, completions)

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    reward: RewardFunction = awaited if is_async else called
    functools.update_wrapper(reward, function)  # its signature, for `reward_columns`
    reward.__name__ = _name(function)
    return reward


def _copies(completions: Sequence[Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one reward: without copies, a change would reach the rewards after it, and the log."""
    lists = {name: list(value) if isinstance(value, list) else value for name, value in columns.items()}
    return {"completions": copy.deepcopy(completions), **lists}


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _options(text: str, query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else []:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals and value) or name in options:
            raise UserError(f"rewards: {text!r}: {pair!r} is not option=value, each option once")
        try:
            options[name] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"rewards: {text!r}: {value!r} is not a value") from error
    return options


def _takes_all_columns(function: Any) -> bool:
    """Whether TRL can call a function as a reward: with completions and every other column by name."""
    parameters = _parameters(function)
    return not parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # functions written in C may have no signature
        return {}
