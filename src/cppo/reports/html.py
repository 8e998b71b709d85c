"""The report of one run: curves, warnings, accuracies, responses over time, configuration; one static file."""

import os
import time
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cppo.errors import tell
from cppo.files import replace_text
from cppo.recipes import RunDirectory
from cppo.reports.charts import interval_chart
from cppo.reports.curves import run_figures
from cppo.reports.page import render_page
from cppo.reports.run_data import RunData, read_run
from cppo.reports.signs import metric_warnings, run_warnings
from cppo.reports.tokens import example, probed_items

SHOWN_EXAMPLES = 8
PROBE_COLUMNS = 4


def write_report(run_dir: str | os.PathLike[str], *, refresh: int | None = None) -> Path:
    """Write `report.html` into a run directory from its other files. Returns its path.

    Args:
        refresh: as for `render_report`.

    Raises:
        UserError: the folder is not a run directory.
    """
    files = RunDirectory(run_dir)
    replace_text(files.report, render_report(read_run(files.path), refresh=refresh))
    return files.report


def tell_warnings(run_dir: str | Path) -> None:
    """Print the report's warnings from a run's metrics. Raises UserError as `read_run`."""
    for text in metric_warnings(read_run(run_dir)):
        tell(f"warning: {text}")


def render_report(run: RunData, *, refresh: int | None = None) -> str:
    """The report as HTML. Everything from the run is escaped, since model text is not trusted.

    Args:
        refresh: seconds after which the page of a run in progress reloads.
    """
    examples = [example(sample) for sample in reversed(run.samples)]
    return render_page(
        "report.html.j2",
        name=run.name,
        config=run.config,
        summary=run.summary,
        refresh=None if run.summary else refresh,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        steps=run.last_step,
        last_step=max(run.last_step, int(run.progress.get("last_step", 0))),
        seconds=run.seconds,
        resumed_at=run.resumed_at,
        seconds_left=run.seconds_left,
        warnings=run_warnings(run),
        accuracies=_accuracies(run),
        charts=run_figures(run),
        probed=probed_items(run, PROBE_COLUMNS),
        examples=examples[:SHOWN_EXAMPLES],
        earlier=examples[SHOWN_EXAMPLES:],
        options=[(name, shown_option(value)) for name, value in run.config.items()],
        versions=run.versions,
    )


def _accuracies(run: RunData) -> Markup | None:
    labels = (("before", "before"), ("after", "after"), ("blank", "blank image"))
    rows = [
        (label, run.summary[key]["accuracy"], tuple(run.summary[key]["accuracy_ci95"]))
        for key, label in labels
        if key in run.summary
    ]
    return interval_chart(rows) if rows else None


def shown_option(value: Any) -> str:
    """A configuration value as text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown_option, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
