"""What a completion says, and the answer in it: one pass over text that may be hostile."""

import re
from collections.abc import Sequence
from typing import Any

MAX_RESPONSE_CHARS = 1_000_000

_BRACE = re.compile(r"(?P<boxed>\\boxed\s*\{)|(?P<escaped>\\[{}])|(?P<open>\{)|(?P<close>\})")


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or of a chat the content of the last message (text parts joined)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else ""


def extract_answer(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance, stripped; None if there is none.

    Of nested boxes the inner one is the last. `\{` and `\}` are no braces. One pass, linear in the length; a
    text of more than 1,000,000 characters counts as having no answer.
    """
    if len(text) > MAX_RESPONSE_CHARS:
        return None
    open_braces: list[tuple[int, int] | None] = []
    last: tuple[int, int, int] = (-1, 0, 0)
    for match in _BRACE.finditer(text):
        if match["boxed"]:
            open_braces.append(match.span())
        elif match["open"]:
            open_braces.append(None)
        elif match["close"] and open_braces and (box := open_braces.pop()) is not None:
            last = max(last, (box[0], box[1], match.start()))
    return None if last[0] < 0 else text[last[1] : last[2]].strip()
