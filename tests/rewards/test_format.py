"""The format reward on a table written by hand."""

import random
import re

import pytest

from cppo.errors import UserError
from cppo.rewards import format_reward, get_format_reward

GOOD = [
    r"<think> see 3 5 . 3 + 5 = 8 </think> \boxed{ 8 }",
    "\n <think></think>\\boxed{8}",
    "<think>\nmany\nlines\n</think>\nThe answer is $\\boxed{\\frac{1}{2}}$.",
    r"<think> { unbalanced \boxed{1 </think> \boxed{8}",
]
BAD = [
    "",
    r"\boxed{8}",
    r"<think> no end \boxed{8}",
    r"no start </think> \boxed{8}",
    r"first <think> a </think> \boxed{8}",
    r"<think> a </think> 8",
    r"<think> \boxed{8} </think>",
    r"<think> a </think> \boxed{}",
    r"<think> a </think> \boxed{8",
    r"<think> a </think> <think> b </think> \boxed{8}",
    r"<think> a <think> b </think> \boxed{8}",
    r"<think> a </think> b </think> \boxed{8}",
    r"</think> <think> \boxed{8}",
    r"<THINK> a </THINK> \boxed{8}",
    "<think>" * 140_000,
    "<think>" + "{" * 900_000 + "</think>" + "\\boxed{" * 10_000,
    "<think></think>" + " " * 1_000_000 + r"\boxed{8}",
]


@pytest.mark.parametrize("text", GOOD)
def test_well_formed(text):
    assert format_reward([text], answer=["9"]) == [1.0]
    assert format_reward([[{"role": "assistant", "content": text}]]) == [1.0]


@pytest.mark.parametrize("text", BAD)
def test_not_well_formed(text):
    assert format_reward([text]) == [0.0]


def test_one_value_a_completion_in_order():
    assert format_reward(completions=[GOOD[0], BAD[1], GOOD[1]], prompts=["a", "b", "c"]) == [1.0, 0.0, 1.0]
    assert format_reward([]) == []
    assert format_reward.__name__ == "format_reward"


PUBLISHED = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def test_the_published_form_is_the_published_expression():
    """Every way to put few of the parts in a row, and hostile ones that the expression still decides in time."""
    reward, draw = get_format_reward("published"), random.Random(0)
    parts = ["<think>", "</think>", "\\boxed{", "}", "{", "\\boxed", " ", "\n", "a", "<think"]
    texts = ["".join(draw.choices(parts, k=draw.randrange(9))) for _ in range(3_000)]
    complete = ["<think>", "</think>", "\\boxed{", "}"]
    for _ in range(1_000):
        words = [draw.choice(parts), *complete, draw.choice(parts)]
        draw.shuffle(words) if draw.random() < 0.3 else words.insert(draw.randrange(6), draw.choice(parts))
        texts.append("".join(words))
    texts += [*GOOD, *BAD[:-3]]
    expected = [float(PUBLISHED.fullmatch(text) is not None) for text in texts]
    assert {0.0, 1.0} <= set(expected)
    assert reward(texts) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r" <think> a </think> \boxed{8}", 0.0),
        (r"<think> a </think> <think> b </think> \boxed{8}", 1.0),
        (r"<think></think>\boxed{}", 1.0),
        (r"<think></think>\boxed{{8}", 1.0),
        (r"<think></think>\boxed {8}", 0.0),
        ("<think></think>" + "\n" * 2_000_000 + r"\boxed{8}", 1.0),
        ("<think>" + "</think>\\boxed{" * 200_000, 0.0),
    ],
)
def test_what_the_published_form_lets_pass(text, value):
    reward = get_format_reward("published")
    assert reward([text], answer=["8"]) == [value]
    assert reward([[{"role": "assistant", "content": text}]]) == [value]
    assert reward.__name__ == "format_reward"


@pytest.mark.parametrize("form", ["Published", "", 3])
def test_other_forms_are_refused(form):
    with pytest.raises(UserError, match="choose one of strict, published"):
        get_format_reward(form)
