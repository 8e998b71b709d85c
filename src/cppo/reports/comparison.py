"""The page of a comparison: accuracy of every method with intervals, and differences from the control."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from cppo.reports.charts import interval_chart
from cppo.reports.page import render_page


def render_comparison(results: Mapping[str, Any]) -> str:
    """The results of `cppo compare` as one self-contained page."""
    return render_page("comparison.html.j2", results=results, study=results["study"], tasks=_tasks(results))


def _tasks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "accuracies": {condition: _ends(found, condition) for condition in results["study"]["conditions"]},
            "differences": {
                (condition, budget): chart
                for condition in results["study"]["conditions"]
                for budget in ("equal_steps", "equal_time")
                if (chart := _differences(found, condition, budget)) is not None
            },
        }
        for name, found in results["comparison"].items()
        if found["methods"]
    ]


def _ends(found: Mapping[str, Any], condition: str) -> Markup:
    ends = {label: method["curves"]["accuracy"][condition][-1] for label, method in found["methods"].items()}
    return interval_chart([_row(label, end) for label, end in ends.items()])


def _differences(found: Mapping[str, Any], condition: str, budget: str) -> Markup | None:
    rows = [
        _row(label, method["difference"][condition][budget])
        for label, method in found["methods"].items()
        if "difference" in method
    ]
    return interval_chart(rows) if rows else None


def _row(label: str, interval: Mapping[str, Any]) -> tuple[str, float, tuple[float, float]]:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    return label, mean, (mean, mean) if low is None else (low, high)
