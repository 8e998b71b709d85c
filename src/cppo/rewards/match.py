"""Do two answers mean the same? Text from a model is hostile: never evaluated, and every step bounded in time.

Plain words, options, numbers and units are compared exactly here. Other mathematics is compared by math-verify, in
separate processes with a time limit (`worker.py`).
"""

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cppo.rewards.extract import accepted_answers, extract_answer
from cppo.rewards.options import labelled_last, letter_of, named_by_text, place_of, read_choice, without_label
from cppo.rewards.quantity import read_quantity, same_quantity
from cppo.rewards.spelling import spelled
from cppo.rewards.structure import MAX_PARTS, Parts, is_undone, read_parts, read_size, split_unit
from cppo.rewards.units import same_unit
from cppo.rewards.worker import Unfinished, shared_pool

MAX_ANSWER_CHARS = 1_000
DEFAULT_TIMEOUT_SECONDS = 3.0

_LOOKS_MATHEMATICAL = re.compile(r"[0-9\\^+*/=<>]")
_SPLIT_DIGITS = re.compile(r"[0-9]\s+[0-9]")
_ALTERNATIVES = re.compile(r"\b(?:or|and)\b|;")
_ALTERNATIVES_MEANT = re.compile(rf"{_ALTERNATIVES.pattern}|\\cup(?![a-zA-Z])")
_MANY_VALUED = re.compile(r"\\(?:pm|mp|cup|lor)(?![a-zA-Z])")
_NAMED = re.compile(r"(?P<name>[a-zA-Z](?:_\{?\w\}?)?)\s?(?:=|\\in(?![a-zA-Z]))\s?(?P<value>[^=<>,;]+|[(\[\\][^=<>;]*)")
_JOINING_HYPHEN = re.compile(r"(?<=[^\W\d_])[-_](?=[^\W\d_])")
_TRUTH = {"yes": True, "true": True, "no": False, "false": False}
_ARTICLES = {"a", "an", "the"}


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

    1. equal text in one spelling (`spelled`): without delimiters, `\text{}` and similar commands, emphasis, "the answer
       is", trailing punctuation; Unicode equals LaTeX; words match in any case;
    2. options, by letter (`B` = `(B)` = `Option B`), by letter and text (`B. blue`), several at once (`A, C` = `CA`),
       or, with `choices`, by text alone or before its letter (`blue (B)`). An answer that hedges (`A or B`) matches
       none;
    3. yes and no, which equal true and false;
    4. numbers, exactly: integers, decimals, `1,000`, `1e3`, `6\times 10^{23}`, `a/b`, `1 1/2`, percent and units. One
       side may lack the percent sign (`50%` equals `0.5` and `50`). Units must have the same size if both sides have
       one (`12 cm` = `12 centimeters` = `12`); numbers are not converted. Unfinished arithmetic (`3+4`) equals no
       number;
    5. lists in any order, tuples and sizes (`2 \times 3`) in their order, element by element;
    6. words: equal except for articles, hyphens, quotation marks and commas;
    7. other mathematics (expressions, intervals, sets, equations, inequalities) by math-verify, within `timeout`
       seconds of its processor time, without the one start of its process; False if it takes longer.

    Answers of more than 1,000 characters are compared only as text. Words are never products of variables. Alternatives
    (`5 or 6`) never equal one of them. A `\boxed{}` around either side is opened first, as are the wrappers of data
    sets around an expected answer (`accepted_answers`).

    Args:
        given: the model's answer.
        expected: the true one.
        timeout: seconds of processor time.
        tolerance: allowed error of a number, as a fraction of the expected number; also in closed forms (`9\pi` for
            28.27), tuples and equations.
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
    """As `answers_match`, but raises `Unfinished` for a stopped comparison.

    deadline: reading of `time.monotonic()` by which math-verify must have answered.
    """
    deadline = min(deadline, time.monotonic() + 20 * timeout)  # a list asks math-verify more than once
    comparison = _Comparison(timeout, tolerance, deadline)
    return any(comparison.right(given, accepted, choices) for accepted in accepted_answers(expected))


def names_choice(answer: str, choices: Sequence[str]) -> bool:
    """Whether an expected answer names one of the options of a multiple-choice question, by letter or text."""
    texts = _option_texts(choices)
    for accepted in accepted_answers(answer):
        text = _spelled(accepted)
        choice = read_choice(text)
        if choice is not None and not choice.hedged:
            places = [place_of(letter) for letter in choice.letters]
            known = all(place < len(texts) for place in places)
            return known and (choice.text is None or _same_words(choice.text, texts[places[0]]))
        if named_by_text(text, texts, _same_words) is not None:
            return True
    return False


def answer_number(answer: str) -> Fraction | None:
    """The answer as a number, without its unit; None if it is no number."""
    quantity = read_quantity(_spelled(answer)) if len(answer) <= MAX_ANSWER_CHARS else None
    return None if quantity is None else quantity.value


def answer_kind(expected: str) -> str:
    """How `answers_match` compares with an expected answer.

    "option letter", "yes or no", "number", "mathematics" or "text".
    """
    first = accepted_answers(expected)[0]
    plain = _spelled(first) if len(first) <= MAX_ANSWER_CHARS else first
    choice = read_choice(plain)
    if choice is not None and not choice.hedged:
        return "option letter"
    if plain.casefold() in _TRUTH:
        return "yes or no"
    if read_quantity(plain) is not None:
        return "number"
    return "mathematics" if _is_mathematical(plain) and len(first) <= MAX_ANSWER_CHARS else "text"


@dataclass(frozen=True)
class _Comparison:
    """The limits and the tolerance of one comparison; texts are in one spelling, except those of `right`."""

    timeout: float
    tolerance: float
    deadline: float

    def right(self, given: str, expected: str, choices: Sequence[str]) -> bool:
        """Whether an answer is right: steps 1 and 2 of `answers_match`, then `same`."""
        if max(len(given), len(expected)) > MAX_ANSWER_CHARS:
            return bool(given.strip()) and given.strip() == expected.strip()
        given, expected = _spelled(given), _spelled(expected)
        if not given or not expected:
            return False
        if given == expected:
            return True
        texts = _option_texts(choices)
        said, wanted = read_choice(given, loosely=True), read_choice(expected)
        if wanted is None and (place := named_by_text(expected, texts, _same_words)) is not None:
            wanted = read_choice(letter_of(place))
        if wanted is None:
            labelled = read_choice(given)
            if labelled is not None and labelled.text and not labelled.hedged:
                given = labelled.text
            return self.same(given, expected)
        place = place_of(min(wanted.letters))
        text = texts[place] if place < len(texts) else wanted.text
        if said is not None and said.text is None:
            in_words = text is not None and len(said.letters) > len(wanted.letters) == 1 and _same_words(given, text)
            return said.letters == wanted.letters or in_words
        if len(wanted.letters) > 1 or wanted.hedged:
            return False
        if said is None:
            others = [other for number, other in enumerate(texts) if number != place]
            if text is None:
                return False
            last = labelled_last(given)
            in_both = last is not None and last.letters == wanted.letters and _same_words(last.text or "", text)
            return in_both or self._names(given, text, others)
        if said.letters != wanted.letters or said.text is None:
            return False
        return _same_words(said.text, text) or self.same(said.text, text) if text else not said.hedged

    def _names(self, given: str, text: str, others: Sequence[str]) -> bool:
        """Whether an answer is an option's text, and not as well another's: "5" fits both "5 cm" and "5 m"."""
        if _same_words(given, text):
            return True
        quantity = read_quantity(given)
        ambiguous = quantity is not None and any(
            (other := read_quantity(one)) is not None and same_quantity(quantity, other, self.tolerance)
            for one in others
        )
        return not ambiguous and self.same(given, text)

    def same(self, given: str, expected: str, depth: int = 0) -> bool:
        """Steps 3 to 7 of `answers_match`."""
        if given == expected:
            return True
        if given.casefold() in _TRUTH and expected.casefold() in _TRUTH:
            return _TRUTH[given.casefold()] == _TRUTH[expected.casefold()]
        if not all(map(_LOOKS_MATHEMATICAL.search, (given, expected))):
            return _same_words(given, expected)
        given, expected = _without_name(given, expected)
        given_number, expected_number = read_quantity(given), read_quantity(expected)
        if given_number is not None and expected_number is not None:
            return same_quantity(given_number, expected_number, self.tolerance)
        if (given_number and is_undone(expected)) or (expected_number and is_undone(given)):
            return False
        sizes = read_size(given), read_size(expected)
        if sizes[0] is not None and sizes[1] is not None:
            return self._elementwise(sizes[0], sizes[1], depth)
        lists = read_parts(given), read_parts(expected)
        if depth < 3 and lists[0] is not None and lists[1] is not None:
            alike = _as_tuple(lists[0], lists[1]), _as_tuple(lists[1], lists[0])
            if alike[0].brackets == alike[1].brackets:
                return self._same_parts(*alike, depth)
        for parts, other in ((lists[0], expected), (lists[1], given)):
            bracketed = other[:1] in ("(", "[", "\\", "{") or _MANY_VALUED.search(other)
            alternatives = other is expected and _ALTERNATIVES.search(other)
            if parts is not None and not parts.brackets[0] and not (bracketed or alternatives):
                return False
        return self._same_mathematics(given, expected)

    def _same_parts(self, given: Parts, expected: Parts, depth: int) -> bool:
        if len(given.elements) != len(expected.elements):
            return False
        if self._elementwise(given.elements, expected.elements, depth):
            return True
        if expected.ordered or len(expected.elements) > MAX_PARTS:
            return False
        rest = list(given.elements)
        for element in expected.elements:
            found = next((place for place, one in enumerate(rest) if self.same(one, element, depth + 1)), None)
            if found is None:
                return False
            del rest[found]
        return True

    def _elementwise(self, given: Sequence[str], expected: Sequence[str], depth: int) -> bool:
        pairs = itertools.zip_longest(given, expected, fillvalue="")
        return all(self.same(one, other, depth + 1) for one, other in pairs)

    def _same_mathematics(self, given: str, expected: str) -> bool:
        (given_head, given_unit), (expected_head, expected_unit) = split_unit(given), split_unit(expected)
        if not same_unit(given_unit, expected_unit):
            return False
        if not (_is_mathematical(given_head) and _is_mathematical(expected_head)):
            return False
        if _ALTERNATIVES.search(given_head) and not _ALTERNATIVES_MEANT.search(expected_head):
            return False
        return shared_pool().equivalent(given_head, expected_head, self.timeout, self.deadline, self.tolerance)


def _without_name(given: str, expected: str) -> tuple[str, str]:
    """The values of "x = 5" and "x = 5", or of "x = 5" and "5"; other equations are unchanged."""
    names = [_NAMED.fullmatch(side) for side in (given, expected)]
    if names[0] and names[1] and names[0]["name"] != names[1]["name"]:
        return given, expected
    if all(name or "=" not in side for name, side in zip(names, (given, expected), strict=True)):
        return names[0]["value"] if names[0] else given, names[1]["value"] if names[1] else expected
    return given, expected


def _as_tuple(parts: Parts, other: Parts) -> Parts:
    """The bare list "x = 2, y = 3" as the tuple (2, 3) if the other side is one; else the list itself."""
    values = {named["name"]: named["value"] for one in parts.elements if (named := _NAMED.fullmatch(one))}
    if parts.brackets[0] or other.brackets[0] != "(" or len(values) < len(parts.elements):
        return parts
    return Parts(tuple(values[name] for name in sorted(values)), other.brackets)


def _is_mathematical(plain: str) -> bool:
    return bool(_LOOKS_MATHEMATICAL.search(plain)) and not _SPLIT_DIGITS.search(plain)


def _spelled(text: str) -> str:
    boxed = extract_answer(text)
    return spelled(text if boxed is None else boxed)


def _option_texts(choices: Sequence[str]) -> list[str]:
    return [without_label(_spelled(choice), place) for place, choice in enumerate(choices)]


def _same_words(one: str, other: str) -> bool:
    return _words(one) == _words(other) != ""


def _words(plain: str) -> str:
    text = _JOINING_HYPHEN.sub(" ", plain.casefold()).strip("\"'")
    words = [word.rstrip(",;:!?.").strip('"') for word in text.split()]
    return " ".join(word for word in words if word and word not in _ARTICLES) or " ".join(words)
