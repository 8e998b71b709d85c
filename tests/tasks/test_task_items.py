"""Items as values: purity, identity, options and their mistakes, noise, spans."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cppo.errors import UserError
from cppo.tasks import TASK_NAMES, TaskOptions, make_item, parse_task_options

EVERY = [
    (name, TaskOptions(level=level, ask=ask))
    for name in TASK_NAMES
    for level in (1, 2, 3)
    for ask in ("reason", "name")
]


def facts(item):
    return item.id, item.prompt, item.answer, item.response, item.perception_spans, item.image.tobytes()


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_an_item_depends_on_its_arguments_alone(name, options):
    options = replace(options, noise=30.0)
    forward = [facts(make_item(name, options, seed=4, index=i, split="train")) for i in range(6)]
    np.random.seed(0)  # noqa: NPY002 - the point is that the global generator takes no part
    backward = [facts(make_item(name, options, seed=4, index=i, split="train")) for i in reversed(range(6))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 6
    for other in ({"seed": 5, "split": "train"}, {"seed": 4, "split": "test"}):
        assert facts(make_item(name, options, index=0, **other))[-1] != forward[0][-1]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_noise_changes_pixels_by_its_standard_deviation_and_nothing_else(name):
    quiet = make_item(name, TaskOptions(), seed=0, index=3, split="test")
    noisy = make_item(name, TaskOptions(noise=12), seed=0, index=3, split="test")
    assert facts(quiet)[1:5] == facts(noisy)[1:5]
    clean, dirty = (np.asarray(item.image, dtype=np.float64) for item in (quiet, noisy))
    unclipped = (clean > 60) & (clean < 195)
    assert unclipped.sum() > 500
    noise = (dirty - clean)[unclipped]
    # Four standard errors of the two estimates, from noise that all channels of a pixel share at most.
    pixels = unclipped.sum() / 3
    assert abs(np.std(noise) / 12 - 1) < 4 / np.sqrt(2 * pixels)
    assert abs(np.mean(noise)) < 4 * 12 / np.sqrt(pixels)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_warm_up_shows_the_same_pictures_and_is_identified_apart(name):
    for index in range(5):
        asked = make_item(name, TaskOptions(level=2), seed=1, index=index, split="train")
        named = make_item(name, TaskOptions(level=2, ask="name"), seed=1, index=index, split="train")
        assert asked.image.tobytes() == named.image.tobytes()
        assert asked.prompt != named.prompt
        assert asked.id != named.id


def test_ids_are_unique_over_everything_that_makes_an_item():
    changed = ({}, {"noise": 1}, {"level": 2}, {"prior": 0.5}, {"ask": "name"})
    options = [TaskOptions(**change) for change in changed]
    ids = [
        make_item(name, choice, seed=seed, index=index, split=split).id
        for name in TASK_NAMES
        for choice in options
        for seed in (0, 1)
        for index in (0, 1)
        for split in ("train", "test")
    ]
    assert len(set(ids)) == len(ids)
    assert make_item("digits", TaskOptions(), seed=0, index=17, split="train").id == "digits-train-s0-17"


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_spans_cover_each_reading_once_and_no_computed_text(name, options):
    reading = {
        "digits": r"\d",
        "chart": r"(?:(?:red|green|blue|yellow|pink) )?\d",
        "shapes": r"empty|(?:(?:red|green|blue|yellow|pink)(?: (?:circle|square|triangle|cross))?)"
        r"|circle|square|triangle|cross",
    }[name]
    for index in range(30):
        item = make_item(name, options, seed=2, index=index, split="train")
        assert item.response.startswith("<think> ")
        assert item.response.endswith(f" </think> \\boxed{{{item.answer}}}")
        expected = []
        for sentence in re.finditer(r"I see [^.]*\.", item.response):
            words = re.finditer(rf"\b(?:{reading})\b", sentence.group())
            expected += [(sentence.start() + word.start(), sentence.start() + word.end()) for word in words]
        assert list(item.perception_spans) == expected
        assert item.facts == re.findall(r"I see [^.]*(?=\.)", item.response)
        assert len(item.response) - sum(end - start for start, end in expected) > 25


def test_pictures_are_rgb_of_64_pixels():
    for name, options in EVERY:
        image = make_item(name, options, seed=0, index=0, split="train").image
        assert (image.mode, image.size) == ("RGB", (64, 64))


def test_options_are_parsed_from_text():
    text = {"noise": "90", "level": "3", "prior": "0.25", "ask": "name"}
    assert parse_task_options("chart", text) == TaskOptions(noise=90.0, level=3, prior=0.25, ask="name")
    assert parse_task_options("digits", {}) == TaskOptions(noise=0.0, level=1, prior=0.0, ask="reason")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nois": "3"}, "unknown task option 'nois'; did you mean `noise`? choose one of seed, n, split, noise"),
        ({"noise": "loud"}, "noise=loud: give a number"),
        ({"noise": "256"}, "noise=256: give a standard deviation between 0 and 255"),
        ({"noise": "nan"}, "noise=nan: give a standard deviation"),
        ({"level": "1.5"}, "level=1.5: give a whole number"),
        ({"level": "4"}, "level=4: give 1, 2 or 3"),
        ({"prior": "-0.1"}, "prior=-0.1: give a probability between 0 and 1"),
        ({"ask": "why"}, "ask=why: give reason or name"),
    ],
)
def test_a_bad_option_is_named_with_its_family(options, message):
    with pytest.raises(UserError) as caught:
        parse_task_options("shapes", options)
    assert str(caught.value).startswith(f"tasks:shapes: {message}")
    assert "\n" not in str(caught.value)


def test_an_unknown_family_or_split_is_named():
    with pytest.raises(UserError, match="'digit': the families are digits, shapes, chart"):
        parse_task_options("digit", {})
    with pytest.raises(UserError, match="split=valid: give train or test"):
        make_item("digits", TaskOptions(), seed=0, index=0, split="valid")


def test_checking_options_loads_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from cppo.tasks import parse_task_options; parse_task_options('digits', {'noise': '3'}); "
        "print(sorted({'torch', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
