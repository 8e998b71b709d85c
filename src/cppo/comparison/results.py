"""The measured part of `results.json`: a study's finished cells as one table of numbers over training."""

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from cppo.comparison.finished import DEFINITIONS
from cppo.comparison.jobs import Job, definitions_of
from cppo.comparison.study import Study, settings


def collect(study: Study, jobs: Sequence[Job], timing: Sequence[Job], command: Sequence[str]) -> dict[str, Any]:
    """All measurements so far, as JSON values; fractions of 1, seconds, MiB."""
    finished = [(job, result) for job in jobs if (result := job.result()) is not None]
    starts = {result["task"]: result for job, result in finished if job.kind == "start"}
    cells = [result for job, result in finished if job.kind == "cell"]
    alone = [result for job in timing if (result := job.result()) is not None]
    return {
        "command": " ".join(command),
        "versions": _distinct(result["versions"] for result in cells),
        "code": _distinct(result["code"] for result in cells),
        "machines": _distinct(result["machine"] for result in cells if "machine" in result),
        **_definitions(finished),
        "study": settings(study),
        "configuration": _configuration(cells),
        "unfinished": [job.name for job in jobs if job.result() is None],
        "items": _distinct(len(marks) for result in cells for marks in result["evaluations"][-1]["correct"].values()),
        "other_prompts": _other_prompts(cells, study.control),
        "cost": {task: _costs(study, task, cells, alone) for task in study.tasks},
        "cells": [_cell(result, starts.get(result["task"])) for result in cells],
    }


def accuracy(correct: str) -> float:
    """The fraction of right answers among items written as 0 and 1."""
    return correct.count("1") / len(correct)


def _cell(result: dict[str, Any], start: dict[str, Any] | None) -> dict[str, Any]:
    evaluations = [*(start["evaluations"] if start else ()), *result["evaluations"]]
    conditions = list(evaluations[0]["correct"])
    scores = list(evaluations[-1]["detectors"])
    figures = ("auprc", "precision", "recall", "base_rate")
    return {
        "method": result["label"],
        "seed": result["seed"],
        "task": result["task"],
        "steps": [one["step"] for one in evaluations],
        "accuracy": {name: [round(accuracy(one["correct"][name]), 5) for one in evaluations] for name in conditions},
        "format_rate": {name: [one["format_rate"][name] for one in evaluations] for name in conditions},
        "detectors": {
            score: {figure: [one["detectors"].get(score, {}).get(figure) for one in evaluations] for figure in figures}
            for score in scores
        },
        "training": result["training"],
        "warnings": result.get("warnings") or [],
        "step_seconds": median(result["step_seconds"]),
        "step_cpu_seconds": median(result["step_cpu_seconds"]),
        "peak_mib": result["peak_mib"],
        "seconds": result["seconds"],
        "evaluation_seconds": result["evaluation_seconds"],
        "prompts": result["prompts"],
        "device": result["device"],
        "threads": result["threads"],
    }


def _costs(
    study: Study, task: str, cells: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Time and memory of a step of each method: from the timing runs if every method has one, else from the cells.

    `step_seconds`, `step_cpu_seconds` and `peak_mib` are medians. `compared_seconds`, for the comparison at equal time,
    is the mean step: times the number of steps it is the training time. The first step of a short timing run is left
    out, since it warms up.
    """
    by_label = [_runs_by_label(study, task, results) for results in (alone, cells)]
    apart = set(by_label[0]) >= set(by_label[1])
    costs = {}
    for label, runs in by_label[0 if apart else 1].items():
        first = 1 if apart and all(len(run["step_seconds"]) > 1 for run in runs) else 0
        wall = [time for run in runs for time in run["step_seconds"][first:]]
        processor = [time for run in runs for time in run["step_cpu_seconds"][first:]]
        # Cells wait for each other, which processor time excludes; on a GPU processor time counts too little.
        compared = processor if not apart and runs[0]["device"] == "cpu" else wall
        costs[label] = {
            "step_seconds": median(wall),
            "step_cpu_seconds": median(processor),
            "compared_seconds": fmean(compared),
            "peak_mib": median(run["peak_mib"] for run in runs),
            "alone": apart,
            "runs": len(runs),
            "code": _distinct(run["code"] for run in runs),
        }
    return costs


def _runs_by_label(study: Study, task: str, results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A task's results by label, in the study's order, without empty labels."""
    found = {
        variant.label: [one for one in results if (one["task"], one["label"]) == (task, variant.label)]
        for variant in study.variants
    }
    return {label: runs for label, runs in found.items() if runs}


def _configuration(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The resolved options of each method of each task, without seed and folder, which differ by cell."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        options = {
            name: value
            for name, value in result["options"].items()
            if value is not None and name not in ("seed", "output_dir", "data")
        }
        found.setdefault(result["task"], {}).setdefault(result["label"], options)
    return found


def _other_prompts(results: Sequence[dict[str, Any]], control: str) -> list[str]:
    """The methods that saw other prompts than the control, or in another order, for the same task and seed."""
    seen = {(one["task"], one["seed"]): one["prompts"] for one in results if one["label"] == control}
    return _distinct(
        one["label"] for one in results if one["prompts"] != seen.get((one["task"], one["seed"]), one["prompts"])
    )


def _definitions(finished: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """An entry with the numbers of every part that the results have in a later definition than the first, if any."""
    numbers: dict[str, set[int]] = {}
    for job, result in finished:
        kept = definitions_of(result)
        for part in kept or job.identity[DEFINITIONS]:
            numbers.setdefault(part, set()).add(kept.get(part, 1))
    found = {part: sorted(those) for part, those in sorted(numbers.items()) if those != {1}}
    return {DEFINITIONS: found} if found else {}


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
