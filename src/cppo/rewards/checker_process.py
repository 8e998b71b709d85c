"""The child process of `worker.py`: compares answers with math-verify, a JSON line in, "1" or "0" out.

It runs as a script by its path and imports nothing of this package: it starts fast and works with any `__main__` of the
parent. It limits its own memory and processor time; the parent kills it when it sleeps. Answers are parsed by
math-verify's LaTeX grammar only; its other extractor hands text to a parser that evaluates Python.
"""

import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_LIMIT_BYTES = 2 * 1024**3


PARSES_KEPT = 1000
"""Cache size of parsed answers: a question's expected answer is parsed for each response."""
DIGITS = 50
"""Digits to which two closed forms must agree to count as equal."""
ALTERNATIVES = re.compile(r"\s*(?:,?\s*\bor\b|\\lor(?![a-zA-Z]))\s*")
# math-verify's expected result for some pairs; another result means another version than this file is written for.
PROBES = [
    (r"\frac{1}{2}", "0.5", 0.0, True),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", 0.0, False),
    ("3.141593", r"\pi", 0.0, False),
    (r"\begin{pmatrix}3.14\end{pmatrix}", r"\begin{pmatrix}\pi\end{pmatrix}", 0.01, True),
]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The protocol uses the real standard output; what libraries print is discarded.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit_memory()
    equivalent = load_checker()
    for given, expected, tolerance, equal in PROBES:
        if equivalent(given, expected, tolerance) != equal:
            sys.exit(f"math-verify compares {given} and {expected} in another way")
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        question = json.loads(line)
        limit_processor_time(question["seconds"])
        equal = equivalent(question["given"], question["expected"], question["tolerance"])
        limit_processor_time(0)
        replies.write(b"1\n" if equal else b"0\n")


def load_checker() -> Callable[[str, str, float], bool]:
    """A function of the given answer, the expected one and a tolerance."""
    logging.disable(logging.CRITICAL)
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, grader, parse, verify
    from sympy import And, Expr, FiniteSet, Float, Interval, Rational, Set, UnevaluatedExpr, Union
    from sympy.core.relational import Relational

    # The parent compares units; math-verify would drop any final letter that could be a unit.
    spelling = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling)]
    compare_numbers, simplified = grader.sympy_numeric_eq, grader.sympy_symbolic_eq
    allowed = 0.0

    def numbers_equal(expected: Any, given: Any, float_rounding: int, numeric_precision: int) -> bool:
        """Instead of math-verify's rounding to six decimals: compare to 50 digits, or within the tolerance."""
        sides = (expected, given)
        if not all(isinstance(side, Expr) for side in sides) or any(side.has(UnevaluatedExpr) for side in sides):
            return bool(compare_numbers(expected, given, float_rounding, numeric_precision))
        if any(side.free_symbols for side in sides):
            return False  # math-verify then compares them symbolically
        exact = [side.xreplace({one: Rational(str(one)) for one in side.atoms(Float)}) for side in sides]
        wanted, found = (side.evalf(DIGITS + 10) for side in exact)
        if not (wanted.is_finite and found.is_finite):
            return bool(expected == given)
        return bool(abs(found - wanted) <= max(Rational(allowed), Rational(10) ** -DIGITS) * abs(wanted))

    def symbols_equal(expected: Any, given: Any) -> bool:
        """Runs before math-verify's slow simplification: decides numbers; one point can tell expressions apart."""
        sides = (expected, given)
        if all(isinstance(side, Expr) and not side.has(UnevaluatedExpr) for side in sides):
            symbols = sorted(expected.free_symbols | given.free_symbols, key=str)
            if not symbols:
                return False
            point = {symbol: Rational(2 * place + 5, 7) for place, symbol in enumerate(symbols)}
            gap = (expected - given).subs(point).evalf(DIGITS)
            if gap.is_number and gap.is_finite and abs(gap) > 1e-6:
                return False
        return bool(simplified(expected, given))

    grader.sympy_numeric_eq = numbers_equal
    grader.sympy_symbolic_eq = symbols_equal

    @functools.lru_cache(maxsize=PARSES_KEPT)
    def parsed(text: str) -> list[Any]:
        degrees = text.replace("°", r"^{\circ}")
        return list(parse(f"${degrees}$", latex, parsing_timeout=None))

    def is_solved(relation: Any) -> bool:
        """Whether an inequality compares a variable with numbers, such as `0 < x < 3`."""
        parts = relation.args if isinstance(relation, And) else (relation,)
        return len(relation.free_symbols) == 1 and all(
            isinstance(part, Relational) and any(side.is_Symbol for side in part.args) for part in parts
        )

    def read(text: str, other: list[Any]) -> list[Any]:
        """A parsed answer; for "x < -2 or x > 3" the union, if the other answer is a set."""
        if not (other and isinstance(other[0], Set)):
            return parsed(text)
        relations = [parsed(part)[:1] for part in ALTERNATIVES.split(text)]
        if not all(one and isinstance(one[0], Relational | And) and is_solved(one[0]) for one in relations):
            return parsed(text)
        return [Union(*(one[0].as_set() for one in relations))]

    def is_of_another_kind(answer: list[Any], other: list[Any], text: str) -> bool:
        """Whether one has an interval and `text` lists a set: math-verify would compare the ends with the list."""
        listed = other and isinstance(other[0], FiniteSet) and "\\{" in text
        return bool(listed and answer and isinstance(answer[0], Set) and answer[0].has(Interval))

    def equivalent(given: str, expected: str, tolerance: float) -> bool:
        nonlocal allowed
        allowed = tolerance
        try:
            wanted, found = read(expected, parsed(given)), read(given, parsed(expected))
            if is_of_another_kind(wanted, found, given) or is_of_another_kind(found, wanted, expected):
                return False
            return bool(verify(wanted, found, timeout_seconds=None))
        except Exception:  # any failure on hostile text means "not shown to be equal"
            return False

    return equivalent


def limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ValueError, OSError):  # macOS refuses this limit
        return


def limit_processor_time(seconds: float) -> None:
    """End this process after `seconds` more of its own processor time; 0 removes the limit.

    The signal's default action works inside C code too, and also without the parent.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
