"""Reward functions in TRL's form, `f(completions, **columns) -> list[float]`, safe on hostile model text."""

from .answer import accuracy_reward, get_accuracy_reward
from .extract import extract_answer
from .format import format_reward
from .match import answer_kind, answers_match
from .spec import (
    DEFAULT_REWARDS,
    DEFAULT_WEIGHTS,
    RewardSpec,
    check_rewards,
    load_reward,
    number_tolerance,
)

__all__ = [
    "DEFAULT_REWARDS",
    "DEFAULT_WEIGHTS",
    "RewardSpec",
    "accuracy_reward",
    "answer_kind",
    "answers_match",
    "check_rewards",
    "extract_answer",
    "format_reward",
    "get_accuracy_reward",
    "load_reward",
    "number_tolerance",
]
