"""Do two answers mean the same? Text from a model is hostile: never evaluated, and every step bounded in time.

Plain words, options and numbers are compared here, exactly; other mathematics goes to math-verify in a separate process
that is killed when it takes too long (`worker.py`).
"""

import functools
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from cppo.rewards.extract import extract_answer
from cppo.rewards.quantity import Quantity, read_quantity, same_quantity
from cppo.rewards.worker import Unfinished, shared_pool

MAX_ANSWER_CHARS = 1_000
DEFAULT_TIMEOUT_SECONDS = 3.0

_Equivalent = Callable[[str, str], bool]

_MATH_DELIMITER = re.compile(r"\\[()\[\]]|(?<!\\)\$")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|quad)(?![a-zA-Z])")
_OPTION_LETTER = re.compile(r"\(([a-z])\)|([a-z])[):]?")
_LABELLED = re.compile(r"(?:\(([a-z])\)|([a-z])[).:])\s*(\S.*)")
_OTHER_LABEL = re.compile(r"(?:^|[\s,;/])(?:\([a-z]\)|[a-z][).:](?:\s|$))|\b(?:or|and)\s+\(?[a-z]\)?(?:\W|$)")
_LOOKS_MATHEMATICAL = re.compile(r"[0-9\\^+*/=<>]")
_SPLIT_DIGITS = re.compile(r"[0-9]\s+[0-9]")
_ALTERNATIVES = re.compile(r"\b(?:or|and)\b|;")
_JOINING_HYPHEN = re.compile(r"(?<=[^\W\d_])[-_](?=[^\W\d_])")
_LOOKALIKES = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff05": "%", "\u00a0": " ", "\u202f": " "})
_TRUTH = {"yes": True, "true": True, "no": False, "false": False}
_ARTICLES = {"a", "an", "the"}
_QUOTES = "\"'\u2018\u2019\u201c\u201d"


def answers_match(
    given: str,
    expected: str,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    *,
    tolerance: float = 0.0,
    choices: Sequence[str] = (),
) -> bool:
    r"""Whether two answers mean the same.

    In this order:

    1. equal text, after dropping math delimiters, `\text{}` and its kin, `\left`, spacing commands, a full stop at the
       end and case;
    2. an option, by letter (`B` = `(B)` = `B.` = `B)`), by letter and text (`B. blue`), or, where `choices` are known,
       by text alone. An answer with two options is none;
    3. yes and no, which are the same as true and false;
    4. two numbers, exactly: integers, decimals, `1,000`, `1e3`, `a/b`, `\frac{a}{b}`, `1 1/2`, percent, where the sign
       may be left out on one side (`50%` equals `0.5` and `50`), and units, which must be the same if both sides have
       one and are not converted (`12 cm` = `12 centimeters` = `12`);
    5. words: equal but for articles, hyphens, quotation marks and commas;
    6. other mathematics (expressions, intervals, sets, tuples, equations) by math-verify, within `timeout` seconds of
       its processor time (to start its process, once, comes on top), False when it takes longer.

    Answers of more than 1,000 characters are compared as text alone, words are never taken for products of variables,
    and alternatives (`5 or 6`) never equal one of them. A `\boxed{}` around either side is opened first.

    Args:
        given: the model's answer.
        expected: the true one.
        timeout: seconds of processor time.
        tolerance: how far a number may lie from the expected one, as a fraction of the latter.
        choices: texts of the options A, B, ... of a multiple-choice question.
    """
    try:
        return compare_answers(given, expected, timeout, tolerance=tolerance, choices=choices)
    except Unfinished:
        return False


def compare_answers(
    given: str,
    expected: str,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    *,
    tolerance: float = 0.0,
    choices: Sequence[str] = (),
    deadline: float = float("inf"),
) -> bool:
    """As `answers_match`, but raises `Unfinished` for a comparison that was stopped.

    deadline: reading of `time.monotonic()` by which math-verify must have answered.
    """
    equivalent = functools.partial(shared_pool().equivalent, timeout=timeout, deadline=deadline)
    if max(len(given), len(expected)) > MAX_ANSWER_CHARS:
        return bool(given.strip()) and given.strip() == expected.strip()
    given_latex, expected_latex = _bare_latex(given), _bare_latex(expected)
    given, expected = _plain_text(given_latex), _plain_text(expected_latex)
    if not given or not expected or given == expected:
        return given == expected != ""
    texts = [_plain_text(_bare_latex(choice)) for choice in choices]
    option = _option(expected, texts)
    if option is not None:
        chosen = _option(given, texts)
        if chosen is not None:
            return chosen == option
        text = texts[option] if option < len(texts) else _label_text(expected)
        return text is not None and _same(given, text, given_latex, text, equivalent, tolerance)
    if _option(given, texts) is not None and (label_text := _label_text(given)) is not None:
        return _same(label_text, expected, label_text, expected_latex, equivalent, tolerance)
    return _same(given, expected, given_latex, expected_latex, equivalent, tolerance)


def names_choice(answer: str, choices: Sequence[str]) -> bool:
    """Whether an answer names one of the options of a multiple-choice question, by letter or text."""
    option = _option(_plain_text(_bare_latex(answer)), [_plain_text(_bare_latex(choice)) for choice in choices])
    return option is not None and option < len(choices)


def answer_number(answer: str) -> Fraction | None:
    """The number that an answer is, all of it but its unit; None where it is no number."""
    quantity = read_quantity(_plain_text(_bare_latex(answer)))
    return None if quantity is None else quantity.value


def answer_kind(expected: str) -> str:
    """How `answers_match` compares with an expected answer.

    "option letter", "yes or no", "number", "mathematics" or "text".
    """
    plain = _plain_text(_bare_latex(expected))
    if _option(plain, ()) is not None:
        return "option letter"
    if plain in _TRUTH:
        return "yes or no"
    if read_quantity(plain) is not None:
        return "number"
    return "mathematics" if _is_mathematical(plain) and len(expected) <= MAX_ANSWER_CHARS else "text"


def _same(
    given: str, expected: str, given_latex: str, expected_latex: str, equivalent: _Equivalent, tolerance: float
) -> bool:
    """Steps 3 to 6 of `answers_match`."""
    if given in _TRUTH and expected in _TRUTH:
        return _TRUTH[given] == _TRUTH[expected]
    quantities: list[Quantity | None] = [read_quantity(side) for side in (given, expected)]
    if quantities[0] is not None and quantities[1] is not None:
        return same_quantity(quantities[0], quantities[1], tolerance)
    if not all(map(_LOOKS_MATHEMATICAL.search, (given, expected))):
        return _words(given) == _words(expected) != ""
    if not (_is_mathematical(given) and _is_mathematical(expected)):
        return False
    if _ALTERNATIVES.search(given) and not _ALTERNATIVES.search(expected):
        return False
    return equivalent(given_latex, expected_latex)


def _is_mathematical(plain: str) -> bool:
    return bool(_LOOKS_MATHEMATICAL.search(plain)) and not _SPLIT_DIGITS.search(plain)


def _bare_latex(text: str) -> str:
    """Without a surrounding box and without math delimiters, which could make a parser read only a part."""
    boxed = extract_answer(text)
    text = text if boxed is None else boxed
    return " ".join(_MATH_DELIMITER.sub(" ", text.translate(_LOOKALIKES)).split())


def _plain_text(latex: str) -> str:
    text = _TEXT_COMMAND.sub(r" \1", _TEXT_COMMAND.sub(r" \1", latex))
    text = " ".join(_SPACING.sub(" ", text.replace("{,}", ",")).split())
    return text.casefold().removesuffix(".").rstrip()


def _option(plain: str, texts: Sequence[str]) -> int | None:
    """Which option, from 0, an answer is: by letter, by letter and text (which must agree), or by one of `texts`."""
    if match := _OPTION_LETTER.fullmatch(plain):
        return string.ascii_lowercase.index(match[1] or match[2])
    match = _LABELLED.fullmatch(plain)
    if match and not _OTHER_LABEL.search(match[3]) and not _OPTION_LETTER.fullmatch(match[3]):
        letter = string.ascii_lowercase.index(match[1] or match[2])
        agrees = letter >= len(texts) or _words(match[3]) == _words(texts[letter])
        return letter if agrees else None
    same = [index for index, text in enumerate(texts) if _words(plain) == _words(text)]
    return same[0] if len(same) == 1 else None


def _label_text(plain: str) -> str | None:
    match = _LABELLED.fullmatch(plain)
    return match[3] if match else None


def _words(plain: str) -> str:
    text = _JOINING_HYPHEN.sub(" ", unicodedata.normalize("NFKC", plain).strip(_QUOTES))
    words = [word.rstrip(",;:!?.") for word in text.split()]
    return " ".join(word for word in words if word and word not in _ARTICLES) or " ".join(words)
