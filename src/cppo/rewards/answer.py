"""The packaged rewards: the boxed answer is right, and the response has the required form."""

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
        tolerance: allowed error of a number, as a fraction of the expected number.
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
        r"""1.0 for each completion with a last `\boxed{...}` equal to its answer (`answers_match`), else 0.0.

        Distinct answers are compared in parallel, by one checker per core. An answer gets 0.0 if it takes more than 3
        seconds of processor time, or is not compared within `budget`. The number of such answers is the metric
        `rewards/accuracy_reward/unfinished`, and a warning.

        Args:
            completions: B texts or chats.
            answer: the B expected answers; numbers count as their text, lists as alternative accepted answers.
            choices: texts of a multiple-choice question's options; for other questions None or none.
            log_metric: TRL's. Other columns from TRL are ignored.

        Raises UserError if the answers do not fit the completions.
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
    """The text of an expected answer; a list of accepted ones as JSON."""
    return json.dumps(list(map(str, expected))) if isinstance(expected, list | tuple) else str(expected)


def _verdicts(cases: Sequence[_Case], tolerance: float, deadline: float) -> dict[_Case, bool | None]:
    """Whether each answer is right, in parallel; None for a stopped comparison."""

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
    r"""The reward for the required form: 1.0 for each completion that has it, else 0.0.

    form:
        "strict": after leading white space the text begins with `<think>`. `<think>` and `</think>` each occur exactly
        once, in this order. A `\boxed{...}` follows, not empty and with balanced braces, with any text around it. A
        text of more than 1,000,000 characters gets 0.0.
        "published": the whole text matches `<think>.*</think>.*\boxed\{.*\}.*`, where the dot matches every character
        (the code of arXiv 2601.00501). No white space leads. Further tags, an empty box and unbalanced braces pass.

    before:
        the name of a tag. "strict" then requires one `<NAME>...</NAME>` in front, not empty, after white space only,
        such as the description of Vision-SR1.

    Tags are case-sensitive. Both forms take time linear in the text. Raises UserError for another form, or another
    name.
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

        completions: B texts or chats. prompt_opens: the part of the form that each prompt opens (some chat templates
        write `<think>` themselves); it counts if the completion does not open its own. Other columns from TRL are
        ignored.
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
    """As the regular expression, but in linear time: each part is searched after the one before."""
    place = 0 if text.startswith(_OPENING) else -1
    for part in (_OPENING, _CLOSING, "\\boxed{", "}"):
        if place < 0 or (place := text.find(part, place)) < 0:
            return False
        place += len(part)
    return True


_FORMS = {"strict": _is_strict, "published": _is_published}

format_reward = get_format_reward()
