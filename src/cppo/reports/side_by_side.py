"""Several runs on one page: final numbers, differing options, and overlaid curves."""

from collections.abc import Sequence
from typing import Any

from cppo.reports.charts import legend
from cppo.reports.curves import comparison_figures
from cppo.reports.html import shown_option
from cppo.reports.page import render_page
from cppo.reports.run_data import RunData
from cppo.reports.signs import run_warnings

FINAL_SHARE = 10
"""Share of the last logged steps that is averaged for a run's final numbers."""
NOT_DIFFERENCES = ("output_dir",)
# label, metric, unit ("%": a fraction of 1)
ENDS = (
    ("reward, last tenth", "reward", ""),
    ("training accuracy, last tenth", "rewards/accuracy_reward/mean", "%"),
    ("CPL, last tenth", "perception/cpl", ""),
    ("tokens selected, last tenth", "perception/selected_fraction", "%"),
    ("response length, last tenth", "completions/mean_length", "tokens"),
    ("time of a step, last tenth", "step_time", "s"),
)


def render_runs(runs: Sequence[RunData]) -> str:
    """The page. At most `cppo.reports.charts.STYLES` runs."""
    names = distinct_names(runs)
    return render_page(
        "runs.html.j2",
        names=names,
        key=legend(names),
        rows=final_figures(runs),
        differences=differing_options(runs),
        warnings=[(name, run_warnings(run)) for name, run in zip(names, runs, strict=True)],
        figures=comparison_figures(runs, names),
        versions=_table([run.versions for run in runs]),
    )


def distinct_names(runs: Sequence[RunData]) -> list[str]:
    """The runs' folder names, numbered where two are the same."""
    names = [run.name for run in runs]
    return [
        f"{name} ({names[:place].count(name) + 1})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def final_figures(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Label and one text a run; a row that no run has is left out."""
    rows = [
        ("state", ["finished" if run.summary else "not finished" for run in runs]),
        ("steps", [f"{run.last_step:,}" for run in runs]),
        ("minutes", ["" if run.seconds is None else f"{run.seconds / 60:.1f}" for run in runs]),
    ]
    for key, label in (("before", "before"), ("after", "after"), ("blank", "after, blank image")):
        rows.append((f"held-out accuracy {label}", [_accuracy(run.summary.get(key)) for run in runs]))
    rows.append(("gain, points (paired)", [_gain(run.summary.get("gain")) for run in runs]))
    rows.append(("held-out accuracy, last probe", [_accuracy(run.probes[-1] if run.probes else None) for run in runs]))
    for label, metric, unit in ENDS:
        rows.append((label, [_end(run, metric, unit) for run in runs]))
    return [row for row in rows if any(row[1])]


def differing_options(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """The options with different values in the recipes, and each run's value; empty if a run lacks an option."""
    return _table([{**run.config, **dict.fromkeys(NOT_DIFFERENCES)} for run in runs], only_different=True)


def _table(columns: Sequence[Any], *, only_different: bool = False) -> list[tuple[str, list[str]]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [shown_option(column[name]) if name in column else "" for column in columns]) for name in names]
    return [row for row in rows if not only_different or len(set(row[1])) > 1]


def _accuracy(found: Any) -> str:
    if not found:
        return ""
    low, high = found["accuracy_ci95"]
    return f"{100 * found['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}], {found['n']:,} items"


def _gain(gain: Any) -> str:
    return f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]" if gain else ""


def _end(run: RunData, metric: str, unit: str) -> str:
    points = run.series(metric)
    if not points:
        return ""
    values = [value for _, value in points[-max(1, len(points) // FINAL_SHARE) :]]
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f} %" if unit == "%" else f"{mean:.4g} {unit}".rstrip()
