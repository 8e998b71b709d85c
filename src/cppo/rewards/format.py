"""Does the response have the asked-for form: thinking first, then a boxed answer?"""

from collections.abc import Sequence
from typing import Any

from cppo.rewards.extract import MAX_RESPONSE_CHARS, completion_text, extract_answer

_OPENING, _CLOSING = "<think>", "</think>"


def format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    r"""1.0 for each completion of the form `<think>...</think> ... \boxed{...}`, else 0.0.

    Precisely: after leading white space the text begins with `<think>`; `<think>` and `</think>` each occur
    exactly once in the whole text, in this order; and after `</think>` there is a `\boxed{...}` with balanced
    braces that is not empty. Text around the box is allowed. Tags are case-sensitive. A text of more than
    1,000,000 characters gets 0.0.

    completions: texts or chats, B of them. The other columns that TRL passes are ignored.
    """
    return [float(_is_well_formed(completion_text(completion))) for completion in completions]


def _is_well_formed(text: str) -> bool:
    if len(text) > MAX_RESPONSE_CHARS or not text.lstrip().startswith(_OPENING):
        return False
    if text.count(_OPENING) != 1 or text.count(_CLOSING) != 1:
        return False
    return bool(extract_answer(text.partition(_CLOSING)[2]))
