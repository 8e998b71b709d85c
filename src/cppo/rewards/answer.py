"""Is the boxed answer right? Text from a model is hostile: never evaluated, and every step bounded in time.

Plain words, option letters and numbers are compared here, exactly; other mathematics goes to math-verify in a
separate process that is killed when it takes too long (`worker.py`).
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from cppo.errors import UserError

from .worker import shared_worker

MAX_RESPONSE_CHARS = 1_000_000
MAX_ANSWER_CHARS = 1_000
MAX_NUMBER_CHARS = 60
DEFAULT_TIMEOUT_SECONDS = 3.0

_BRACE = re.compile(r"(?P<boxed>\\boxed\s*\{)|(?P<escaped>\\[{}])|(?P<open>\{)|(?P<close>\})")
_MATH_DELIMITER = re.compile(r"\\[()\[\]]|(?<!\\)\$")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|quad)(?![a-zA-Z])")
_OPTION_LETTER = re.compile(r"\(([a-z])\)|([a-z])[):]?")
_LOOKS_MATHEMATICAL = re.compile(r"[0-9\\^+*/=<>]")
_SPLIT_DIGITS = re.compile(r"[0-9]\s+[0-9]")
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?(?:(?:(?P<whole>[0-9]+)\s?)?\\[dt]?frac\{{\s?(?P<a>{_DECIMAL})\s?\}}\{{\s?(?P<b>{_DECIMAL})\s?\}}"
    rf"|(?:(?P<mixed>[0-9]+)\s)?(?P<c>{_DECIMAL})\s?/\s?(?P<d>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL}))\s?(?P<percent>\\?%)?"
)
_LOOKALIKES = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff05": "%", "\u00a0": " ", "\u202f": " "})


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


def answers_match(given: str, expected: str, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> bool:
    r"""Whether two answers mean the same.

    In this order: (1) equal text, after dropping math delimiters, `\text{}` and its kin, `\left`, spacing
    commands, a full stop at the end and case; (2) a single option letter, `B` = `(B)` = `B.` = `B)`; (3) two
    numbers, exactly: integers, decimals, `1,000`, `1e3`, `a/b`, `\frac{a}{b}`, `1 1/2`, and percent, where
    the sign may be left out on one side (`50%` equals `0.5` and `50`); (4) other mathematics by math-verify,
    within `timeout` seconds (the time to start its process, once, comes on top), False when it takes longer.
    Answers of more than 1,000 characters are compared as text alone, and words are never taken for products
    of variables. A `\boxed{}` around either side is opened first.
    """
    if max(len(given), len(expected)) > MAX_ANSWER_CHARS:
        return bool(given.strip()) and given.strip() == expected.strip()
    given_latex, expected_latex = _bare_latex(given), _bare_latex(expected)
    given, expected = _plain_text(given_latex), _plain_text(expected_latex)
    if not given or not expected or given == expected:
        return given == expected != ""
    if (letter := _option_letter(expected)) is not None:
        return _option_letter(given) == letter
    given_number, expected_number = _number(given), _number(expected)
    if given_number is not None and expected_number is not None:
        return _same_number(given_number, expected_number)
    sides = (given, expected)
    if not all(map(_LOOKS_MATHEMATICAL.search, sides)) or any(map(_SPLIT_DIGITS.search, sides)):
        return False
    return shared_worker().equivalent(given_latex, expected_latex, timeout)


def answer_kind(expected: str) -> str:
    """How `answers_match` will compare with an expected answer: "number", "option letter", "mathematics" or "text"."""
    plain = _plain_text(_bare_latex(expected))
    if _option_letter(plain) is not None:
        return "option letter"
    if _number(plain) is not None:
        return "number"
    mathematical = _LOOKS_MATHEMATICAL.search(plain) and not _SPLIT_DIGITS.search(plain)
    return "mathematics" if mathematical and len(expected) <= MAX_ANSWER_CHARS else "text"


def accuracy_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    r"""1.0 for each completion whose last `\boxed{...}` equals its answer (`answers_match`), else 0.0.

    completions: texts or chats, B of them. answer: the B expected answers (numbers are taken as their text).
    The other columns that TRL passes are ignored. Raises UserError if the answers do not fit the completions.
    """
    if len(answer) != len(completions):
        raise UserError(f"accuracy_reward: {len(completions)} completions, but {len(answer)} values in column 'answer'")
    verdicts: dict[tuple[str, str], bool] = {}
    rewards = []
    for row, (completion, expected) in enumerate(zip(completions, answer, strict=True)):
        if expected is None:
            raise UserError(f"accuracy_reward: completion {row} has no answer; fill column 'answer'")
        pair = (extract_answer(completion_text(completion)) or "", str(expected))
        if pair not in verdicts:
            verdicts[pair] = answers_match(*pair)
        rewards.append(float(verdicts[pair]))
    return rewards


def _bare_latex(text: str) -> str:
    """Without a surrounding box and without math delimiters, which could make a parser read only a part."""
    boxed = extract_answer(text)
    text = text if boxed is None else boxed
    return " ".join(_MATH_DELIMITER.sub(" ", text.translate(_LOOKALIKES)).split())


def _plain_text(latex: str) -> str:
    text = _TEXT_COMMAND.sub(r"\1", _TEXT_COMMAND.sub(r"\1", latex))
    text = " ".join(_SPACING.sub(" ", text.replace("{,}", ",")).split())
    return text.casefold().removesuffix(".").rstrip()


def _option_letter(plain: str) -> str | None:
    match = _OPTION_LETTER.fullmatch(plain)
    return (match[1] or match[2]) if match else None


def _number(plain: str) -> tuple[Fraction, bool] | None:
    """Exact value and whether it carries a percent sign; None for anything but a plain, short number."""
    if len(plain) > MAX_NUMBER_CHARS or (match := _NUMBER.fullmatch(plain)) is None:
        return None
    if match["decimal"]:
        value = _decimal(match["decimal"])
    else:
        denominator = _decimal(match["b"] or match["d"])
        if denominator == 0:
            return None
        value = int(match["whole"] or match["mixed"] or 0) + _decimal(match["a"] or match["c"]) / denominator
    return (-value if match["sign"] == "-" else value), match["percent"] is not None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _same_number(given: tuple[Fraction, bool], expected: tuple[Fraction, bool]) -> bool:
    (a, a_percent), (b, b_percent) = given, expected
    if a == b:
        return True
    return a_percent != b_percent and (a / 100 if a_percent else a) == (b / 100 if b_percent else b)
