"""The finished cells of a study as one table of numbers over training: the part of `results.json` that is measured."""

import os
import platform
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from cppo.comparison.jobs import Job, write_json
from cppo.comparison.study import Study, settings

RESULTS = "results.json"


def collect(study: Study, jobs: Sequence[Job], timing: Sequence[Job], command: Sequence[str]) -> dict[str, Any]:
    """Everything measured so far, as JSON values; fractions of 1, seconds, MiB."""
    finished = [(job, result) for job in jobs if (result := job.result()) is not None]
    starts = {result["task"]: result for job, result in finished if job.kind == "start"}
    cells = [(job, result) for job, result in finished if job.kind == "cell"]
    alone = [result for job in timing if (result := job.result()) is not None]
    return {
        "command": " ".join(command),
        "versions": _distinct(result["versions"] for _, result in cells),
        "code": _distinct(result["code"] for _, result in cells),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "study": settings(study),
        "configuration": _configuration(result for _, result in cells),
        "unfinished": [job.name for job in jobs if job.result() is None],
        "same_prompts": _same_prompts([result for _, result in cells]),
        "cost": {task: _costs(study, task, [result for _, result in cells], alone) for task in study.tasks},
        "cells": [_cell(result, starts.get(result["task"])) for job, result in cells],
    }


def write_collected(study: Study, jobs: Sequence[Job], timing: Sequence[Job], command: Sequence[str]) -> None:
    """`results.json` of a study that is still running: without comparisons."""
    write_json(study.output_dir / RESULTS, collect(study, jobs, timing, command))


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
    """Time and memory of a step of each method: medians over the steps of its runs alone, else of its cells."""
    costs = {}
    for variant in study.variants:
        own = [result for result in alone if (result["task"], result["label"]) == (task, variant.label)]
        runs = own or [result for result in cells if (result["task"], result["label"]) == (task, variant.label)]
        if runs:
            wall = median(time for run in runs for time in run["step_seconds"])
            processor = median(time for run in runs for time in run["step_cpu_seconds"])
            costs[variant.label] = {
                "step_seconds": wall,
                "step_cpu_seconds": processor,
                # Cells wait for each other, which the processor's clock does not count; on a GPU it counts too little.
                "compared_seconds": processor if not own and runs[0]["device"] == "cpu" else wall,
                "peak_mib": median(run["peak_mib"] for run in runs),
                "alone": bool(own),
                "runs": len(runs),
            }
    return costs


def _configuration(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each method of each task trained with, resolved; seed and folder, which differ by cell, left out."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        options = {
            name: value
            for name, value in result["options"].items()
            if value is not None and name not in ("seed", "output_dir", "data")
        }
        found.setdefault(result["task"], {}).setdefault(result["label"], options)
    return found


def _same_prompts(results: Sequence[dict[str, Any]]) -> bool:
    """Whether all methods saw the same prompts in the same order, for each task and seed."""
    seen: dict[tuple[str, int], set[str]] = {}
    for result in results:
        seen.setdefault((result["task"], result["seed"]), set()).add(result["prompts"])
    return all(len(orders) == 1 for orders in seen.values())


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
