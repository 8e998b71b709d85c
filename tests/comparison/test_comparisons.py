"""What the cells show, against scipy's paired t-test, interpolation, analysis of variance and bootstrap by hand."""

import math
import random
from collections import Counter

import pytest
from browser import GOOD, LOOK, evaluate_in_page, needs_browser
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp, ttest_rel

from cppo.comparison.comparisons import answer_intervals, compare_task, over_tasks
from cppo.comparison.page import render
from cppo.comparison.tables import markdown, task_tables

LABELS = ["grpo", *(f"other{number}" for number in range(8))]
SEEDS = [0, 1, 2, 3]
ITEMS = 40
ATTACK = "<script>alert(1)</script>"


def make_results():
    rng = random.Random(1)
    items, cells = {}, []
    for label in LABELS:
        for seed in SEEDS if label != "other7" else SEEDS[:1]:
            marks = "".join(rng.choice("0111" if label != "grpo" else "01") for _ in range(ITEMS))
            items["digits", label, seed] = {"clean": marks}
            curve = [0.5, rng.random(), marks.count("1") / ITEMS]
            rule = {"precision": [0.3, None, 0.4], "recall": [0.5, 0.5, 0.625]}
            auprc = {"entropy_shift": {"auprc": [0.8, rng.random(), rng.random()], **rule}}
            auprc["js"] = {**auprc["entropy_shift"], "auprc": [None, 0.5, 0.5]}
            cells.append(
                {"method": label, "seed": seed, "task": "digits", "steps": [0, 40, 100], "accuracy": {"clean": curve}}
                | {"detectors": auprc}
            )
    step = {"step_seconds": 9.0, "step_cpu_seconds": 1.0, "peak_mib": 1000.0, "alone": False, "code": ["a"]}
    cost = {label: {**step, "compared_seconds": 1.0 if label == "grpo" else 2.0} for label in LABELS}
    study = {"name": ATTACK, "control": "grpo", "conditions": ["clean"], "eval_items": ITEMS}
    results = {"command": ATTACK, "study": study, "cells": cells, "cost": {"digits": cost}, "unfinished": []}
    results |= {"other_prompts": [], "items": [ITEMS], "code": ["a"]}
    results["comparison"] = {"digits": compare_task(results, "digits", items)}
    results["over_tasks"] = over_tasks(results["comparison"], "grpo", items)
    return results, items


@pytest.fixture(scope="module")
def made():
    return make_results()


def curves(results, label):
    return [cell["accuracy"]["clean"] for cell in results["cells"] if cell["method"] == label]


def test_differences_at_equal_steps_are_paired_t_intervals(made):
    results, _ = made
    control, other = ([curve[-1] for curve in curves(results, label)] for label in ("grpo", "other3"))
    found = results["comparison"]["digits"]["methods"]["other3"]["difference"]["clean"]["equal_steps"]
    expected = ttest_rel(other, control).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found["n"] == len(SEEDS)


def test_equal_time_is_when_the_fastest_method_ends(made):
    """grpo's 100 steps take 100 s, in which the others make 50 steps: a sixth of the way from step 40 to 100."""
    results, _ = made
    task = results["comparison"]["digits"]
    assert task["equal_time_seconds"] == 100.0
    assert task["methods"]["other3"]["steps_at_equal_time"] == 50.0
    at_50 = [curve[1] + (curve[2] - curve[1]) / 6 for curve in curves(results, "other3")]
    expected = ttest_rel(at_50, [curve[-1] for curve in curves(results, "grpo")])
    found = task["methods"]["other3"]["difference"]["clean"]["equal_time"]
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_intervals_over_seeds_and_items_are_the_analysis_of_variance(made):
    """The variance of the mean is (seeds' mean square + items' - residual) / number of answers, by loops."""
    results, items = made
    differences = [
        [
            int(after) - int(before)
            for before, after in zip(
                items["digits", "grpo", seed]["clean"], items["digits", "other3", seed]["clean"], strict=True
            )
        ]
        for seed in SEEDS
    ]
    total, n = sum(map(sum, differences)), len(SEEDS) * ITEMS
    of_seeds = sum(sum(row) ** 2 for row in differences) / ITEMS - total**2 / n
    of_items = sum(sum(column) ** 2 for column in zip(*differences, strict=True)) / len(SEEDS) - total**2 / n
    rest = sum(value**2 for row in differences for value in row) - total**2 / n - of_seeds - of_items
    mean_squares = [of_seeds / (len(SEEDS) - 1), of_items / (ITEMS - 1), rest / (len(SEEDS) - 1) / (ITEMS - 1)]
    together = max(mean_squares[0] + mean_squares[1] - mean_squares[2], *mean_squares[:2])
    freedom = together**2 / (mean_squares[0] ** 2 / (len(SEEDS) - 1) + mean_squares[1] ** 2 / (ITEMS - 1))
    expected = student_t.interval(0.95, freedom, total / n, math.sqrt(together / n))
    found = results["comparison"]["digits"]["methods"]["other3"]["difference"]["clean"]["equal_steps"]
    assert found["crossed_ci95"] == pytest.approx(expected, rel=1e-9)
    p_value = 2 * student_t.sf(abs(total / n) / math.sqrt(together / n), freedom)
    assert found["crossed_p"] == pytest.approx(p_value, rel=1e-9)


def test_the_bootstrap_draws_items_and_keeps_seeds(made):
    results, items = made
    sums = [
        sum(
            int(items["digits", "other3", seed]["clean"][item]) - int(items["digits", "grpo", seed]["clean"][item])
            for seed in SEEDS
        )
        for item in range(ITEMS)
    ]
    # The exact distribution of the total of ITEMS draws with replacement, by convolution.
    chances = {0: 1.0}
    for _ in range(ITEMS):
        following = Counter()
        for total, chance in chances.items():
            for value in sums:
                following[total + value] += chance / ITEMS
        chances = following
    interval = results["comparison"]["digits"]["methods"]["other3"]["difference"]["clean"]["equal_steps"]["items_ci95"]
    for end, share in zip(interval, (0.025, 0.975), strict=True):
        total = round(end * ITEMS * len(SEEDS), 6)
        noise = 5 * math.sqrt(share * (1 - share) / 10_000)  # five standard deviations of the resampling
        assert sum(chance for value, chance in chances.items() if value < total) <= share + noise
        assert sum(chance for value, chance in chances.items() if value <= total) >= share - noise


def test_curves_hold_t_intervals_over_seeds(made):
    results, _ = made
    found = results["comparison"]["digits"]["methods"]["grpo"]["curves"]
    values = [curve[1] for curve in curves(results, "grpo")]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["accuracy"]["clean"][1]["low"] == pytest.approx(expected.low, rel=1e-9)
    assert found["auprc"]["js"][0] is None
    assert found["auprc"]["entropy_shift"][0]["mean"] == pytest.approx(0.8)


def test_a_single_seed_has_no_interval(made):
    results, _ = made
    found = results["comparison"]["digits"]["methods"]["other7"]["difference"]["clean"]["equal_steps"]
    assert (found["n"], found["low"], found["high"], found["crossed_ci95"]) == (1, None, None, None)
    tables = list(task_tables(results, "digits"))
    row = next(row for row in tables[1].rows if row[0] == "other7")
    assert not {"[", "{"} & set(row[2])


def drawn_items(tasks, draws, rng):
    """Quantiles of the mean over tasks of resampled item means, one loop at a time."""
    means = []
    for _ in range(draws):
        total = 0.0
        for pairs in tasks:
            number = len(pairs[0][0])
            for item in rng.choices(range(number), k=number):
                total += sum(int(after[item]) - int(before[item]) for before, after in pairs) / len(pairs) / number
        means.append(total / len(tasks))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def test_items_of_several_tasks_are_drawn_apart():
    rng = random.Random(3)
    tasks = [
        [("".join(rng.choice("01") for _ in range(n)), "".join(rng.choice("0111") for _ in range(n))) for _ in range(2)]
        for n in (30, 60)
    ]
    assert answer_intervals(tasks)["items_ci95"] == pytest.approx(drawn_items(tasks, 4000, rng), abs=0.012)


def test_over_tasks_a_seed_counts_once():
    items = {
        (task, label, seed): {"clean": "11" if label == "cppo" else "10" if task == "chart" else "11"}
        for task in ("digits", "chart")
        for label in ("grpo", "cppo")
        for seed in range(4)
    }
    by_task = {"digits": {"0": 0.1, "1": 0.3, "2": -0.5}, "chart": {"2": 0.1, "0": 0.3, "3": 0.9}}

    def task(by_seed):
        difference = {"clean": {"equal_steps": {"by_seed": by_seed}}}
        return {"methods": {"grpo": {}, "cppo": {"difference": difference}}}

    comparison = {name: task(by_seed) for name, by_seed in by_task.items()}
    comparison["digits"]["methods"]["papo"] = comparison["digits"]["methods"]["cppo"]
    found = over_tasks(comparison, "grpo", items)
    assert list(found) == ["cppo"]
    pooled = found["cppo"]["clean"]["equal_steps"]
    assert pooled["by_seed"] == pytest.approx({"0": 0.2, "2": -0.2})
    interval = ttest_1samp([0.2, -0.2], 0).confidence_interval(0.95)
    assert (pooled["low"], pooled["high"]) == pytest.approx((interval.low, interval.high))
    # Of chart one of two items is gained: half of what two draws with replacement can have, 0 to 2 of 2.
    assert pooled["items_ci95"] == [0.0, 0.5]
    # On both seeds one of chart's two items is gained, of digits' none: only other items could show another mean.
    assert pooled["crossed_ci95"] == pytest.approx(student_t.interval(0.95, 1, 0.25, 0.25))
    assert over_tasks({"digits": comparison["digits"]}, "grpo", items) == {}


def test_page_and_table_show_every_method_and_trust_no_text(made):
    results, _ = made
    page = render(results)
    assert ATTACK not in page
    assert page.count("&lt;script&gt;") >= 2
    # nine methods are more than a chart has line styles, so the control stands in two charts of each kind
    assert page.count('aria-label="clean, at equal steps"') == 1 + 2
    text = markdown(results)
    assert "| grpo | 0.400 [0.400, 0.400] | 0.625 [0.625, 0.625] |" in text
    for label in LABELS:
        assert f"| {label} | " in text


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(made, width, tmp_path):
    results, _ = made
    (tmp_path / "page.html").write_text(render(results), encoding="utf-8")
    assert evaluate_in_page(tmp_path / "page.html", LOOK, width=width, profile=tmp_path / "profile") == GOOD
