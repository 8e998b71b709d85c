"""The report: curves, accuracies, example responses with their perception tokens, configuration; one static file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cppo.recipes import RunDirectory
from cppo.reports.charts import interval_chart
from cppo.reports.curves import run_figures
from cppo.reports.page import render_page
from cppo.reports.run_data import RunData, read_run

SHOWN_EXAMPLES = 8
IMAGE_URIS = ("data:image/png;base64,", "data:image/jpeg;base64,")


@dataclass(frozen=True)
class Token:
    """One response token: `strength` in [0, 1] is its score relative to the response's best, 0 if not selected."""

    text: str
    selected: bool
    score: float
    strength: float


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run directory from its other files. Returns its path.

    Raises:
        UserError: the folder is not a run directory.
    """
    files = RunDirectory(run_dir)
    files.report.write_text(render_report(read_run(files.path)), encoding="utf-8")
    return files.report


def render_report(run: RunData) -> str:
    """The report as HTML. Everything that comes from the run is escaped: model text is not to be trusted."""
    examples = [_example(sample) for sample in reversed(run.samples)]
    return render_page(
        "report.html.j2",
        name=run.name,
        config=run.config,
        summary=run.summary,
        steps=int(max((row.get("step", 0) for row in run.metrics), default=0)),
        accuracies=_accuracies(run),
        charts=run_figures(run),
        examples=examples[:SHOWN_EXAMPLES],
        earlier=examples[SHOWN_EXAMPLES:],
        options=[(name, _shown(value)) for name, value in run.config.items()],
    )


def _accuracies(run: RunData) -> Markup | None:
    labels = (("before", "before"), ("after", "after"), ("blank", "blank image"))
    rows = [
        (label, run.summary[key]["accuracy"], tuple(run.summary[key]["accuracy_ci95"]))
        for key, label in labels
        if key in run.summary
    ]
    return interval_chart(rows) if rows else None


def _example(sample: dict[str, Any]) -> dict[str, Any]:
    scores = [score or 0.0 for score in sample["score"]]
    best = max(scores, default=0.0) or 1.0
    tokens = [
        Token(text, selected, score, max(0.0, score / best) if selected else 0.0)
        for text, selected, score in zip(sample["completion_tokens"], sample["perception"], scores, strict=True)
    ]
    images = [uri for uri in sample["images"] if isinstance(uri, str) and uri.startswith(IMAGE_URIS)]
    return {**sample, "images": images, "tokens": tokens}


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
