"""The report: curves, accuracies, example responses with their perception tokens, configuration; one static file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cppo.recipes import RunDirectory
from cppo.reports.charts import Series, interval_chart, line_chart
from cppo.reports.page import render_page
from cppo.reports.run_data import RunData, read_run

# title, what it shows, whether fractions, {metric: label}
CHARTS: tuple[tuple[str, str, bool, dict[str, str]], ...] = (
    ("Reward", "mean over the step's rollouts", False, {"reward": "training", "eval_reward": "evaluation"}),
    (
        "Accuracy and format",
        "share of the sampled responses",
        True,
        {
            "rewards/accuracy_reward/mean": "right answer",
            "rewards/format_reward/mean": "right format",
            "eval_rewards/accuracy_reward/mean": "right answer, evaluation",
        },
    ),
    ("Contrastive perception loss", "mean over perception tokens", False, {"perception/cpl": "CPL"}),
    (
        "Divergence from the views",
        "on perception tokens, nats",
        False,
        {"perception/d_preserving": "d+ (information kept)", "perception/d_removing": "d\u2212 (information removed)"},
    ),
    (
        "Entropy under the three views",
        "mean over the selected tokens, nats",
        False,
        {
            "perception/entropy": "image",
            "perception/entropy_preserving": "I+ (kept)",
            "perception/entropy_removing": "I\u2212 (removed)",
        },
    ),
    (
        "Selection and gate",
        "shares",
        True,
        {"perception/selected_fraction": "tokens selected", "perception/gated_fraction": "rollouts let through"},
    ),
    ("Policy entropy", "mean over all response tokens, nats", False, {"entropy": "entropy"}),
    ("KL to the reference", "nats", False, {"kl": "KL"}),
    ("Response length", "tokens", False, {"completions/mean_length": "mean"}),
    ("Gradient norm", "before clipping", False, {"grad_norm": "norm"}),
    ("Perception's share of the gradient", "of the two norms", True, {"perception/grad_norm_share": "share"}),
)
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
        charts=_charts(run),
        examples=examples[:SHOWN_EXAMPLES],
        earlier=examples[SHOWN_EXAMPLES:],
        options=[(name, _shown(value)) for name, value in run.config.items()],
    )


def _charts(run: RunData) -> list[dict[str, Any]]:
    charts = []
    for title, note, percent, metrics in CHARTS:
        series = [Series(label, points) for metric, label in metrics.items() if (points := run.series(metric))]
        if series:
            svg = line_chart(series, percent=percent, title=title)
            charts.append({"title": title, "note": note, "labels": [one.label for one in series], "svg": svg})
    return charts


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
