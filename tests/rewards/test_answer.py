"""Comparison against a table written by hand and math-verify's documentation, and hostile text."""

import json
import os
import subprocess
import sys
import threading
from itertools import product

import pytest

from cppo.errors import UserError
from cppo.rewards import accuracy_reward, answers_match, get_accuracy_reward
from cppo.rewards.match import MAX_ANSWER_CHARS
from cppo.rewards.worker import Unfinished, shared_pool

# Correct verdicts must not depend on how busy the machine is.
PATIENT = 60.0

EQUAL = [
    ("8", " 8 "),
    ("8", "8."),
    ("8", "+8"),
    ("08", "8"),
    ("-3", "\u22123"),
    ("3.50", "3.5"),
    (".5", "0.5"),
    ("1,234,567", "1234567"),
    ("1{,}000", "1000"),
    ("1e3", "1000"),
    ("2.5E-1", "0.25"),
    ("1/2", "0.5"),
    ("6/4", "3/2"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\dfrac{ 10 }{ 4 }", "2.5"),
    (r"\tfrac{1.5}{3}", "1/2"),
    ("1 1/2", "1.5"),
    (r"-2\frac{3}{4}", "-2.75"),
    ("50%", "0.5"),
    (r"50\%", "50"),
    ("12.5 %", "1/8"),
    ("$7$", "7"),
    (r"\(7\)", "7"),
    (r"\boxed{7}", "7"),
    ("7", r"\boxed{7}"),
    (r"\text{7}", "7"),
    (r"\left( 1, 2 \right)", "( 1, 2 )"),
    ("Red", "red"),
    ("red.", "red"),
    ("dark  blue", "dark blue"),
    (r"\text{dark blue}", "Dark Blue"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("b", "B"),
    (r"\text{B}", "B"),
    (r"\textbf{(B)}", "B"),
    ("B", "(B)"),
    ("B. blue", "B"),
    ("(B) blue", "B"),
    ("b: blue", "(B)"),
    ("B", "B. blue"),
    ("blue", "B. Blue"),
    ("yes", "True"),
    ("No.", "false"),
    ("12 cm", "12"),
    ("12", r"12\,\text{cm}"),
    ("12cm", "12 centimeters"),
    ("12 cm^2", "12 square centimetres"),
    ("12 cm²", r"12\text{ cm}^2"),
    ("5 m/s", "5 meters per second"),
    (r"60^\circ", "60°"),
    (r"60^{\circ}", "60 degrees"),
    ("€5", "5 euros"),
    (r"\$5", "5"),
    ("3 apples", "3"),
    ("1 apple", "1 apples"),
    ("1/2 inch", "0.5 in"),
    ("3 million", "3,000,000"),
    ("the blue square", "blue square"),
    ("dark-blue", "dark blue"),
    ('"Hello, world"', "hello world"),
]
DIFFERENT = [
    ("", ""),
    ("", "8"),
    (".", "."),
    ("8", "9"),
    ("8", "-8"),
    ("88", "8"),
    ("8 8", "88"),
    ("1 2", "2"),
    ("0.333", "1/3"),
    ("1/0", "1"),
    ("1/0", "0"),
    ("5%", "5000%"),
    ("50", "0.5"),
    ("A", "B"),
    ("AB", "B"),
    ("8", "B"),
    ("B", "8"),
    ("red", "der"),
    ("red", "blue"),
    ("8 9", "8"),
    ("$8$ and $9$", "8"),
    ("A or B or C", "A"),
    ("A, B, C", "A"),
    ("(A) or (B)", "A"),
    ("A. red or B. blue", "A"),
    ("A. red, (B) blue", "A"),
    ("A: B", "A"),
    ("red", "B. blue"),
    ("red or blue", "blue"),
    ("yes or no", "yes"),
    ("true", "no"),
    ("12 m", "12 cm"),
    ("12 cm", "12 cm^2"),
    ("€5", "£5"),
    ("3 apples", "3 pears"),
    ("5x", "5"),
    ("5 pi", "5"),
    ("5 million", "5"),
    ("-x", "x"),
    ("blue", "blueish"),
    ("1e999999999", "1"),
    ("9" * 61, "9" * 60),
]
EQUAL_MATHEMATICS = [
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\frac12", "0.5"),
    ("2x+1", "1+2x"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5 cm", "5"),
    (r"5\,\text{cm}", "5"),
    (r"30^\circ", "30"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", "(1, 2)"),
    ("2^{10}", "1024"),
    ("[0, 1)", "[0,1.0)"),
    (r"(0, \frac{1}{2})", "(0, 0.5)"),
    (r"(-\infty, 2]", r"(-\infty,2]"),
    (r"3\sqrt{2}\text{ cm}", r"3\sqrt{2}"),
]
DIFFERENT_MATHEMATICS = [
    (r"3\times4", "12"),
    (r"\sqrt{8}", r"2\sqrt{3}"),
    ("2x+1", "2x-1"),
    ("(2,1)", "(1,2)"),
    ("[1,2)", "[1,2]"),
    ("6 cm", "5"),
    ("5, 6", "5"),
    ("5$, 6$", "5"),
    (r"\(5\) 6", "5"),
    ("5 or 6", "5"),
    ("5 or 6 or 7", "6"),
    ("x=2 or x=3", "3"),
    ("5; 6", "6"),
    ("(0,1)", "[0,1)"),
    ("5x", "5y"),
    (r"\frac{", "5"),
]


@pytest.fixture(scope="module", autouse=True)
def _close_worker():
    yield
    shared_pool().close()


@pytest.mark.parametrize(("given", "expected"), EQUAL)
def test_equal_answers_need_no_worker(given, expected):
    shared_pool().close()
    assert answers_match(given, expected, PATIENT) is True
    assert answers_match(expected, given, PATIENT) is True
    assert not shared_pool().pids


@pytest.mark.parametrize(("given", "expected"), DIFFERENT)
def test_different_answers(given, expected):
    assert answers_match(given, expected, PATIENT) is False


@pytest.mark.parametrize(("given", "expected"), EQUAL_MATHEMATICS)
def test_equal_mathematics(given, expected):
    assert answers_match(given, expected, PATIENT) is True


@pytest.mark.parametrize(("given", "expected"), DIFFERENT_MATHEMATICS)
def test_different_mathematics(given, expected):
    assert answers_match(given, expected, PATIENT) is False


def test_every_way_to_write_an_option_letter_is_one_answer():
    ways = ["C", "c", "(C)", "C.", "C)", "(C).", "C:", r"\text{C}", "$C$", r"\boxed{C}"]
    assert all(answers_match(a, b) for a, b in product(ways, ways))
    assert not any(answers_match(a, "D") or answers_match("D", a) for a in ways)


def test_a_long_answer_is_compared_as_text_alone():
    shared_pool().close()
    long = "x+" * MAX_ANSWER_CHARS + "1"
    assert answers_match(long, long)
    assert not answers_match(long, "1+" + "x+" * (MAX_ANSWER_CHARS - 1) + "x")
    assert not shared_pool().pids


def test_model_text_is_never_evaluated(tmp_path):
    target = tmp_path / "made"
    attack = f"__import__('pathlib').Path('{target}').touch()"
    for given in (attack, f"5 + {attack}", f"open('{target}','w')==5", rf"\text{{{attack}}}+5^2", f"eval({attack!r})"):
        assert accuracy_reward([rf"\boxed{{{given}}}"], ["5"]) == [0.0]
        assert accuracy_reward([rf"\boxed{{{given}}}"], ["x^2+5"]) == [0.0]
    assert not target.exists()


def test_works_in_a_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(answers_match(r"\sqrt{8}", r"2\sqrt{2}", PATIENT)))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_accuracy_reward_reads_texts_and_chats_and_ignores_other_columns():
    completions = [
        r"<think> a </think> \boxed{8}",
        [{"role": "assistant", "content": r"\boxed{8}"}],
        [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed"}, {"type": "text", "text": "{8}"}]}],
        [{"role": "assistant", "content": r"\boxed{8}"}, {"role": "tool", "content": "9"},
         {"role": "assistant", "content": r"\boxed{7}"}],
        [{"role": "assistant", "content": None}],
        [],
        "8",
    ]  # fmt: skip
    rewards = accuracy_reward(
        completions=completions, answer=[8, "8", "8", "8", "8", "8", "8"], prompts=["?"] * 7, trainer_state=None
    )
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert accuracy_reward.__name__ == "accuracy_reward"


def test_answers_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="accuracy_reward: 2 completions, but 1 values in column 'answer'"):
        accuracy_reward(["a", "b"], ["1"])
    with pytest.raises(UserError, match="accuracy_reward: completion 1 has no answer"):
        accuracy_reward(["a", "b"], ["1", None])


def test_import_needs_neither_torch_nor_math_verify():
    script = "import json, sys, cppo.rewards; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", script]))
    assert not {"torch", "sympy", "math_verify", "pint", "transformers"} & set(loaded)


CHOICES = ("red", "dark blue", "12 cm")


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [
        ("dark blue", "B", True),
        ("the dark-blue", "B", True),
        ("B", "dark blue", True),
        ("B. dark blue", "B", True),
        ("12", "C", True),
        ("12 m", "C", False),
        ("red", "B", False),
        ("A", "dark blue", False),
        ("B. red", "B", False),  # letter and text contradict each other
        ("red or dark blue", "B", False),
        ("D", "B", False),
        ("green", "B", False),
        ("green", "green", True),  # an answer beside the choices is compared as it is
    ],
)
def test_multiple_choice_by_letter_or_text(given, expected, equal):
    assert answers_match(given, expected, choices=CHOICES) is equal


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "equal"),
    [
        ("101", "100", 0.01, True),
        ("99", "100", 0.01, True),
        ("101.1", "100", 0.01, False),
        ("-101", "-100", 0.01, True),
        ("101", "-100", 0.01, False),
        ("0.001", "0", 0.5, False),
        ("3.14", "3.14159", 0.001, True),
        ("33%", "1/3", 0.02, True),
        ("101 cm", "100 m", 0.01, False),
        ("101", "100", 0.0, False),
    ],
)
def test_numbers_within_a_tolerance(given, expected, tolerance, equal):
    assert answers_match(given, expected, tolerance=tolerance) is equal


def test_the_reward_takes_choices_and_tolerance():
    texts = [r"\boxed{dark blue}", r"\boxed{101}", r"\boxed{101}"]
    rows = {"answer": ["B", "100", "B"], "choices": [CHOICES, None, []]}
    assert get_accuracy_reward(0.01)(texts, **rows) == [1.0, 1.0, 0.0]
    assert accuracy_reward(texts, **rows) == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match=r"tolerance = 1 must be in \[0, 1\)"):
        get_accuracy_reward(1.0)


# Facts from math-verify's public documentation: pairs that it says are equal, or are not.
PUBLISHED = [
    (r"\frac{1}{3}", "1/3"),
    (r"1,2,3", r"\{1,2,3\}"),
    (r"(1,2) \cup (3,4)", r"(1,2)\cup(3,4)"),
    (r"\{1,3\} \cup \{2,4\}", r"\{1,2,3,4\}"),
    (r"x=1", "1"),
    (r"1 < x < 2", "(1,2)"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"\sqrt{3}/3", r"\frac{1}{\sqrt{3}}"),
    (r"9.0", "9"),
    (r"\pi", r"\frac{2\pi}{2}"),
    (r"2x^2", r"2 x^{2}"),
    (r"\frac{1}{3}", "0.3"),
    (r"[1,2]", "(1,2)"),
    (r"x+y", "x-y"),
    (r"\{1,2\}", r"\{1,3\}"),
]


@pytest.mark.parametrize(("given", "expected"), PUBLISHED)
def test_agreement_with_math_verify(given, expected):
    """What reaches math-verify gets its own verdict, where it may compare inequalities with intervals."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]
    own = verify(parse(f"${expected}$", latex), parse(f"${given}$", latex), allow_set_relation_comp=True)
    assert answers_match(given, expected, PATIENT) is own


HOSTILE = {
    "tower": "5^5^5^5^5",
    "factorials": "9!!!!!!!!!!!!!!!!!!!!",
    "million digits": "9" * 1_000_000,
    "million letters": "x" * 1_000_000,
    "nested braces": "{" * 5000 + "7" + "}" * 5000,
    "nested fractions": "\\frac{1}{" * 90 + "7" + "}" * 90,
    "nested brackets": "(" * 400 + "7" + ")" * 400,
    "open brackets": "(" * 900,
    "roots": "\\sqrt{" * 140 + "7",
    "long sum": "+".join(["x^{99999}"] * 60),
    "integral": r"\int_0^{\infty} e^{-x^{x^x}} dx",
    "emoji": "\U0001f600" * 300,
    "right to left": "\u202e7\u202d",
    "combining": "7" + "\u0301" * 900,
    "nulls": "7\x007",
    "surrogate": "\ud800",
    "digits of another script": "\u0667",
    "shell": "$(touch hacked); `touch hacked`; 7 | sh",
    "python": "__import__('os').system('touch hacked')",
    "python in mathematics": r"x + __import__('os').system('touch hacked') = 7",
    "format string": "%s%n{0.__class__}",
    "json": '{"given": "7", "expected": "7"}\n1',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_earn_nothing(name, tmp_path, monkeypatch):
    """None is evaluated, none is right, and the next question is answered rightly."""
    monkeypatch.chdir(tmp_path)
    assert answers_match(HOSTILE[name], "2x+7", 0.5) is False
    assert accuracy_reward([rf"\boxed{{{HOSTILE[name]}}}"], answer=["8"]) == [0.0]
    assert not list(tmp_path.iterdir())
    assert answers_match("7+2x", "2x+7", PATIENT) is True


def test_no_process_is_left_behind():
    with pytest.raises(Unfinished):
        shared_pool().equivalent(HOSTILE["factorials"], "7", 0.5)
    assert not shared_pool().pids
    answers_match("7+2x", "2x+7", PATIENT)
    (pid,) = shared_pool().pids
    shared_pool().close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
