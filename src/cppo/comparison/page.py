"""The page of a study: accuracy over steps and time with intervals, differences from the control, tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cppo.comparison.tables import cell_warnings, notes, pooled_table, task_tables
from cppo.reports.charts import STYLES, Series, figure, interval_chart
from cppo.reports.page import render_page


def render(results: Mapping[str, Any]) -> str:
    """The results as one self-contained page."""
    tasks = [
        {
            "name": name,
            "curves": list(_curves(results, name)),
            "differences": list(_differences(results, name)),
            "tables": list(task_tables(results, name)),
        }
        for name, found in results["comparison"].items()
        if found["methods"]
    ]
    return render_page(
        "comparison.html.j2",
        results=results,
        notes=notes(results),
        warnings=cell_warnings(results),
        tasks=tasks,
        pooled=pooled_table(results),
    )


def _curves(results: Mapping[str, Any], task: str) -> Iterator[Markup]:
    methods = results["comparison"][task]["methods"]
    seconds = {label: cost["compared_seconds"] for label, cost in results["cost"][task].items()}
    for labels in _groups(list(methods), results["study"]["control"]):
        shown = {label: methods[label]["curves"] for label in labels}
        for condition in results["study"]["conditions"]:
            for title, x_title, step_length in (
                ("at equal steps", "optimizer step", dict.fromkeys(labels, 1.0)),
                ("at equal time", "training time (s)", seconds),
            ):
                series = [
                    _series(label, curve["steps"], curve["accuracy"][condition], step_length[label])
                    for label, curve in shown.items()
                ]
                yield figure(
                    f"{condition}, {title}", series, x_title=x_title, y_title="accuracy", percent=True, smooth=False
                )
        for score in next(iter(shown.values()))["auprc"]:
            series = [
                _series(label, curve["steps"], curve["auprc"][score])
                for label, curve in shown.items()
                if score in curve["auprc"]
            ]
            yield figure(f"detector {score}", series, y_title="AUPRC", smooth=False)


def _series(
    label: str, steps: Sequence[int], row: Sequence[Mapping[str, Any] | None], step_length: float = 1.0
) -> Series:
    """Means over seeds, with t intervals as a band if there are several seeds."""
    known = [(step * step_length, one) for step, one in zip(steps, row, strict=True) if one is not None]
    band = [(x, one["low"], one["high"]) for x, one in known if one["low"] is not None]
    return Series(label, [(x, one["mean"]) for x, one in known], band)


def _groups(labels: list[str], control: str) -> list[list[str]]:
    """Methods in groups for charts: as many as there are line styles, with the control in each."""
    first = [label for label in labels if label == control]
    others = [label for label in labels if label != control]
    width = STYLES - len(first)
    return [first + others[start : start + width] for start in range(0, max(len(others), 1), width)]


def _differences(results: Mapping[str, Any], task: str) -> Iterator[dict[str, Any]]:
    methods = results["comparison"][task]["methods"]
    compared = {label: method["difference"] for label, method in methods.items() if "difference" in method}
    for condition in results["study"]["conditions"] if compared else ():
        for budget in ("equal_steps", "equal_time"):
            title = f"{condition}, at {budget.replace('_', ' ')}"
            rows = [(results["study"]["control"], 0.0, (0.0, 0.0))]
            for label, difference in compared.items():
                one = difference[condition][budget]
                low, high = (one["mean"], one["mean"]) if one["low"] is None else (one["low"], one["high"])
                rows.append((label, 100 * one["mean"], (100 * low, 100 * high)))
            chart = interval_chart(rows, title=title, x_title="difference (points), 95 % interval", percent=False)
            yield {"title": title, "chart": chart}
