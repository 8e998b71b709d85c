"""CPPO's rewards as verl's custom reward function: `reward.custom_reward_function.path=pkg://cppo.verl.reward`."""

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from cppo.errors import UserError
from cppo.rewards import (
    DEFAULT_REWARDS,
    DEFAULT_WEIGHTS,
    RewardFunction,
    check_rewards,
    load_reward,
    reward_columns,
    trainer_arguments,
)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    rewards: Sequence[str] = DEFAULT_REWARDS,
    weights: Sequence[float] | None = DEFAULT_WEIGHTS,
    **kwargs: Any,
) -> dict[str, float]:
    """The reward of one response, in verl's form.

    Args:
        data_source: of the row; not used.
        solution_str: the response, without special tokens.
        ground_truth: the row's `reward_model.ground_truth`; the rewards' `answer`.
        extra_info: other columns for the rewards, such as `choices`.
        rewards: names as in `cppo train --rewards`.
        weights: one per reward; None for 1 each.

    Returns:
        `score`, the weighted sum, and each reward under the name of its function, as the trainer logs it. A reward that
        does not apply to the row (None) adds nothing to the sum and has 0 under its name.

    Raises:
        UserError: as in `load_rewards`; a row lacks a column that a reward needs; or from a reward function, with its
            file and line.
    """
    chat = [{"role": "assistant", "content": solution_str}]
    row = {**(extra_info or {}), "answer": ground_truth, "completions": chat}
    columns = {name: [value] for name, value in row.items()}
    score, parts = 0.0, {}
    for name, function, weight in load_rewards(tuple(rewards), None if weights is None else tuple(weights)):
        missing = [column for column, needs in reward_columns(function).items() if needs and column not in row]
        if missing:
            raise UserError(f"rewards: {name} needs {', '.join(missing)}, but the row's `extra_info` does not have it")
        found = function(**columns)
        (value,) = asyncio.run(found) if inspect.iscoroutine(found) else found
        parts[name] = 0.0 if value is None else float(value)
        score += weight * parts[name]
    return {"score": score, **parts}


@cache
def load_rewards(
    rewards: tuple[str, ...], weights: tuple[float, ...] | None
) -> tuple[tuple[str, RewardFunction, float], ...]:
    """The rewards' functions with their names and weights; loaded once per process.

    Raises UserError for a reward that is unknown, cannot be imported or needs arguments of TRL's trainer, such as
    `ask_policy`; and for a wrong number of weights.
    """
    functions = [load_reward(spec) for spec in check_rewards(rewards, weights)]
    names = [function.__name__ for function in functions]
    for name, function in zip(names, functions, strict=True):
        asked = trainer_arguments(function)
        if asked:
            raise UserError(
                f"rewards: {name} needs {', '.join(asked)}, which verl's reward workers do not have: leave it out, or "
                "train with `cppo train`"
            )
    if len(set(names)) < len(names):
        raise UserError(f"rewards: two functions have the same name among {', '.join(names)}")
    return tuple(zip(names, functions, weights or [1.0] * len(names), strict=True))
