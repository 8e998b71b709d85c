"""Conditions show what they say, and the perception card counts what a loop in the test counts."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cppo.data import Record
from cppo.errors import UserError
from cppo.evaluation import (
    CARD_CONDITIONS,
    CONDITION_NAMES,
    EvalResult,
    ItemResult,
    get_condition,
    mean_interval,
    paired_bootstrap,
    perception_card,
    same_answers,
)
from cppo.views import HELD_OUT_PRESERVING, ViewSampler, ViewStrengths, held_out_view, view_generators

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
PICTURES = (Image.fromarray(PIXELS), Image.fromarray(PIXELS[:, ::-1].copy()))


def record(name="r"):
    return Record(name, "how many?", PICTURES, "3")


def pixels(images):
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("name", CONDITION_NAMES)
def test_every_condition_keeps_sizes_and_depends_on_seed_id_and_place(name):
    condition = get_condition(name)
    seen = condition.show(record(), 1)
    assert [image.size for image in seen] == [(56, 40)] * 2
    assert pixels(seen) == pixels(get_condition(name).show(record(), 1))
    if condition.families and name != "gaussian_blur":  # one blur, in which nothing is drawn
        assert any(pixels(condition.show(record(f"r{i}"), 1)) != pixels(seen) for i in range(5))
        assert any(pixels(condition.show(record(), seed)) != pixels(seen) for seed in range(2, 7))
    assert condition.show(Record("t", "2 + 2?", (), "4"), 1) == ()


def test_clean_and_blank():
    assert get_condition("clean").show(record(), 0) == PICTURES
    assert [image.getcolors() for image in get_condition("blank").show(record(), 0)] == [[(2240, (127, 127, 127))]] * 2


def test_groups_draw_all_their_families():
    condition = get_condition("held_out_preserving")
    drawn = Counter()
    for number in range(60):
        rng, _ = view_generators(0, f"r{number}/held_out_preserving", 0, 0)
        family = HELD_OUT_PRESERVING[int(rng.integers(4))]
        drawn[family] += 1
        expected = held_out_view(family, PICTURES[0], rng).image
        assert condition.show(record(f"r{number}"), 0)[0].tobytes() == expected.tobytes()
    assert set(drawn) == set(HELD_OUT_PRESERVING)
    assert min(drawn.values()) >= 5


def test_trained_views_take_families_and_strengths():
    gentle = ViewSampler(0, ["rotation"], ["crop"], ViewStrengths(rotation_degrees=0.0))
    assert pixels(get_condition("trained_preserving", gentle).show(record(), 0)) == pixels(PICTURES)
    assert get_condition("trained_removing", gentle).families == ("crop",)
    assert get_condition("rotation", gentle).strengths.rotation_degrees == 0.0


def test_an_unknown_name():
    with pytest.raises(UserError, match=r"'blurr' is unknown; did you mean `blur`\? choose one of clean, blank"):
        get_condition("blurr")


def item(name, *responses, answer="3", images=1, choices=()):
    right = tuple(float(f"boxed{{{answer}}}" in text) for text in responses)
    return ItemResult(name, answer, responses, right, tuple(1.0 for _ in responses), images, choices)


def boxed(*answers):
    return [f"<think> </think> \\boxed{{{answer}}}" for answer in answers]


@pytest.mark.parametrize(
    ("given", "anchor", "choices", "same"),
    [
        ("1/2", "0.5", (), 1.0),
        ("5", "6", (), 0.0),
        ("B", "blue", ("red", "blue"), 1.0),
        ("__import__('os')", "__import__('os')", (), 1.0),
    ],
)
def test_answers_are_compared_as_the_rewards_do(given, anchor, choices, same):
    first, second = item("a", *boxed(given), choices=choices), item("a", *boxed(anchor), choices=choices)
    assert same_answers(first, second) == same


def test_no_answer_agrees_with_none():
    assert same_answers(item("a", "no idea"), item("a", "no idea")) == 0.0
    assert same_answers(item("a", "no idea", *boxed(3)), item("a", *boxed(3, 3))) == 0.5


def test_the_card_counts_items_with_images():
    rng = np.random.default_rng(0)
    clean_answers, other_answers = rng.integers(2, 5, 50), rng.integers(2, 5, 50)
    clean = EvalResult(tuple(item(f"r{i}", *boxed(a)) for i, a in enumerate(clean_answers)), 1)
    other = EvalResult(tuple(item(f"r{i}", *boxed(a)) for i, a in enumerate(other_answers)), 1, "blur")
    text = item("text", *boxed(3), images=0)
    with_text = {"clean": EvalResult((*clean.items, text), 1), "blur": EvalResult((*other.items, text), 1, "blur")}
    rows = perception_card(with_text, seed=4)
    assert rows == perception_card({"clean": clean, "blur": other}, seed=4)
    assert [row.condition for row in rows] == ["clean", "blur"]
    assert (rows[0].consistency.mean, rows[0].change.mean, rows[0].n) == (1.0, 0.0, 50)
    same = int((clean_answers == other_answers).sum())
    assert rows[1].consistency.mean == same / 50
    assert (rows[1].consistency.low, rows[1].consistency.high) == mean_interval([1.0] * same + [0.0] * (50 - same))
    assert rows[1].accuracy.mean == (other_answers == 3).mean()
    right = [(answers == 3).astype(float).tolist() for answers in (clean_answers, other_answers)]
    assert rows[1].change == paired_bootstrap(*right, seed=4)


def test_the_card_compares_numbers_within_the_tolerance():
    clean, blurred = (EvalResult((item("a", *boxed(answer)),), 1) for answer in (100, 95))
    results = {"clean": clean, "blur": blurred}
    consistency = [perception_card(results, tolerance=tolerance)[1].consistency.mean for tolerance in (0.0, 0.1)]
    assert consistency == [0.0, 1.0]


def test_the_card_refuses_what_cannot_be_compared():
    clean = EvalResult((item("a", *boxed(3)),), 1)
    with pytest.raises(ValueError, match="'clean'"):
        perception_card({"blank": clean})
    with pytest.raises(ValueError, match="different records"):
        perception_card({"clean": clean, "blank": EvalResult((item("b", *boxed(3)),), 1)})
    with pytest.raises(ValueError, match="with images"):
        perception_card({"clean": EvalResult((item("a", *boxed(3), images=0),), 1)})
    assert CARD_CONDITIONS[0] == "clean"
