"""CPPO's own options, block by block, and the rules between blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from cppo.fields import OptionField, option, option_fields
from cppo.imports import check_own, is_own
from cppo.methods import DEFAULT_METHOD, METHODS, Options
from cppo.options.ascent import AscentOptions, check_ascent
from cppo.options.execution import ExecutionOptions, check_execution
from cppo.options.prompts import PromptOptions, check_prompts
from cppo.options.rl import RLOptions, check_rl
from cppo.options.schedules import ScheduleOptions, check_schedules
from cppo.options.selection import SelectionOptions, check_selection
from cppo.options.sink import SinkOptions, check_sink
from cppo.options.views import ViewOptions, check_views, strength_fields

EXECUTION_OPTIONS = frozenset(field.name for field in fields(ExecutionOptions))
"""Options that say how a method is computed and what is trained. Choosing another method resets every other CPPO option
of the recipe.
"""


@dataclass
class MethodOption:
    """The option that sets the others."""

    method: str = option(
        DEFAULT_METHOD,
        "The training method; it sets the options below: `cppo`, `grpo` (TRL's) or another that `cppo methods` lists.",
    )


@dataclass
class CPPOOptions(
    ExecutionOptions,
    AscentOptions,
    ViewOptions,
    PromptOptions,
    ScheduleOptions,
    RLOptions,
    SelectionOptions,
    SinkOptions,
    MethodOption,
):
    """All of CPPO's own options, as a base class for a configuration. The fields of the last base class come first."""


@cache
def cppo_fields() -> Mapping[str, OptionField]:
    """CPPO's own options by name."""
    declared = option_fields(CPPOOptions)
    declared["method"] = replace(declared["method"], choices=tuple(METHODS))
    for name, strength in strength_fields().items():
        declared[f"view_{name}"] = replace(declared[f"view_{name}"], interval=strength.interval)
    return declared


def check_combinations(options: Mapping[str, Any], shapes_advantages: bool | None = None) -> None:
    """Raise UserError where options contradict each other; each value is valid alone.

    Args:
        options: every CPPO option with its value, and TRL's as far as they are known.
        shapes_advantages: whether the sink shapes advantages; None for a sink of the user's that is not imported yet.

    Raises:
        UserError: two options contradict, or a function's file or module does not exist; the message names the field.
    """
    for name, field in cppo_fields().items():
        if field.functions and is_own(options[name]):
            check_own(options[name], f"{name} {options[name]!r}")
    check_sink(options, shapes_advantages)
    checks = (check_selection, check_execution, check_rl, check_prompts, check_views, check_ascent, check_schedules)
    for check in checks:
        check(options)


def without_method(options: Mapping[str, Any], chosen: Any) -> Options:
    """`options` without those that the method `chosen` replaces.

    These are the options that belong to a method and the inherited options that the old or the new method sets. If
    rewards define one of the two methods, the rewards are also replaced. An unknown method sets nothing.
    """
    names = (str(options.get("method", DEFAULT_METHOD)), str(chosen))
    methods = [METHODS[name] for name in names if name in METHODS]
    belong = {*cppo_fields()} - EXECUTION_OPTIONS | {name for method in methods for name in method.options}
    if any(method.rewards for method in methods):
        belong |= {"rewards", "reward_weights"}
    return {option: value for option, value in options.items() if option not in belong}
