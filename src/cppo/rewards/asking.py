"""Rewards that ask the current policy: their questions, sampling of the answers, and their base class.

The trainer generates the answers (`cppo.training.asking`). A reward function with a parameter `ask_policy` gets a
function: `ask_policy(questions, sampling)` returns an answer for each question. It must be called once a batch on every
process, also if all questions are None: with sharded weights the processes generate together.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cppo.errors import UserError
from cppo.rewards.extract import completion_text

ASK_POLICY = "ask_policy"
MAX_ANSWER_TOKENS = 100_000
Prompt = str | list[dict[str, Any]]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Question:
    """A question to the policy.

    Attributes:
        prompt: text or chat messages, as in the data. Special tokens in their text, perhaps from a response, are
            removed.
        images: of the last user message, beside those inside the messages.
    """

    prompt: Prompt
    images: Sequence[Any] = ()


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_tokens: of an answer, at least 1.
        temperature: 0 takes the likeliest token; None is the run's.
        top_p: nucleus, in (0, 1]; None is the run's.
        seed: of this reward's own random stream, beside the run's seed.

    Raises:
        UserError: a value is out of its range.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_is_whole(self.max_tokens) and 1 <= self.max_tokens <= MAX_ANSWER_TOKENS):
            raise UserError(f"max_tokens = {self.max_tokens!r}: give a whole number from 1 to {MAX_ANSWER_TOKENS}")
        if self.temperature is not None and not (_is_number(self.temperature) and 0 <= self.temperature <= 100):
            raise UserError(f"temperature = {self.temperature!r}: give a number in [0, 100]")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p = {self.top_p!r}: give a number in (0, 1]")
        if not (_is_whole(self.seed) and 0 <= self.seed < 2**32):
            raise UserError(f"seed = {self.seed!r}: give a whole number from 0 to {2**32 - 1}")


AskPolicy = Callable[[Sequence[Question | None], Sampling], list[str | None]]


class PolicyReward(ABC):
    """A reward that asks the current policy about each completion. A subclass defines the questions and the rewards.

    All questions of a batch are answered together, by the weights that made the completions, in evaluation mode and
    without gradient. The random numbers are the reward's own, so it does not change the rollouts.
    """

    sampling = Sampling()

    @abstractmethod
    def questions(self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Question | None]:
        """Questions about each of B completions; None asks nothing.

        columns: passed by TRL by name, `prompts` and the columns of the data, B values each.
        """

    @abstractmethod
    def rewards(
        self, answers: Sequence[str | None], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """Reward of each completion by its answer, which is None without a question or without a possible answer."""

    def __call__(self, completions: Sequence[Any], ask_policy: AskPolicy, **columns: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        return self.rewards(ask_policy(self.questions(texts, columns), self.sampling), texts, columns)


def asks_policy(reward: Any) -> bool:
    """Whether a reward function takes `ask_policy`."""
    try:
        return ASK_POLICY in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False


def with_policy(reward: Any, name: str, ask: Callable[..., list[str | None]]) -> Any:
    """A trainer's reward; one that asks the policy gets `ask`, with the reward's name as first argument.

    Raises UserError for an `async` one: all processes must call it at the same time, and its time is unknown.
    """
    if isinstance(reward, str) or hasattr(reward, "forward") or not asks_policy(reward):
        return reward
    if inspect.iscoroutinefunction(reward):
        raise UserError(f"the reward {name} asks the policy, so it cannot be async: write `def`")
    return functools.partial(reward, **{ASK_POLICY: functools.partial(ask, name)})


def text_only(prompt: Prompt, say: Callable[[str], str]) -> Prompt:
    """A prompt without its images, with `say` applied to the text of its last user message."""
    if isinstance(prompt, str):
        return say(prompt)
    messages = [{**message, "content": _text(message.get("content"))} for message in prompt]
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = say(message["content"])
            break
    return messages


def _text(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(str(part.get("text") or "") for part in content if part.get("type") == "text")
