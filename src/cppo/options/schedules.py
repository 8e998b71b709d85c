"""Weights that change over a run. Each factor depends only on the step, so a resumed run has the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.fields import method_option
from cppo.options.rl import RLOptions
from cppo.options.sink import SinkOptions

FORMS = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1.0 - math.cos(math.pi * progress)) / 2.0,
}
"""Shape of a schedule: share of the run that is done -> share of the way from the first factor to the last."""
OF_TRL = ("beta", "entropy_coef")
"""TRL's weights that a schedule may change."""
OF_OURS = tuple(one.name for block in (SinkOptions, RLOptions) for one in fields(block) if one.name.endswith("_weight"))
"""CPPO's weights that a schedule may change."""
SMALLEST = 1e-30
"""Value that replaces 0 for TRL's weights: TRL does not compute a term of weight 0 that it later needs."""


@dataclass
class ScheduleOptions:
    """Options of schedules."""

    schedules: list[str] = method_option(
        [],
        "Weights that change over the run: NAME=linear or NAME=cosine, from the option's value to 0; or "
        "NAME=linear:FIRST:LAST, factors of the value at the first step and at the end. NAME is `beta`, "
        "`entropy_coef`, or an option that ends in `_weight`.",
    )


@dataclass(frozen=True)
class Schedule:
    """A factor of one option that goes from `first` to `last`."""

    option: str
    form: str
    first: float
    last: float

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Parse one entry of the option `schedules`. Raises UserError that says what to write."""
        name, equals, described = text.partition("=")
        form, *factors = described.split(":")
        if name not in OF_OURS + OF_TRL:
            raise UserError(f"schedules: {name!r} is not a weight; {choose_one(name, OF_OURS + OF_TRL)}")
        if not equals or form not in FORMS:
            raise UserError(f"schedules: {text!r}: write {name}=linear or {name}=cosine, then :FIRST:LAST if needed")
        try:
            first, last = (float(factor) for factor in factors or ("1", "0"))
        except ValueError:
            first = last = math.nan
        if not (0 <= first < math.inf and 0 <= last < math.inf):
            raise UserError(f"schedules: {text!r}: FIRST and LAST are factors of at least 0, as in {name}={form}:0:1")
        return cls(name, form, first, last)

    def factor(self, progress: float) -> float:
        """The factor after a share `progress` of the run, in [0, 1]."""
        return self.first + (self.last - self.first) * FORMS[self.form](progress)


def scheduled_values(options: Any, progress: float) -> dict[str, float]:
    """The scheduled options after a share `progress` of the run: the values in `options` times their factors."""
    schedules: Sequence[str] = options.schedules
    parsed = [Schedule.parse(text) for text in schedules]
    return {one.option: getattr(options, one.option) * one.factor(progress) for one in parsed}


def with_schedules(options: Any, progress: float) -> Any:
    """The options after a share `progress` of the run: fields alone where any is scheduled, else `options` itself."""
    values = scheduled_values(options, progress)
    return SimpleNamespace(**{**vars(options), **values}) if values else options


def follow_schedules(trainer: Any, progress: float) -> None:
    """Give TRL's trainer the present values of its own weights, which it keeps as attributes."""
    for name, value in scheduled_values(trainer.args, progress).items():
        if name in OF_TRL:
            initial = getattr(trainer.args, name)
            setattr(trainer, name, math.copysign(max(abs(value), SMALLEST), initial) if initial else 0.0)


def check_schedules(options: Mapping[str, Any]) -> None:
    """Raise UserError where the schedules contradict each other or other options."""
    names = [Schedule.parse(text).option for text in options["schedules"]]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"schedules: {name} appears twice")
        if not options.get(name, 1.0):
            raise UserError(f"schedules: {name} = 0 stays 0 under any factor: give {name} a value")
    if "entropy_coef" in names and options.get("use_adaptive_entropy"):
        raise UserError("schedules: entropy_coef follows use_adaptive_entropy = true: choose one")
