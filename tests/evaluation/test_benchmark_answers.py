"""What responses to benchmark questions say, by rule, and whether it is right; cases written out by hand."""

import math

import pytest

from cppo.errors import UserError
from cppo.evaluation.benchmarks import BENCHMARKS
from cppo.evaluation.benchmarks.answers import (
    final_answer,
    number,
    option_labels,
    option_letter,
    same_answer,
    text_list,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think> maybe \boxed{A} </think> \boxed{B}", "B"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("<think> A or B? </think>\n The answer is B.", "The answer is B."),
        ("Answer: C", "Answer: C"),
        (r"\boxed{}", ""),
        ("", ""),
    ],
)
def test_the_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *((form, "B") for form in ("B", "(B)", "B.", "b", "B:", r"\text{B}", "**B**", "$B$", r"\mathrm{(B)}")),
        ("B. the blue one, not A", "B"),
        ("(C) 12 cm", "C"),
        ("The answer is D", "D"),
        ("the answer is A, no, the answer is (C).", "C"),
        ("Answer: B because C is too long and D is too short", "B"),
        ("I choose option C", "C"),
        ("it must be E", "E"),
        ("A cat sits on B", "B"),
        ("A cat sits there", None),
        ("I see that it is B", "B"),
        ("either A or B", None),
        ("B and C", None),
        ("F", None),
        ("", None),
        ("blue", None),
        ("D comes first in a long line of reasons that go on", None),
    ],
)
def test_the_letter_of_an_option(answer, letter):
    assert option_letter(answer, "ABCDE") == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("12", "B"),
        ("2", "A"),
        ("the Red house", "C"),
        ("red house", "C"),
        ("12 red house", None),
        ("22 or 12.5", None),
        ("about 2 or so", "A"),
        ("a tale of nearly everything in the world but one red house", None),
        ("D", None),
    ],
)
def test_an_option_by_its_text(answer, letter):
    assert option_letter(answer, "ABC", ("2", "12", "red house")) == letter


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("B, D", "BD"),
        ("D,B", "BD"),
        ("B and D", "BD"),
        ("BD", "BD"),
        ("3", "3"),
        ("(C)", "C"),
        ("The answer is A", "A"),
        ("I think that D fits", "D"),
        ("BAD luck", ""),
        ("", ""),
    ],
)
def test_labels_of_several_options(answer, labels):
    assert option_labels(answer) == labels


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("12 cm", 12),
        ("1,234.5", 1234.5),
        (r"\frac{1}{2}", 0.5),
        ("$-3.5$", -3.5),
        ("x = 5", 5),
        ("between 3 and 7.25.", 7.25),
        (".5", 0.5),
        ("1e3", 1000),
        ("2.5π", 2.5 * math.pi),
        (r"\pi", math.pi),
        ("1e999", None),
        ("none", None),
        ("", None),
    ],
)
def test_numbers(answer, value):
    assert number(answer) == (value if value is None else pytest.approx(value, rel=1e-12))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("No, there is none.", "no"),
        ("yes and no", None),
        ("nothing", None),
        ("**yes**", "yes"),
        ("maybe", None),
    ],
)
def test_yes_or_no(answer, said):
    assert yes_or_no(answer) == said


def test_a_list_of_texts_is_read_and_never_run(tmp_path):
    assert text_list("['a', \"b's\", '']") == ("a", "b's", "")
    for cell in (f"[open({str(tmp_path / 'x')!r}, 'w')]", "['a'", "'a'", "{'a'}", "[" * 9999, "['a']" + " " * 99_999):
        with pytest.raises(UserError, match="Python list"):
            text_list(cell)
    assert not list(tmp_path.iterdir())


def test_hostile_answers_are_searched_once():
    """A search that goes back for each place it began at would never end here."""
    for text in (
        "A " * 400_000,
        "answer " * 200_000,
        "((((" * 200_000,
        "1," * 400_000,
        "$" * 900_000,
        "B,; " * 200_000,
    ):
        answer = final_answer(text)
        assert len(answer) <= 10_000
        assert option_letter(answer, "ABCDE", ("x" * 1000,) * 5) in (None, "A", "B")
        assert set(option_labels(answer)) <= set("AB1")
        assert number(answer) in (None, 1)
        assert yes_or_no(answer) is None


MATHVISTA_META = {"task": "figure question answering"}
ROWS = {
    "logicvista": {"question": "Which?", "image": None, "answer": "B, D", "skill": ["inductive"]},
    "mathvista": {
        "query": "q",
        "decoded_image": None,
        "choices": None,
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": MATHVISTA_META,
    },
    "dynamath": {
        "id": "12",
        "question": "How long?",
        "decoded_image": None,
        "ground_truth": "5.000000000000001",
        "answer_type": "float",
        "subject": "solid  geometry",
        "knowledge_level": "high school",
    },
    "wemath": {
        "ID": "2steps_9",
        "key": "2steps_multi",
        "question": "How large?",
        "option": "A. 1; B. 2;C. 3; E. No correct answer",
        "answer": "E",
        "image_path": None,
    },
    "mathvision": {
        "question": "How many?\n<image1>",
        "options": ["3", "4", "5", "6", "7"],
        "decoded_image": None,
        "answer": "D",
        "level": 2,
        "subject": "counting",
    },
    "mathverse": {
        "problem_index": "1",
        "problem_version": "Vision Only",
        "question": "",
        "image": None,
        "answer": "B",
        "question_type": "multi-choice",
        "metadata": {"subject": "Plane Geometry"},
        "query_wo": "According to the image, answer.",
        "question_for_eval": "How long is AB?\nChoices:\nA:40\nB:60",
    },
    "mmmu_pro_vision": {"image": None, "options": "['x', 'y', 'z']", "answer": "C", "subject": "Art"},
    "geometry3k": {"images": [], "problem": "Find x.", "answer": r"2 \sqrt { 3 }"},
    "mmk12": {"question": "Which?\nA. 1\nB. 2", "answer": "A", "image": None, "subject": "math"},
    "pope": {"question": "Is there a cat?", "answer": "yes", "image_source": "7", "image": None, "category": "random"},
    "hallusionbench": {
        "category": "VD",
        "subcategory": "figure",
        "set_id": "0",
        "figure_id": "1",
        "question_id": "0",
        "question": "Is it longer?",
        "gt_answer": "0",
        "image": None,
    },
}
"""A row of each benchmark, in its own columns."""


@pytest.mark.parametrize(
    ("name", "changes", "right", "wrong"),
    [
        ("logicvista", {}, [r"\boxed{B, D}", r"\boxed{D and B}", "BD"], [r"\boxed{B}", "A, B, D", ""]),
        ("logicvista", {"answer": "3"}, [r"\boxed{3}", "3"], ["C", "4"]),
        ("mathvista", {}, [r"\boxed{1.2}", r"\boxed{1.23 m}", "it is 1.15 or 1.2."], [r"\boxed{1.3}", "1", "none"]),
        ("mathvista", {"answer_type": "integer", "answer": "3"}, [r"\boxed{3}", r"\boxed{3.0}", "3 apples"], ["4"]),
        ("mathvista", {"answer_type": "list", "answer": "[2, 3]"}, [r"\boxed{[2,3]}"], [r"\boxed{[3, 2]}"]),
        (
            "mathvista",
            {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"], "answer": "blue"},
            [r"\boxed{B}", r"\boxed{(B) blue}", r"\boxed{blue}", "The answer is B."],
            [r"\boxed{A}", r"\boxed{bleu}", r"\boxed{red, blue}"],
        ),
        (
            "dynamath",
            {},
            [r"\boxed{5.001}", '{"solution": "3 + 2 = 5", "short answer": "5.000"}', '{"short answer": 4.9995}'],
            [r"\boxed{5.0021}", '{"short answer": "6", "solution": "5"}', ""],
        ),
        ("dynamath", {"ground_truth": "6.2832"}, [r"\boxed{2π}", r"\boxed{2\pi}"], [r"\boxed{2}"]),
        (
            "dynamath",
            {"answer_type": "multiple choice", "ground_truth": "C"},
            [r"\boxed{C}", '{"short answer": "C"}', '{"short answer": "(C) 9"}'],
            [r"\boxed{B}", "A or C"],
        ),
        ("dynamath", {"answer_type": "text", "ground_truth": "No solution"}, [r"\boxed{no}"], [r"\boxed{}", "yes"]),
        ("wemath", {}, ["<Thought>: .. <Answer>: E", r"\boxed{E}", r"\boxed{E. No correct answer}"], ["A", ""]),
        ("mathvision", {}, [r"\boxed{D}", r"\boxed{6}", "The answer is (D)."], [r"\boxed{5}", r"\boxed{A}", "4, 6"]),
        ("mathvision", {"options": list("ABCDE"), "answer": "A"}, [r"\boxed{A}"], [r"\boxed{B}", "A or B"]),
        (
            "mathvision",
            {"options": ["2", "1", r"$\frac{1}{2}$", r"\frac{3}{2}", "0"], "answer": "C"},
            [r"\boxed{0.5}", r"\boxed{1/2}", r"\boxed{\tfrac12}"],
            [r"\boxed{1.5}", r"\boxed{1}", r"\boxed{0.25}"],
        ),
        ("mathvision", {"options": [], "answer": "0.5"}, [r"\boxed{\frac{1}{2}}", ".5"], [r"\boxed{0.51}"]),
        ("mathvision", {"options": [], "answer": "C"}, [r"\boxed{C}"], [r"\boxed{D}"]),
        ("mathverse", {}, [r"\boxed{B}", r"\boxed{60}", "B:60"], [r"\boxed{A}", r"\boxed{40}", ""]),
        ("mathverse", {"answer": "(C)"}, [r"\boxed{C}"], [r"\boxed{B}"]),
        ("mathverse", {"answer": "False"}, [r"\boxed{False}"], [r"\boxed{A}"]),
        (
            "mathverse",
            {"question_type": "free-form", "answer": "12 cm", "question_for_eval": "How long?"},
            [r"\boxed{12}", r"\boxed{12 cm}"],
            [r"\boxed{13}", r"\boxed{12 m}"],
        ),
        ("mmmu_pro_vision", {}, [r"\boxed{C}", "Answer: C", r"\boxed{z}"], ["D", "", "A or C", "I am not sure"]),
        ("geometry3k", {}, [r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}"], [r"\boxed{3\sqrt{2}}", r"\boxed{3.46}"]),
        ("mmk12", {}, [r"\boxed{A}", "A. 1"], [r"\boxed{B}"]),
        ("pope", {}, ["Yes", r"\boxed{yes}", "yes, there is"], ["no", "", "yes or no"]),
        ("hallusionbench", {}, ["No.", r"\boxed{no}"], ["Yes", ""]),
        ("hallusionbench", {"gt_answer": "1"}, ["Yes"], ["no"]),
    ],
)
def test_right_and_wrong_responses(name, changes, right, wrong):
    benchmark = BENCHMARKS[name]
    question = benchmark.ask({**ROWS[name], **changes}, benchmark.splits[0])
    for text in right:
        assert benchmark.right(question, text), text
        assert benchmark.right(question, f"<think> is it A, B, 17, yes, no? </think> {text}"), text
    for text in wrong:
        assert not benchmark.right(question, text), text


def test_what_is_asked():
    asked = {name: BENCHMARKS[name].ask(row, BENCHMARKS[name].splits[0]) for name, row in ROWS.items()}
    assert asked["logicvista"].prompt == "Which?"
    assert asked["wemath"].prompt == "How large?\nA. 1; B. 2;C. 3; E. No correct answer"
    assert asked["mathvision"].prompt == "How many?\n<image1>\n(A) 3\n(B) 4\n(C) 5\n(D) 6\n(E) 7"
    assert asked["mathverse"].prompt == "According to the image, answer."
    assert asked["mathverse"].choices == ("40", "60")
    assert asked["dynamath"].prompt.startswith("## Question\n How long?\n## Answer Instruction ")
    assert asked["dynamath"].prompt.endswith(
        '{\n    "solution": "[Detailed step-by-step explanation]",\n    "short answer": "[Concise Answer]"\n}'
    )
    assert "three-digit floating-point number and provide" in asked["dynamath"].prompt
    assert asked["mmmu_pro_vision"].prompt.startswith("Answer the following multiple-choice question in the image. ")
    letters = BENCHMARKS["mathvision"].ask({**ROWS["mathvision"], "options": list("ABCDE")}, "testmini")
    assert letters.prompt == "How many?\n<image1>"
    no_skill = {name: cell for name, cell in ROWS["logicvista"].items() if name != "skill"}
    assert BENCHMARKS["logicvista"].ask(no_skill, "test").facts == {"skill": "unknown"}
    assert BENCHMARKS["logicvista"].ask({**ROWS["logicvista"], "answer": ""}, "test") is None


def test_the_rows_here_have_the_columns_that_are_asked_for():
    for name, row in ROWS.items():
        assert set(BENCHMARKS[name].columns) <= set(row), name


def test_the_checker_is_asked_once_of_each_pair():
    """16 responses to each of 5,000 questions, as a benchmark has them, are 80 comparisons here."""
    benchmark = BENCHMARKS["mathverse"]
    row = {**ROWS["mathverse"], "question_type": "free-form"}
    questions = [benchmark.ask({**row, "answer": rf"x^2+{n % 20}"}, "testmini") for n in range(5000)]
    same_answer.cache_clear()
    right = 0
    for question in questions:
        right += sum(benchmark.right(question, rf"<think> .. </think> \boxed{{{k % 4}+x^2}}") for k in range(16))
    assert right == 5000 // 20 * 4 * 4
    assert same_answer.cache_info().misses <= 20 * 4
