"""What a response to a benchmark's question says, by rule: an option's letter, a number, yes or no.

Text from a model is hostile: it is searched with patterns that take linear time, and never evaluated.
"""

import ast
import math
import re
import string
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from cppo.errors import UserError
from cppo.rewards import answer_number, answers_match, extract_answer

MAX_SEARCHED_CHARS = 10_000
"""Limit for an answer without a box; only its end is searched."""
MAX_LIST_CHARS = 20_000
LETTERS_NEAR_THE_END = 5
LABEL_LETTERS = "ABCDEFGH"

_THOUGHT = "</think>"
_MARKUP = re.compile(r"\\(?:text|math)[a-z]{0,2}\b|[*$`{}]|\\[()\[\]]")
_ONE_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_LABEL = re.compile(r"\(([A-Z])\)|([A-Z])[).:](?:\s|$)")
_SAID = re.compile(
    r"\b(?i:answer|option|choice)(?:\s(?i:is|would be|should be))?\s?:?\s?\(?(A(?!\s[a-z])|[B-Z])\b(?!')"
)
_WORD_OF_ITS_OWN = re.compile(r"\b[AI](?=\s(?!or\b|and\b)[a-z])")
"""An article or a pronoun: a sentence follows it, so it is no option's letter."""
_WORD_BREAKS = re.compile(r"[^\w+-]+")
_NUMBER = re.compile(r"-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?|\.[0-9]+)")
_PI = re.compile(r"(-?[0-9.]*)\s?(?:\\pi|π)")
_LABELS = re.compile(r"[A-Z0-9](?:\s?(?:[,;&]|\band\b|\s)\s?[A-Z0-9])*|[A-H]{2,5}")


def final_answer(response: str) -> str:
    r"""The last `\boxed{}` of a response; without one, the text after its thoughts; without thoughts, its end."""
    boxed = extract_answer(response)
    answer = response[-MAX_SEARCHED_CHARS:].rpartition(_THOUGHT)[2] if boxed is None else boxed[-MAX_SEARCHED_CHARS:]
    return answer.strip()


def option_letter(answer: str, letters: str, texts: Sequence[str] = ()) -> str | None:
    """The option that an answer names, one of `letters`; None if it names none, or several.

    The rules are tried in this order:

    - the answer is a letter or begins with one as a label (`(B)`, `B. blue`);
    - it says "answer is B"; the last time counts;
    - exactly one letter stands alone, among its last five words;
    - it is one of `texts`, the options' texts;
    - it holds exactly one of them, and is not twice as long as all of them together.
    """
    plain = " ".join(_MARKUP.sub(" ", answer).split())
    if (found := _ONE_LETTER.fullmatch(plain)) or (found := _LABEL.match(plain)):
        letter = next(filter(None, found.groups())).upper()
        if letter in letters:
            return letter
    if said := [letter for letter in _SAID.findall(plain) if letter in letters]:
        return said[-1]
    words = _WORD_BREAKS.split(_WORD_OF_ITS_OWN.sub(" ", plain).strip(string.punctuation + " "))
    alone = {word for word in words if len(word) == 1 and word in letters}
    if len(alone) == 1 and alone & set(words[-LETTERS_NEAR_THE_END:]):
        return alone.pop()
    given, options = plain.casefold(), [" ".join(_MARKUP.sub(" ", text).split()).casefold() for text in texts]
    named = [letter for letter, text in zip(letters, options, strict=False) if text == given]
    if not named and len(given) <= 2 * sum(map(len, options)):
        named = [letter for letter, text in zip(letters, options, strict=False) if text and _stands_in(text, given)]
    return named[0] if len(named) == 1 and not alone else None


def option_labels(answer: str) -> str:
    """The labels, letters or digits, in an answer ("B, D", "BD", "3"), sorted; else its one letter; else ""."""
    plain = " ".join(_MARKUP.sub(" ", answer).split()).strip("(). ")
    if _LABELS.fullmatch(plain):
        return "".join(sorted(set(re.sub(r"and|[^A-Z0-9]", "", plain))))
    return option_letter(answer, LABEL_LETTERS) or ""


def number(answer: str) -> float | None:
    """The answer as a number, without its unit; else the last number in it; None if there is none."""
    plain = " ".join(_MARKUP.sub(" ", answer.replace("{,}", ",")).split())
    if (multiple := _PI.fullmatch(plain)) is not None:
        factor = _float(multiple[1] or "1")
        return None if factor is None else factor * math.pi
    if (value := answer_number(answer)) is not None:
        return _float(value)
    found = _NUMBER.findall(plain)
    return _float(found[-1].replace(",", "")) if found else None


def yes_or_no(answer: str) -> str | None:
    """ "yes" or "no" if exactly one of them is among an answer's words; else None."""
    said = {"yes", "no"} & set(_WORD_BREAKS.split(answer.lower()))
    return said.pop() if len(said) == 1 else None


@lru_cache(maxsize=100_000)
def same_answer(answer: str, expected: str) -> bool:
    """`answers_match`, cached by pair: samples repeat each other, and symbolic comparisons are slow."""
    return answers_match(answer, expected)


def text_list(cell: str) -> tuple[str, ...]:
    """The texts of a Python list in one string. Raises UserError for anything else."""
    try:
        value = ast.literal_eval(cell) if len(cell) <= MAX_LIST_CHARS else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or len(value) > len(string.ascii_uppercase):
        raise UserError(f"options must be a Python list of at most 26 texts, found {cell!r:.60}")
    return tuple(str(one) for one in value)


def _stands_in(text: str, given: str) -> bool:
    """Whether another text contains this text as whole words or numbers."""
    return re.search(rf"(?<![\w.-]){re.escape(text)}(?!\w|\.\d)", given) is not None


def _float(number: str | Fraction) -> float | None:
    try:
        value = float(number)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
