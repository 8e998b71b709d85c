r"""Does a response's description of the image answer the question without the image? Vision-SR1 and Visionary-R1.

The current policy is asked the question again, with the description instead of the image (arXiv 2508.19652,
2505.14677). The reward is 1 if its answer is right, else 0. A response without a description gets 0.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.rewards.answer import get_accuracy_reward
from cppo.rewards.asking import PolicyReward, Question, Sampling, text_only
from cppo.rewards.extract import extract_answer

MAX_DESCRIPTION_CHARS = 20_000
"""A longer description counts as none."""
GUARDS = ("box", "answer", "none")
INSTRUCTION = "Answer the question from this description of an image. Think first, then give the answer in \\boxed{}."
REFUSING = 'If the text does more than describe an image, for instance answers the question, write only "{}".'


def described(text: str, opening: str, closing: str) -> str | None:
    """The text between the first opening tag and the closing tag after it, stripped.

    None if a tag is missing, nothing is between them, another opening tag is, or it is longer than 20,000 characters.
    Time is linear in the text; line breaks belong to a description.
    """
    begin = text.find(opening)
    if begin < 0:
        return None
    begin += len(opening)
    end = text.find(closing, begin, begin + MAX_DESCRIPTION_CHARS + len(closing))
    if end < 0:
        return None
    found = text[begin:end].strip()
    return None if not found or opening in found else found


class DescriptionReward(PolicyReward):
    """See `get_description_reward`."""

    def __init__(
        self, opening: str, closing: str, guard: str, refusal: str | None, tolerance: float, sampling: Sampling
    ) -> None:
        self.opening, self.closing, self.guard, self.refusal = opening, closing, guard, refusal
        self.sampling = sampling
        self.__name__ = "description_reward"
        self._accuracy = get_accuracy_reward(tolerance)

    def questions(self, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Question | None]:
        asked: list[Question | None] = []
        for completion, prompt in zip(completions, columns["prompts"], strict=True):
            description = self._description(completion)
            say = functools.partial(self._asked, description or "")
            asked.append(None if description is None else Question(text_only(prompt, say)))
        return asked

    def rewards(
        self, answers: Sequence[str | None], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        texts = [answer if answer is not None and not self._refuses(answer) else "" for answer in answers]
        right = self._accuracy(texts, **{name: columns[name] for name in ("answer", "choices") if name in columns})
        return list(right)

    def _description(self, completion: str) -> str | None:
        text = described(completion, self.opening, self.closing)
        if text is None or self.guard == "none":
            return text
        answer = extract_answer(completion) if self.guard == "answer" else None
        tells = bool(answer) and re.search(rf"(?<!\w){re.escape(answer or '')}(?!\w)", text) is not None
        return None if "\\boxed" in text or tells else text

    def _asked(self, description: str, question: str) -> str:
        refusing = [] if self.refusal is None else [REFUSING.format(self.refusal)]
        return "\n".join([" ".join([INSTRUCTION, *refusing]), f"Description: {description}", f"Question: {question}"])

    def _refuses(self, answer: str) -> bool:
        return self.refusal is not None and self.refusal.casefold() in answer.casefold()


def get_description_reward(
    opening: str = "<description>",
    closing: str = "</description>",
    guard: str = "box",
    refusal: str | None = None,
    tolerance: float = 0.0,
    max_tokens: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> DescriptionReward:
    r"""The reward for a description from which the policy finds the right answer without the image.

    Args:
        opening, closing: tags around the description; not empty.
        guard: which descriptions get 0: "box" those with `\boxed`, "answer" also those with the response's own final
            answer as a word, "none" none.
        refusal: words that the policy writes instead of an answer if the description does more than describe
            (Visionary-R1); such an answer gets 0. None asks for no refusal.
        tolerance: of the accuracy reward, which compares answers.
        max_tokens, temperature, top_p, seed: of the answers, see `Sampling`.

    Raises UserError for an empty tag, another guard, or a number out of its range.
    """
    for name, tag in (("opening", opening), ("closing", closing)):
        if not isinstance(tag, str) or not tag.strip():
            raise UserError(f"{name} = {tag!r}: give the tag, which is text")
    if guard not in GUARDS:
        raise UserError(f"guard = {guard!r} is unknown; {choose_one(guard, GUARDS)}")
    if refusal is not None and (not isinstance(refusal, str) or not refusal.strip()):
        raise UserError(f"refusal = {refusal!r}: give the words of a refusal, or leave it out")
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    return DescriptionReward(opening, closing, guard, refusal, tolerance, sampling)
