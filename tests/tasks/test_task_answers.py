"""Answers recomputed from the question and the readings under the spans; every stated equation checked."""

import re

import pytest

from cppo.tasks import TASK_NAMES, TaskOptions, make_item

COLOUR = "red|green|blue|yellow|pink"
SHAPE = "circles?|squares?|triangles?|cross(?:es)?|shapes?"
PLACES = {
    4: ["top left", "top right", "bottom left", "bottom right"],
    9: [
        "top left",
        "top middle",
        "top right",
        "middle left",
        "centre",
        "middle right",
        "bottom left",
        "bottom middle",
        "bottom right",
    ],
}


def readings(item):
    return [item.response[start:end] for start, end in item.perception_spans]


def items(name, level, ask="reason", count=80):
    options = TaskOptions(level=level, ask=ask)
    return [make_item(name, options, seed=8, index=i, split=split) for i in range(count) for split in ("train", "test")]


def solve_digits(prompt, seen):
    numbers = [int(word) for word in seen]
    if len(numbers) == 4:
        return abs(numbers[0] + numbers[1] - numbers[2] - numbers[3])
    if len(numbers) == 3:
        total, last = numbers[0] + numbers[1], numbers[2]
        if re.search(r"plus|then add", prompt):
            return total + last
        return total - last if re.search(r"minus|subtract", prompt) else total * last
    return sum(numbers) if re.search(r"sum|add up", prompt) else abs(numbers[0] - numbers[1])


def solve_chart(prompt, seen):
    numbers = [int(word) for word in seen]
    if " plus " in prompt:
        return abs(numbers[0] + numbers[1] - numbers[2] - numbers[3])
    if "all bars" in prompt:
        return sum(numbers)
    if "shortest" in prompt:
        numbers = [max(numbers), min(numbers)]
    elif "tallest" in prompt:
        return max(numbers)
    return sum(numbers) if re.search(r"sum|add up", prompt) else abs(numbers[0] - numbers[1])


def solve_shapes(prompt, seen):
    names = re.findall(rf"\b(?:(?:{COLOUR}) )?(?:{SHAPE})\b", prompt)
    names = [re.sub(r" shapes?$|(?<=cross)es$|(?<=[er])s$", "", name) for name in names]
    if "ere is " in prompt:
        return PLACES[len(seen)][seen.index(names[0])] if names[0] in seen else "nowhere"
    counts = [seen.count(name) for name in names]
    return counts[0] - counts[1] if len(counts) == 2 else counts[0]


SOLVERS = {"digits": solve_digits, "chart": solve_chart, "shapes": solve_shapes}


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_answer_follows_from_the_readings(name, level):
    for item in items(name, level):
        assert str(SOLVERS[name](item.prompt, readings(item))) == item.answer, item


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_stated_equation_is_true_and_the_last_one_is_the_answer(name, level):
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    with_equation = 0
    for item in items(name, level):
        equations = re.findall(r"(-?\d+) ([-+*]) (\d+) = (-?\d+)\.", item.response)
        for left, operation, right, result in equations:
            assert operations[operation](int(left), int(right)) == int(result), item
        if equations:
            with_equation += 1
            assert equations[-1][-1] == item.answer
    assert with_equation > 30


@pytest.mark.parametrize(
    ("name", "opening", "sides"),
    [
        ("digits", r"<think> The (\w+) one is larger\.", "top|bottom|left|right"),
        ("chart", r"<think> (\w+) plus \w+ is more\.", rf"(?:{COLOUR})(?= plus)"),
    ],
)
def test_level_3_opens_with_a_true_comparison_that_is_not_a_reading(name, opening, sides):
    for item in items(name, 3):
        found = re.match(opening, item.response)
        assert min(start for start, _ in item.perception_spans) > found.end()
        first, second = re.findall(r"\d \+ \d = (\d+)\.", item.response)
        larger = 0 if int(first) > int(second) else 1
        assert found.group(1).lower() == re.findall(sides, item.prompt)[larger]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_warm_up_answers_with_its_readings(name, level):
    size = {"digits": 4, "chart": 3 if level == 1 else 4, "shapes": 4 if level == 1 else 9}[name]
    for item in items(name, level, ask="name", count=20):
        assert len(item.perception_spans) == size
        assert item.answer == ", ".join(readings(item))
