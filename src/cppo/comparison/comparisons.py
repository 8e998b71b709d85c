"""Results of a study's cells: means over seeds, paired differences from the control, at equal steps and time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cppo.comparison.jobs import Job, write_json
from cppo.comparison.page import render
from cppo.comparison.results import collect
from cppo.comparison.study import Study
from cppo.comparison.tables import markdown
from cppo.errors import UserError
from cppo.evaluation.statistics import bootstrap_means, crossed_mean, t_interval
from cppo.files import replace_text, writing

Cells = dict[int, dict[str, Any]]
"""Cells of one method on one task by seed."""
Answers = Mapping[tuple[str, str, int], Mapping[str, str]]
"""The answers of a cell's last evaluation (task, label, seed), as texts of 0 and 1 by condition."""
RESAMPLES = 10_000
FILES = {"results": "results.json", "table": "summary.md", "report": "report.html"}
"""Files of `write_results`, by content."""


def write_results(study: Study, jobs: Sequence[Job], timing: Sequence[Job], command: Sequence[str]) -> dict[str, Any]:
    """Write `FILES` into the study's folder; returns the results."""
    results = compare(study, jobs, timing, command)
    with writing(study.output_dir):
        study.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(study.output_dir / FILES["results"], results)
    replace_text(study.output_dir / FILES["table"], markdown(results))
    replace_text(study.output_dir / FILES["report"], render(results))
    return results


def compare(
    study: Study, jobs: Sequence[Job], timing: Sequence[Job], command: Sequence[str], *, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Results of the finished cells, as the JSON values of `results.json`; `resamples` are those of `items_ci95`.

    Raises UserError if the cells of a task answered different numbers of items.
    """
    results = collect(study, jobs, timing, command)
    items = {
        (job.request["task"], job.request["label"], job.request["seed"]): result["evaluations"][-1]["correct"]
        for job in jobs
        if job.kind == "cell" and (result := job.result()) is not None
    }
    for task in study.tasks:
        counts = {len(marks) for key, answers in items.items() if key[0] == task for marks in answers.values()}
        if len(counts) > 1:
            raise UserError(
                f"{task}: its cells answered different numbers of items: {', '.join(map(str, sorted(counts)))}"
            )
    results["comparison"] = {task: compare_task(results, task, items, resamples) for task in study.tasks}
    results["over_tasks"] = over_tasks(results["comparison"], results["study"]["control"], items, resamples)
    return results


def compare_task(results: Mapping[str, Any], task: str, items: Answers, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Curves, and differences from the control, of every method of a task with a finished cell.

    Args:
        results: from `collect`.
        items: the answers of all cells.
        resamples: of the bootstrap over items.

    Returns:
        JSON values: `equal_time_seconds` is the training time of the fastest method, by each method's mean step.
            `methods` has for each label `seeds`, `curves` and, except for the control, `difference`; its intervals also
            hold the difference of each seed.
    """
    by_label: dict[str, Cells] = {}
    for cell in results["cells"]:
        if cell["task"] == task:
            by_label.setdefault(cell["method"], {})[cell["seed"]] = cell
    cost = {label: results["cost"][task][label]["compared_seconds"] for label in by_label}
    last = {label: next(iter(cells.values()))["steps"][-1] for label, cells in by_label.items()}
    seconds = min((last[label] * cost[label] for label in by_label), default=0.0)
    steps = {label: seconds / cost[label] for label in by_label}
    control = results["study"]["control"]
    methods: dict[str, Any] = {}
    for label, cells in by_label.items():
        methods[label] = {"seeds": sorted(cells), "curves": _curves(cells), "steps_at_equal_time": steps[label]}
        shared = sorted({*cells} & {*by_label.get(control, {})})
        if label != control and shared:
            pairs = {seed: (by_label[control][seed], cells[seed]) for seed in shared}
            answers = [(items[task, control, seed], items[task, label, seed]) for seed in shared]
            methods[label]["difference"] = {
                name: {
                    "equal_steps": {
                        **_paired(
                            {seed: b["accuracy"][name][-1] - a["accuracy"][name][-1] for seed, (a, b) in pairs.items()}
                        ),
                        **answer_intervals([[(a[name], b[name]) for a, b in answers]], resamples),
                    },
                    "equal_time": _paired(
                        {
                            seed: _at(b, name, steps[label]) - _at(a, name, steps[control])
                            for seed, (a, b) in pairs.items()
                        }
                    ),
                }
                for name in cells[shared[0]]["accuracy"]
            }
    return {"equal_time_seconds": seconds, "methods": methods}


def over_tasks(
    comparison: Mapping[str, Any], control: str, items: Answers, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Differences from the control averaged over a study's tasks, seed by seed, for the seeds that ran on all tasks.

    Args:
        comparison: `compare_task` of each task.
        items, resamples: as in `compare_task`.

    Returns:
        For each label, condition and budget ("equal_steps", "equal_time") as in `compare_task`; empty for one task.
    """
    by_task = [found["methods"] for found in comparison.values()]
    pooled: dict[str, Any] = {}
    for label in by_task[0] if len(by_task) > 1 else ():
        found = [methods.get(label, {}).get("difference") for methods in by_task]
        if None in found:
            continue
        for condition, budgets in found[0].items():
            seeds = [[*map(int, difference[condition]["equal_steps"]["by_seed"])] for difference in found]
            shared = [seed for seed in seeds[0] if all(seed in others for others in seeds)]
            if not shared:
                continue
            row: dict[str, Any] = {}
            for budget in budgets:
                by_seed = [difference[condition][budget]["by_seed"] for difference in found]
                row[budget] = _paired({seed: float(np.mean([one[str(seed)] for one in by_seed])) for seed in shared})
            row["equal_steps"] |= answer_intervals(
                [
                    [(items[task, control, seed][condition], items[task, label, seed][condition]) for seed in shared]
                    for task in comparison
                ],
                resamples,
            )
            pooled.setdefault(label, {})[condition] = row
    return pooled


def _curves(cells: Cells) -> dict[str, Any]:
    """Intervals over seeds at each evaluation: accuracy by condition, each number of the detectors by score."""
    rows = list(cells.values())
    curves: dict[str, Any] = {"steps": rows[0]["steps"]}
    curves["accuracy"] = {name: _over_seeds([cell["accuracy"][name] for cell in rows]) for name in rows[0]["accuracy"]}
    scores = [score for score in rows[0]["detectors"] if all(score in cell["detectors"] for cell in rows)]
    for figure in ("auprc", "precision", "recall"):
        curves[figure] = {score: _over_seeds([cell["detectors"][score][figure] for cell in rows]) for score in scores}
    return curves


def _over_seeds(rows: Sequence[Sequence[float | None]]) -> list[dict[str, Any] | None]:
    """The interval at each place of several equally long series; None if one has no value there."""
    known = ([value for value in values if value is not None] for values in zip(*rows, strict=True))
    return [asdict(t_interval(values)) if len(values) == len(rows) else None for values in known]


def _paired(differences: Mapping[int, float]) -> dict[str, Any]:
    """The interval of the seeds' differences, and the differences themselves."""
    return {**asdict(t_interval(list(differences.values()))), "by_seed": {str(s): d for s, d in differences.items()}}


def answer_intervals(tasks: Sequence[Sequence[tuple[str, str]]], resamples: int = RESAMPLES) -> dict[str, Any]:
    """95 % intervals of a difference that count the uncertainty over items.

    `items_ci95` is for these seeds and other items: a bootstrap of each item's mean over seeds. `crossed_ci95`, with
    its p value `crossed_p`, is for other seeds and other items (see `crossed_mean`). With several tasks, each task's
    items are drawn separately, and tasks count equally.

    Args:
        tasks: for each task and seed the answers before and after, as texts of 0 and 1.
        resamples: of the bootstrap.
    """
    rng = np.random.default_rng(0)
    total, differences = np.zeros(resamples), []
    for pairs in tasks:
        marks = np.array([[[mark == "1" for mark in side] for side in pair] for pair in pairs], dtype=np.float64)
        differences.append(marks[:, 1] - marks[:, 0])
        total += bootstrap_means(differences[-1].mean(axis=0), rng, resamples)
    low, high = np.quantile(total / len(tasks), [0.025, 0.975])
    crossed = crossed_mean(differences)
    return {
        "items_ci95": [float(low), float(high)],
        "crossed_ci95": None if crossed is None else [crossed.low, crossed.high],
        "crossed_p": None if crossed is None else crossed.p_value,
    }


def _at(cell: Mapping[str, Any], condition: str, step: float) -> float:
    """Accuracy at a step between evaluations, by linear interpolation."""
    return float(np.interp(step, cell["steps"], cell["accuracy"][condition]))
