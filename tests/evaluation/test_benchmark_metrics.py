"""The figures of benchmarks, against sums written out in loops over rows, as the harnesses' own pages define them."""

import itertools
import random
from collections import defaultdict

import numpy as np
import pytest
from scipy.stats import binom

from cppo.evaluation import mean_interval
from cppo.evaluation.benchmarks.metrics import (
    ACCURACY,
    CONSISTENCY,
    FOUR_DIMENSIONS,
    WORST_CASE,
    YES_F1,
    Judged,
    compute,
    mean_of,
)


def judged(correct, response="", answer="", **facts):
    return Judged({name: str(value) for name, value in facts.items()}, answer, response, bool(correct))


def means(figures):
    return {name: rate.mean for name, rate in figures.rates.items()}


def test_accuracy_is_the_mean_of_all_responses():
    draw = random.Random(0)
    units = [[[judged(draw.random() < 0.3)] for _ in range(16)] for _ in range(50)]
    figures = compute(ACCURACY, units, seed=0)
    every = [row.correct for samples in units for rows in samples for row in rows]
    assert figures.headline.mean == pytest.approx(sum(every) / len(every), rel=1e-12)
    assert figures.headline.low < figures.headline.mean < figures.headline.high
    again = compute(ACCURACY, units, seed=0)
    assert np.array_equal(figures.headline_draws, again.headline_draws)


def test_the_interval_is_that_of_units():
    """Of 400 units whose five rows are alike it is the binomial's of 400, whose quantiles are known."""
    draw = random.Random(1)
    rights = [draw.random() < 0.4 for _ in range(400)]
    rate = compute(ACCURACY, [[[judged(right)] * 5] for right in rights], seed=0).headline
    known = binom(400, sum(rights) / 400)
    assert rate.mean == pytest.approx(sum(rights) / 400, rel=1e-12)
    assert known.ppf(0.02) <= 400 * rate.low <= known.ppf(0.03)
    assert known.ppf(0.97) <= 400 * rate.high <= known.ppf(0.98)


def test_one_sample_of_single_rows_has_wilsons_interval():
    rate = compute(ACCURACY, [[[judged(False)]] for _ in range(12)], seed=0).headline
    assert (rate.low, rate.high) == mean_interval([0.0] * 12)
    assert rate.high > 0.1
    with pytest.raises(ValueError, match="no units"):
        compute(ACCURACY, [], seed=0)


def test_the_worst_case_counts_seeds_with_every_variant_right():
    draw = random.Random(2)
    table = [[[draw.random() < 0.8 for _ in range(10)] for _ in range(4)] for _ in range(30)]  # seed, sample, variant
    figures = compute(WORST_CASE, [[[judged(right) for right in row] for row in samples] for samples in table], seed=0)
    average, worst = 0.0, 0.0
    for sample in range(4):
        average += sum(right for seed in table for right in seed[sample]) / 300 / 4
        worst += sum(1 for seed in table if seed[sample].count(True) == 10) / 30 / 4
    assert means(figures) == pytest.approx({"average": average, "worst case": worst}, rel=1e-12)


def four_dimensions_by_hand(problems):
    """The figures of one sample from {problem: {key: right}}."""
    kinds = defaultdict(int)
    step_rows, multi_rows = [], {2: [], 3: []}
    for keys in problems.values():
        steps = [right for key, right in keys.items() if key[-1].isdigit()]
        (multi,) = [right for key, right in keys.items() if key.endswith("multi")]
        step_rows += steps
        multi_rows[len(steps)].append(multi)
        if not multi and False in steps:
            kinds["IK"] += 1
        if not multi and False not in steps:
            kinds["IG"] += 1
        if multi and False not in steps:
            kinds["CMs"] += 1
        if multi and False in steps:
            kinds["RMs"] += 1
        if multi and True in steps:
            kinds["CMl"] += 1
        if multi and True not in steps:
            kinds["RMl"] += 1
    n = len(problems)
    return {
        "score (strict)": (n - 0.5 * kinds["IG"] - kinds["RMs"] - kinds["IK"]) / n,
        "score (loose)": (n - 0.5 * kinds["IG"] - kinds["RMl"] - kinds["IK"]) / n,
        "insufficient knowledge": kinds["IK"] / n,
        "inadequate generalization": kinds["IG"] / n,
        "complete mastery (strict)": kinds["CMs"] / n,
        "complete mastery (loose)": kinds["CMl"] / n,
        "rote memorization (strict)": kinds["RMs"] / (kinds["RMs"] + kinds["CMs"]),
        "rote memorization (loose)": kinds["RMl"] / (kinds["RMl"] + kinds["CMl"]),
        "one step": sum(step_rows) / len(step_rows),
        "two steps": sum(multi_rows[2]) / len(multi_rows[2]),
        "three steps": sum(multi_rows[3]) / len(multi_rows[3]),
    }


def test_the_four_dimensions_of_we_math():
    draw = random.Random(3)
    samples = []
    for _ in range(3):
        problems = {}
        for number, steps in enumerate(itertools.chain([2] * 36, [3] * 17)):
            keys = [f"{steps}steps_{step}" for step in (*range(1, steps + 1), "multi")]
            problems[number] = {key: draw.random() < 0.6 for key in keys}
        samples.append(problems)
    units = [
        [[judged(right, key=key) for key, right in problems[number].items()] for problems in samples]
        for number in samples[0]
    ]
    by_hand = [four_dimensions_by_hand(problems) for problems in samples]
    expected = {name: sum(one[name] for one in by_hand) / 3 for name in by_hand[0]}
    assert means(compute(FOUR_DIMENSIONS, units, seed=0)) == pytest.approx(expected, rel=1e-12)


def test_a_problem_with_a_row_missing_is_none_of_the_four():
    whole = [[judged(True, key="2steps_1"), judged(True, key="2steps_2"), judged(True, key="2steps_multi")]]
    part = [[judged(False, key="2steps_1"), judged(False, key="2steps_2")]]
    figures = means(compute(FOUR_DIMENSIONS, [whole, part], seed=0))
    assert figures["score (strict)"] == figures["complete mastery (strict)"] == 1
    assert figures["rote memorization (strict)"] == figures["three steps"] == 0
    assert figures["one step"] == 0.5


def test_f1_of_yes():
    draw = random.Random(4)
    rows = [(draw.choice(["yes", "no"]), draw.choice(["Yes.", "No", "perhaps"])) for _ in range(300)]
    units = [[[judged(said.lower().strip(".") == truth, said, truth)]] for truth, said in rows]
    hits = sum(1 for truth, said in rows if truth == "yes" and said == "Yes.")
    precision = hits / sum(1 for _, said in rows if said == "Yes.")
    recall = hits / sum(1 for truth, _ in rows if truth == "yes")
    right = sum((truth, said) in {("yes", "Yes."), ("no", "No")} for truth, said in rows)
    expected = {"F1": 2 * precision * recall / (precision + recall), "accuracy": right / 300}
    assert means(compute(YES_F1, units, seed=0)) == pytest.approx(expected, rel=1e-12)
    assert compute(YES_F1, [[[judged(True, "no", "no")]]], seed=0).headline.mean == 0


def test_figures_and_questions_of_hallusionbench():
    draw = random.Random(5)
    rows = [
        (group, figure, question, draw.random() < 0.7)
        for group in range(20)
        for figure in (1, 2)
        for question in range(3)
    ]
    units = [
        [[judged(right, figure=figure, question=question) for one, figure, question, right in rows if one == group]]
        for group in range(20)
    ]
    figures, questions = defaultdict(list), defaultdict(list)
    for group, figure, question, right in rows:
        figures[group, figure].append(right)
        questions[group, question].append(right)
    expected = {
        "aAcc": sum(right for *_, right in rows) / len(rows),
        "fAcc": sum(map(all, figures.values())) / len(figures),
        "qAcc": sum(map(all, questions.values())) / len(questions),
    }
    assert means(compute(CONSISTENCY, units, seed=0)) == pytest.approx(expected, rel=1e-12)


def test_the_mean_of_benchmarks_counts_each_once():
    draw = random.Random(6)
    parts = [
        compute(ACCURACY, [[[judged(draw.random() < p)]] for _ in range(n)], seed=n)
        for p, n in ((0.2, 400), (0.5, 100), (0.9, 900))
    ]
    mean = mean_of(parts)
    assert mean.mean == pytest.approx(sum(part.headline.mean for part in parts) / 3, rel=1e-12)
    drawn = sorted(sum(values) / 3 for values in zip(*(part.headline_draws for part in parts), strict=True))
    assert drawn[249] <= mean.low <= drawn[250]
    assert drawn[9749] <= mean.high <= drawn[9750]
