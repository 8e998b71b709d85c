r"""One spelling for the many ways to write an answer: Unicode becomes LaTeX, wrappers and stray marks are removed.

Case is kept. Everything is a table or a regular expression over at most a thousand characters; nothing is evaluated.
"""

import re
import unicodedata

_MATH = {
    "\u00d7\u2a2f": r"\times ", "·⋅∙": r"\cdot ", "÷": r"\div ", "≤⩽≦": r"\le ", "≥⩾≧": r"\ge ", "≠": r"\ne ",
    "≈≃≅": r"\approx ", "±": r"\pm ", "∞": r"\infty ", "\u222a": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "∈": r"\in ", "∠": r"\angle ", "△": r"\triangle ", "⊥": r"\perp ", "∥": r"\parallel ", "∴": r"\therefore ",
    "∛": r"\sqrt[3]", "√": r"\sqrt", "⟨": r"\langle ", "⟩": r"\rangle ", "º˚∘": "°", "µ": "μ", "【": "[", "】": "]",
    "、": ",", "。": ".",
    # Minus and dash, asterisk, the fraction's slash, the ratio's colon, quotation marks and primes, nothing at all.
    "\u2212\u2013\u2014\ufe63": "-", "\u2217": "*", "\u2044\u2215": "/", "\u2236": ":",
    "\u2018\u2019\u201b\u2032`\u00b4": "'", "“”„″": '"', "\u200b\u200c\u200d\ufeff": "",
    # These spaces group the digits of a number; a plain space does not.
    "\u00a0\u2009\u202f": "~",
}  # fmt: skip
_CHARACTERS = str.maketrans({sign: written for signs, written in _MATH.items() for sign in signs})
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"([√∛])\s?(?:([0-9]+(?:\.[0-9]+)?|[a-zA-Z])|\(([^()]*+)\))")
_VULGAR = re.compile("([0-9]?)([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒])")
_GREEK = re.compile("[\u03b1-\u03c9ΓΔΘΛΞΠΣΦΨΩ]")
_GREEK_AS_UNITS = "μΩ"

# A command's argument is the answer; braces nest at most three deep. The possessive forms keep it linear.
_GROUP = r"\{((?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)\}"
_WRAPPERS = "text textbf textit textrm textsf texttt textup textnormal mathrm mathbf mathit mathsf mathtt mathnormal "
_WRAPPERS += "boldsymbol bm pmb underline uline emph mbox hbox fbox ensuremath displaystyle"
_WRAPPED = re.compile(
    rf"\\(?:(?:{'|'.join(_WRAPPERS.split())})\*?|(?:textcolor|color|colorbox)\s?\{{[^{{}}]*+\}})\s?{_GROUP}"
)
_SWITCH = re.compile(
    r"\\(?:displaystyle|textstyle|bf|rm|it|large|Large|LARGE|huge|small|normalsize|color\s?\{[^{}]*+\})(?![a-zA-Z])"
    r"|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?"
)
_GROUPED_DIGITS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,;:! ]|~)(?=[0-9]{3}(?![0-9]))")
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|~|\\(?:q?quad|thinspace|space|enspace|hspace\*?\{[^{}]*+\})(?![a-zA-Z])")
_ROW_OR_DELIMITER = re.compile(r"(\\\\)(?:\s?\[[^\[\]]{0,12}\])?|\\[()\[\]]")
_DOLLAR = re.compile(r"(?<!\\)\$+")
_PRICES = re.compile(r"[^$]*(?:(?<!\\)\$\s?[0-9.][^$]*)+")
_SYNONYMS = [
    (re.compile(pattern), written)
    for pattern, written in (
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\le(?:q|qslant|qq)?(?![a-zA-Z])", r"\\le "),
        (r"\\ge(?:q|qslant|qq)?(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"\\(?:lt)(?![a-zA-Z])", "<"),
        (r"\\(?:gt)(?![a-zA-Z])", ">"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\s?\^?\s?\{\s?\\circ\s?\}|\s?\^\s?\\circ(?![a-zA-Z])|\^?\\degree(?:s|Celsius)?(?![a-zA-Z])|\^\{?°\}?", "°"),
        (r"\\celsius(?![a-zA-Z])", "°C"),
        (r"\\mu\s?(?=[a-zA-Z]{1,3}(?![a-zA-Z]))", "μ"),
        (r"\\ohm(?![a-zA-Z])|\\Omega(?![a-zA-Z])", "Ω"),
        (r"\\(?:perthousand|percent)(?![a-zA-Z])|(?<=[0-9])\s?percent\b", r"\\%"),
        (r"(?:\\|(?<![a-zA-Z]))sqrt\s?\(([^()]*+)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s?([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"\^\s?\{\s?([0-9a-zA-Z])\s?\}", r"^\1"),
        (r"(?<![a-zA-Z])([kMm])\sΩ", r"\1Ω"),
        (r"\\(?:[lc]?dots)(?![a-zA-Z])", "..."),
        (r"(?i:\ball (?:the )?real numbers\b|\ball reals\b)(?!\s\w)", r"\\mathbb{R}"),
        # A set-builder's condition: "\{x | 2 < x < 5\}".
        (
            r"^\\\{\s?[a-zA-Z]\s?(?:\\in\s?\\mathbb\s?\{?R\}?\s?)?(?:\||:|\\(?:mid|colon|vert)(?![a-zA-Z]))\s?"
            r"([^{}|:]*(?:[<>]|\\[lg]e\s)[^{}|:]*)\\\}$",
            r"\1",
        ),
        (r"\s+\^", "^"),
        (r"\{,\}", ","),
    )
]
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|\\therefore)\b[, ]*)?(?:(?:the|my|your|our)\s)?"
    r"(?:(?:final|correct|right|best|only)\s)*"
    r"(?:answer|solution|result)(?:\s(?:is|are|was|would be)\b(?!\snot\b)\s?:?|\s?[:=]|\s(?=\(?[A-Z]\)?$))\s?(?=\S)",
    re.IGNORECASE,
)
_LEADING_SIGN = re.compile(r"(?:(?:=|\\(?:approx|therefore|implies|Rightarrow)(?![a-zA-Z])|:|\*+)\s?)+(?=\S)")
_TRAILING = re.compile(r"(?:\s|\*|\\+|(?<!\.)[.,;:])+$")


def spelled(text: str) -> str:
    """The answer in one spelling, case kept, on one line; `quantity`, `options` and math-verify read it."""
    text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0]).replace(chr(0x2212), '-')}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _VULGAR.sub(_fraction, text)
    text = _ROOT.sub(lambda match: f"{match[1]}{{{match[2] or match[3]}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _GREEK.sub(_command, text)
    text = _ROW_OR_DELIMITER.sub(lambda match: match[1] or " ", text)
    text = _GROUPED_DIGITS.sub("", text)
    for _ in range(4):
        text, found = _WRAPPED.subn(r" \1 ", text)
        if not found:
            break
    text = _SPACING.sub(" ", _SWITCH.sub("", text))
    # A single dollar sign is money, as is each before a number; pairs delimit mathematics.
    if len(_DOLLAR.findall(text)) != 1 and not _PRICES.fullmatch(text):
        text = _DOLLAR.sub(" ", text)
    text = " ".join(text.split())
    for pattern, written in _SYNONYMS:
        text = pattern.sub(written, text)
    return _bare(text)


def _bare(text: str) -> str:
    """The text without emphasis, outer quotation marks, a leading "the answer is" or "=", and trailing punctuation."""
    for _ in range(3):
        before = text
        text = _TRAILING.sub("", text).strip()
        for lead in (_LEAD, _LEADING_SIGN):
            if match := lead.match(text):
                text = text[match.end() :]
        for mark in ("'", '"', "__", "_"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)].strip()
        if text == before:
            break
    return text


def _fraction(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match[2]).split("\u2044")
    return rf"{match[1]}\frac{{{above}}}{{{below}}}"


def _command(match: re.Match[str]) -> str:
    sign = match[0]
    if sign in _GREEK_AS_UNITS:
        return sign
    name = unicodedata.name(sign).rsplit(" ", 1)[-1].lower().replace("lamda", "lambda")
    return rf"\{name if sign.islower() else name.capitalize()} "
