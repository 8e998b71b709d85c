"""Whether a response states the visual facts of its row (Perception-R1, arXiv 2506.07218): by a judge, or by words."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.imports import import_object
from cppo.rewards.extract import MAX_RESPONSE_CHARS, completion_text
from cppo.rewards.judge import Judge, Messages, log_verdicts

INSTRUCTION = (
    "<info1> is a list of facts, <info2> a text. Say of each fact whether the text states it, in these or other words; "
    "not whether it is true. Reply with a JSON list of {} numbers and nothing else: 1 where it is stated, 0 where not."
)
_TAG = re.compile(r"</?info[12]>")


def get_facts_reward(judge: str | None = None, model: str | None = None, **options: Any) -> Callable[..., Any]:
    """The reward for the share of a row's facts that the response states.

    Args:
        judge: the endpoint of a judge, see `Judge`. Without a judge, a response states a fact if it has the fact's
            words side by side, in any case.
        model: the judge's name there.
        options: further ones of `Judge`.

    Raises:
        UserError: options of a judge without one, or a judge without a model.
    """
    if judge is None and (model is not None or options):
        raise UserError(f"{', '.join([*(['model'] if model else []), *options])} needs judge, the endpoint of one")
    if judge is not None and model is None:
        raise UserError("judge needs model, the judge's name at the endpoint")
    known = list(inspect.signature(Judge).parameters)[2:]
    for name in options:
        if name not in known:
            raise UserError(f"{name!r} is no option of a judge; {choose_one(name, known)}")
    asked = None if judge is None else Judge(judge, str(model), **options)

    def facts_reward(
        completions: Sequence[Any],
        facts: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """The share of each row's facts that its completion states, in [0, 1]; None for a row without facts.

        A completion of more than 1,000,000 characters states none, as does one with a failed judge.

        Args:
            completions: B texts or chats.
            facts: each row's, a list of texts, or a JSON list as text.
            log_metric: TRL's.

        Raises UserError for facts that are not texts.
        """
        texts = [completion_text(completion) for completion in completions]
        listed = [_listed(own, row) for row, own in enumerate(facts)]
        if asked is None:
            stated = [_stated(own, text) for own, text in zip(listed, texts, strict=True)]
        else:
            stated = _judged(asked, listed, texts, log_metric)
        return [found / (len(own) + 1e-6) if own else None for found, own in zip(stated, listed, strict=True)]

    return facts_reward


def get_word_repetition_reward(ngram_size: int = 20, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """TRL's repetition penalty over words, in any case, instead of tokens: `max_penalty` (1 - distinct / all n-grams).

    0 for fewer than `ngram_size` words. Raises ValueError as TRL's does.
    """
    get_penalty = import_object("trl.rewards:get_repetition_penalty_reward", "word_repetition")
    penalty = get_penalty(ngram_size=ngram_size, max_penalty=max_penalty)

    def word_repetition_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """The penalty of each completion; texts or chats. Words beyond the 1,000,000th character do not count."""
        texts = [completion_text(completion)[:MAX_RESPONSE_CHARS] for completion in completions]
        return list(penalty(completion_ids=[text.lower().split() for text in texts]))

    return word_repetition_reward


def _listed(facts: Any, row: int) -> list[str]:
    if isinstance(facts, str):
        try:
            facts = json.loads(facts) if facts.strip() else []
        except (ValueError, RecursionError):
            facts = [facts]
    facts = [] if facts is None else facts
    if not isinstance(facts, list | tuple) or not all(isinstance(one, str) and one.strip() for one in facts):
        raise UserError(f"facts_reward: column 'facts' of completion {row}: give a list of texts that are not empty")
    return list(facts)


def _stated(facts: list[str], text: str) -> int:
    if not facts or len(text) > MAX_RESPONSE_CHARS:
        return 0
    said = f" {_words(text)} "
    return sum(f" {_words(fact)} " in said for fact in facts)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _judged(
    judge: Judge, facts: list[list[str]], texts: list[str], log_metric: Callable[[str, float], None] | None
) -> list[int]:
    """Number of each row's facts that the judge finds; 0 if it fails, or replies with anything except the list."""
    rows = [row for row, own in enumerate(facts) if own]
    verdicts = judge.ask([_request(facts[row], texts[row]) for row in rows])
    stated, unread = [0] * len(facts), 0
    for row, verdict in zip(rows, verdicts, strict=True):
        marks = None if verdict.text is None else _marks(verdict.text, len(facts[row]))
        unread += verdict.text is not None and marks is None
        stated[row] = sum(marks or ())
    log_verdicts(verdicts, unread, log_metric)
    return stated


def _request(facts: list[str], text: str) -> Messages:
    listed = json.dumps(facts, ensure_ascii=False)
    content = f"<info1>{_TAG.sub(' ', listed)}</info1>\n<info2>{_TAG.sub(' ', text)}</info2>"
    return [{"role": "system", "content": INSTRUCTION.format(len(facts))}, {"role": "user", "content": content}]


def _marks(reply: str, count: int) -> list[int] | None:
    """A reply as its list of 0 and 1, of this length; None for any other reply."""
    try:
        marks = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    right = isinstance(marks, list) and len(marks) == count and all(type(one) is int and one in (0, 1) for one in marks)
    return marks if right else None
