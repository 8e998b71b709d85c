"""The packaged rewards: is the boxed answer right, and has the response the asked-for form?"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.rewards.extract import MAX_RESPONSE_CHARS, completion_text, extract_answer
from cppo.rewards.match import compare_answers
from cppo.rewards.worker import Unfinished, shared_pool

logger = logging.getLogger(__name__)

DEFAULT_BUDGET_SECONDS = 60.0

_OPENING, _CLOSING = "<think>", "</think>"
_Case = tuple[str, str, tuple[str, ...]]


def get_accuracy_reward(tolerance: float = 0.0, budget: float = DEFAULT_BUDGET_SECONDS) -> Callable[..., list[float]]:
    """`accuracy_reward` with its options.

    Args:
        tolerance: how far a number may lie from the expected one, as a fraction of the latter.
        budget: seconds by the clock for one call. Answers that are not compared by then count as wrong.

    Raises UserError for a tolerance outside [0, 1), or a budget that is not positive.
    """
    if not 0 <= tolerance < 1:
        raise UserError(f"tolerance = {tolerance:g} must be in [0, 1)")
    if not budget > 0:
        raise UserError(f"budget = {budget:g} must be more than 0 seconds")

    def accuracy_reward(
        completions: Sequence[Any],
        answer: Sequence[Any],
        choices: Sequence[Sequence[str] | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        r"""1.0 for each completion whose last `\boxed{...}` equals its answer (`answers_match`), else 0.0.

        Distinct answers are compared in parallel, by as many checkers as there are cores. An answer that takes more
        than 3 seconds of processor time, or is not compared within `budget`, gets 0.0; their number is the metric
        `rewards/accuracy_reward/unfinished`, and a warning.

        completions: texts or chats, B of them. answer: the B expected answers; numbers are taken as their text, lists
        as the answers that are accepted. choices: of multiple-choice questions the texts of the options; of others None
        or none. log_metric: TRL's. The other columns that TRL passes are ignored. Raises UserError if the answers do
        not fit the completions.
        """
        if len(answer) != len(completions):
            raise UserError(
                f"accuracy_reward: {len(completions)} completions, but {len(answer)} values in column 'answer'"
            )
        options = [()] * len(answer) if choices is None else [tuple(row or ()) for row in choices]
        cases = []
        for row, (completion, expected) in enumerate(zip(completions, answer, strict=True)):
            if expected is None:
                raise UserError(f"accuracy_reward: completion {row} has no answer; fill column 'answer'")
            cases.append((extract_answer(completion_text(completion)) or "", _expected_text(expected), options[row]))
        verdicts = _verdicts(list(dict.fromkeys(cases)), tolerance, time.monotonic() + budget)
        unfinished = sum(verdicts[case] is None for case in cases)
        if unfinished:
            logger.warning(
                "accuracy_reward: %d of %d answers took too long to compare, and count as wrong", unfinished, len(cases)
            )
        if log_metric is not None:
            log_metric("rewards/accuracy_reward/unfinished", float(unfinished))
        return [float(verdicts[case] or False) for case in cases]

    return accuracy_reward


def _expected_text(expected: Any) -> str:
    """The text of an expected answer; a list of accepted ones is written as JSON."""
    return json.dumps(list(map(str, expected))) if isinstance(expected, list | tuple) else str(expected)


def _verdicts(cases: Sequence[_Case], tolerance: float, deadline: float) -> dict[_Case, bool | None]:
    """Whether each answer is right, in parallel; None for one that was stopped."""

    def verdict(case: _Case) -> bool | None:
        given, expected, choices = case
        with contextlib.suppress(Unfinished):
            return compare_answers(given, expected, tolerance=tolerance, choices=choices, deadline=deadline)
        return None

    if len(cases) == 1:
        return {cases[0]: verdict(cases[0])}
    with ThreadPoolExecutor(shared_pool().size) as threads:
        return dict(zip(cases, threads.map(verdict, cases), strict=True))


accuracy_reward = get_accuracy_reward()


def get_format_reward(form: str = "strict", before: str | None = None) -> Callable[..., list[float]]:
    r"""The reward for the asked-for form: 1.0 for each completion that has it, else 0.0.

    form:
        "strict": after leading white space the text begins with `<think>`. `<think>` and `</think>` each occur exactly
        once, in this order. A `\boxed{...}` with balanced braces that is not empty follows. Other text may stand around
        the box. A text of more than 1,000,000 characters gets 0.0.
        "published": the whole text matches `<think>.*</think>.*\boxed\{.*\}.*`, where the dot matches every character
        (the code beside arXiv 2601.00501). No white space leads. Further tags, an empty box and one whose braces do
        not balance pass.

    before:
        the name of a tag: "strict" then asks for `<NAME>...</NAME>` in front, after white space at most, once and not
        empty, such as the description of Vision-SR1.

    Tags are case-sensitive. Both take time linear in the text. Raises UserError for another form, or another name.
    """
    if form not in _FORMS:
        raise UserError(f"form = {form!r} is unknown; {choose_one(str(form), list(_FORMS))}")
    if before is not None and not (form == "strict" and isinstance(before, str) and before.isidentifier()):
        raise UserError(f"before = {before!r}: give the name of a tag, such as `description`, with the form `strict`")
    has_form = _FORMS[form] if before is None else partial(_is_strict_after, before)

    def format_reward(
        completions: Sequence[Any], prompt_opens: Sequence[str] | None = None, **kwargs: Any
    ) -> list[float]:
        """1.0 for each completion of the form, else 0.0.

        completions: texts or chats, B of them. prompt_opens: what each one's prompt opens of the form (some chat
        templates write `<think>` themselves); it counts where the completion does not open its own. The other columns
        that TRL passes are ignored.
        """
        texts = [completion_text(completion) for completion in completions]
        begun = prompt_opens or [""] * len(texts)
        return [
            float(has_form(text) or (bool(start) and has_form(start + text)))
            for text, start in zip(texts, begun, strict=True)
        ]

    return format_reward


def _is_strict(text: str) -> bool:
    if len(text) > MAX_RESPONSE_CHARS or not text.lstrip().startswith(_OPENING):
        return False
    if text.count(_OPENING) != 1 or text.count(_CLOSING) != 1:
        return False
    return bool(extract_answer(text.partition(_CLOSING)[2]))


def _is_strict_after(name: str, text: str) -> bool:
    opening, closing = f"<{name}>", f"</{name}>"
    if len(text) > MAX_RESPONSE_CHARS or not text.lstrip().startswith(opening):
        return False
    block, _, rest = text.partition(closing)
    once = text.count(opening) == 1 == text.count(closing)
    return once and bool(block.partition(opening)[2].strip()) and _is_strict(rest)


def _is_published(text: str) -> bool:
    """What a backtracking regular expression would find out in up to cubic time: each part after the one before."""
    place = 0 if text.startswith(_OPENING) else -1
    for part in (_OPENING, _CLOSING, "\\boxed{", "}"):
        if place < 0 or (place := text.find(part, place)) < 0:
            return False
        place += len(part)
    return True


_FORMS = {"strict": _is_strict, "published": _is_published}

format_reward = get_format_reward()
