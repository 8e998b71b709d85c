"""Extraction of the boxed answer against a brute-force scan, and texts made to be slow."""

import random

import pytest

from cppo.rewards import accuracy_reward, answers_match, extract_answer
from cppo.rewards.extract import MAX_RESPONSE_CHARS


def extract_by_brute_force(text: str) -> str | None:
    """Count braces from the last box to its end."""
    start = text.rfind("\\boxed{")
    body, depth, position = start + len("\\boxed{"), 1, start + len("\\boxed{")
    while start >= 0 and position < len(text):
        if text[position : position + 2] in ("\\{", "\\}"):
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[body:position].strip()
        position += 1
    return None


def test_extraction_equals_brute_force_on_random_brace_soup():
    source = random.Random(0)
    pieces = ["\\boxed{", "{", "}", "}", "a", "\\{", "\\}", " ", "<think>"]
    found = 0
    for _ in range(4000):
        text = "".join(source.choice(pieces) for _ in range(source.randrange(14)))
        expected = extract_by_brute_force(text)
        found += expected is not None
        assert extract_answer(text) == expected, text
    assert 500 < found < 3500


def test_extraction_by_hand():
    assert extract_answer(r"first \boxed{1}, no, \boxed{ 2 }.") == "2"
    assert extract_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert extract_answer(r"\boxed{ \boxed{3} }") == "3"
    assert extract_answer(r"<think>\boxed{4}</think> \boxed{5}") == "5"
    assert extract_answer(r"<think>\boxed{4}</think> ") == "4"
    assert extract_answer(r"\boxed {6}") == "6"
    assert extract_answer(r"\boxed{}") == ""
    for text in ("", "7", r"\boxed 7", r"\boxed{7", "boxed{7}", r"\boxed{4} and cut off \boxed{5"):
        assert extract_answer(text) is None


@pytest.mark.parametrize(
    "text",
    ["{" * 1_000_000, "\\boxed{" * 142_857, "\\boxed{" * 100_000 + "}" * 300_000, "\\boxed" * 166_666,
     "\\boxed" + " " * 999_000, "\\" * 1_000_000, "{}" * 500_000],
)  # fmt: skip
def test_a_million_hostile_characters(text):
    """A scan that is not linear would not come back from these."""
    assert len(text) <= MAX_RESPONSE_CHARS
    assert not extract_answer(text)
    assert accuracy_reward([text], ["5"]) == [0.0]
    assert not answers_match(text, "5")


def test_a_response_over_the_limit_has_no_answer():
    box = r"\boxed{5}"
    fits = " " * (MAX_RESPONSE_CHARS - len(box)) + box
    assert extract_answer(fits) == "5"
    assert extract_answer(" " + fits) is None
