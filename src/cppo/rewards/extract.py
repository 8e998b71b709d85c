"""Texts of completions, their answers, and a data set's accepted answers: one pass over hostile text."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

MAX_RESPONSE_CHARS = 1_000_000

MAX_GOLD_CHARS = 100_000
"""A wrapped answer is at the end of an expected text; only this many characters are searched."""

_GOLD_WRAPPERS = (
    re.compile(r"<answer>((?:[^<]|<(?!/?answer>))*+)</answer>", re.IGNORECASE),
    re.compile(r"<\|begin_of_box\|>((?:[^<]|<(?!\|end_of_box))*+)<\|end_of_box\|>"),
    re.compile(r"(?:^|\n)\s*####[ \t]*([^\n]+)"),
)
_LISTED = re.compile(r"\[\s*[\"']")
_BRACE = re.compile(r"(?P<boxed>\\boxed\s*\{)|(?P<escaped>\\[{}])|(?P<open>\{)|(?P<close>\})")


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the content of a chat's last message (text parts joined)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else ""


def extract_answer(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, stripped; None if there is none, or its braces do not balance.

    If text follows `</think>`, only that text counts. With nested boxes the inner one is the last. `\{` and `\}` are no
    braces. One pass, linear in the length; a text of more than 1,000,000 characters counts as having no answer.
    """
    if len(text) > MAX_RESPONSE_CHARS:
        return None
    said = text.rpartition("</think>")[2]
    text = said if said.strip() else text
    start = max((match.start() for match in _BRACE.finditer(text) if match["boxed"]), default=-1)
    if start < 0:
        return None
    depth, begin = 0, start
    for match in _BRACE.finditer(text, start):
        depth += match.lastgroup in ("boxed", "open")
        depth -= match.lastgroup == "close"
        if match["boxed"]:
            begin = match.end()
        if depth == 0:
            return text[begin : match.start()].strip()
    return None


def accepted_answers(expected: str) -> list[str]:
    r"""The accepted answers in a data set's expected text; one, unless the text is a list.

    These wrappers are opened: text after `</think>`, `<answer>5</answer>`, `#### 5` at the end of a solution, GLM's
    `<|begin_of_box|>`, and lists of texts in JSON or Python. Each element of a list is accepted; in a list of option
    letters all are required.
    """
    text = expected.rpartition("</think>")[2].strip() or expected.strip()
    for opened in (form.findall(text[-MAX_GOLD_CHARS:]) for form in _GOLD_WRAPPERS):
        if opened and opened[-1].strip():
            text = opened[-1].strip()
    several = _texts(text) if _LISTED.match(text) and text.endswith("]") else None
    if not several:
        return [text]
    letters = [one.strip() for one in several if len(one.strip()) == 1 and one.strip().isalpha()]
    return [", ".join(letters)] if len(letters) == len(several) > 1 else several


def _texts(listed: str) -> list[str] | None:
    """The texts of a list in JSON or Python; None for a list of anything else, such as an interval."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(listed)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) and found and all(isinstance(one, str) for one in found) else None
    return None
