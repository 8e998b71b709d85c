"""Options of multiple-choice questions: by letter, by letter and text, several at once.

All texts are in one spelling (`spelled`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Letters = frozenset[str]

_LETTER = r"(?:\(\s?([A-Za-z])\s?\)|\[\s?([A-Za-z])\s?\]|\{\s?([A-Za-z])\s?\}|([A-Za-z])[).:]?)"
_ONE = re.compile(_LETTER)
_LEAD = re.compile(
    r"(?:(?:i|we)\s(?:would\s)?(?:choose|pick|select|go\swith)\s|(?:choose|select|pick)\s)?(?:the\s)?"
    r"(?:(?:correct|right|best|final)\s)*(?:options?|choices?|answers?|statements?|both)?\s?(?:(?:is|are)\s|:\s?)?(?:options?\s|choices?\s)?"
    r"(?=[(\[{]?\s?[A-Za-z](?![A-Za-z]))",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r"\s(?:is|are)\s(?:the\s)?(?:correct|right)(?:\s(?:answers?|options?|choices?|ones?))?$", re.IGNORECASE
)
_LABELLED = re.compile(r"(?:\(\s?(?P<a>[A-Za-z])\s?\)|\[\s?(?P<b>[A-Za-z])\s?\]|(?P<c>[A-Za-z])[).:])\s*(?P<text>\S.*)")
_LOOSELY_LABELLED = re.compile(r"(?P<a>[A-Z])\s(?:-\s(?P<text>\S.*)|\((?P<in_brackets>.*)\))")
_LABELLED_LAST = re.compile(r"(.*\S)\s?(?:\(\s?(?:option\s)?([A-Za-z])\s?\)|\[\s?([A-Za-z])\s?\])", re.IGNORECASE)
_SEPARATORS = re.compile(r"\band\b|\\[{}]|[,;&()\[\]{}\s]")
_RUN = re.compile(r"[A-J]{2,10}|[a-j]{2,10}")
_MARKED = re.compile(r"(?:^|[\s,;/])(?:\([A-Za-z]\)|\[[A-Za-z]\]|[A-Za-z][).:](?:\s|$))")
_JOINED = re.compile(r"(?:^|\s|\b)(?:(?:or|and|nor)\s+(?:\(?[A-Z]\)?|[b-hj-z])|[,;/&]\s+\(?[A-Z]\)?)(?![\w'-])")
# "Both A and B", "Plan A or (B)": an option's text that names other options by their letters, after a word.
_MENTION = re.compile(
    r"(?<=[A-Za-z]\s)(?<!\bor\s)(?<!\band\s)(?<!\bnor\s)\(?[A-Z]\)?(?:(?:,?\s(?:and|or|nor|&)\s|,\s)\(?[A-Z]\)?)+(?![\w'])"
)
_ALL_MENTION = re.compile(r"(?:\(?[A-Z]\)?,\s)*\(?[A-Z]\)?,?\s(?:and|&)\s\(?[A-Z]\)?")


@dataclass(frozen=True)
class Choice:
    """The options in an answer.

    letters: one or several, upper case. text: the text with a single letter. hedged: the text names other options too,
    as in "A. red or B. blue", but not as in "C. Both A and B".
    """

    letters: Letters
    text: str | None = None
    hedged: bool = False


def read_choice(answer: str, loosely: bool = False) -> Choice | None:
    """The options that an answer names by letter; None if it names none. "A or B" names none.

    loosely: read "A - 5 cm" and "A (5 cm)" as an option and its text; otherwise they are a difference and a product.
    """
    bare = _VERDICT.sub("", answer)
    lead = _LEAD.match(bare)
    bare = bare[lead.end() :] if lead else bare
    if match := _ONE.fullmatch(bare):
        return Choice(frozenset(_first(match).upper()))
    letters = _several(bare)
    if letters:
        return Choice(letters)
    match = _LABELLED.fullmatch(bare) or (_LOOSELY_LABELLED.fullmatch(bare) if loosely else None)
    if match is None:
        return None
    letter, text = _first(match).upper(), match["text"] or match["in_brackets"]
    if _ALL_MENTION.fullmatch(text) and letter not in text:
        return Choice(frozenset(letter), text)
    mentions = {named for group in _MENTION.findall(text) for named in re.findall(r"\b[A-Z]\b", group)}
    rest = _MENTION.sub("", text)
    hedged = letter in mentions or any(form.search(rest) for form in (_MARKED, _JOINED)) or _ONE.fullmatch(rest)
    return Choice(frozenset(letter), text, bool(hedged))


def _several(bare: str) -> Letters | None:
    """The letters of "A, C", "A and C", "(A)(C)" or "AC", all in one case, each once; None for anything else."""
    letters = (
        list(bare.strip("()[]{} ")) if _RUN.fullmatch(bare.strip("()[]{} ")) else _SEPARATORS.sub(" ", bare).split()
    )
    alike = all(len(letter) == 1 and letter.isascii() and letter.isalpha() for letter in letters)
    if len(letters) < 2 or not alike or len({letter.isupper() for letter in letters}) != 1:
        return None
    return frozenset("".join(letters).upper()) if len(set(letters)) == len(letters) else None


def labelled_last(answer: str) -> Choice | None:
    """The option that an answer names by its text, then its letter, as in "blue (B)"; else None."""
    match = _LABELLED_LAST.fullmatch(answer)
    return match and Choice(frozenset((match[2] or match[3]).upper()), match[1])


def without_label(text: str, place: int) -> str:
    """An option's text without its own letter: the second option "B. 1/2" becomes "1/2"."""
    match = _LABELLED.fullmatch(text)
    if match is None:
        return text
    return match["text"] if _first(match).upper() == letter_of(place) else text


def letter_of(place: int) -> str:
    """The letter of an option, counted from 0."""
    return chr(ord("A") + place) if place < 26 else ""


def place_of(letter: str) -> int:
    """The place of an option, from 0."""
    return ord(letter) - ord("A")


def named_by_text(answer: str, texts: Sequence[str], same: Callable[[str, str], bool]) -> int | None:
    """The one option with this text; None for none or several."""
    found = [place for place, text in enumerate(texts) if same(answer, text)]
    return found[0] if len(found) == 1 else None


def _first(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group)
