"""The format reward on a table written by hand."""

import pytest

from cppo.rewards import format_reward

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
