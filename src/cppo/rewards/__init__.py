"""Reward functions in TRL's form, `f(completions, **columns) -> list[float]`, safe on hostile model text."""

from .answer import accuracy_reward, answer_kind, answers_match, extract_answer
from .format import format_reward

__all__ = ["accuracy_reward", "answer_kind", "answers_match", "extract_answer", "format_reward"]
