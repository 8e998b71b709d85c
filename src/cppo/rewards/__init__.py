"""Reward functions in TRL's form, `f(completions, **columns) -> list[float]`, safe on hostile model text."""

from cppo.rewards.answer import accuracy_reward, format_reward, get_accuracy_reward, get_format_reward
from cppo.rewards.asking import PolicyReward, Question, Sampling, text_only
from cppo.rewards.chosen import DEFAULT_REWARDS, DEFAULT_WEIGHTS, chosen_rewards, trainer_rewards
from cppo.rewards.extract import extract_answer
from cppo.rewards.form import ChatForm
from cppo.rewards.match import answer_kind, answer_number, answers_match, names_choice
from cppo.rewards.spec import (
    RewardFunction,
    RewardSpec,
    check_rewards,
    check_weights,
    guarded_rewards,
    load_reward,
    named_rewards,
    number_tolerance,
    reward_columns,
    reward_names,
    trainer_arguments,
)

__all__ = [
    "DEFAULT_REWARDS",
    "DEFAULT_WEIGHTS",
    "ChatForm",
    "PolicyReward",
    "Question",
    "RewardFunction",
    "RewardSpec",
    "Sampling",
    "accuracy_reward",
    "answer_kind",
    "answer_number",
    "answers_match",
    "check_rewards",
    "check_weights",
    "chosen_rewards",
    "extract_answer",
    "format_reward",
    "get_accuracy_reward",
    "get_format_reward",
    "guarded_rewards",
    "load_reward",
    "named_rewards",
    "names_choice",
    "number_tolerance",
    "reward_columns",
    "reward_names",
    "text_only",
    "trainer_arguments",
    "trainer_rewards",
]
