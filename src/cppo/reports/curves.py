"""Which metrics of a run are drawn, and how: for one run, and for several side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cppo.reports.charts import STYLES, Series, figure
from cppo.reports.run_data import RunData


@dataclass(frozen=True)
class Chart:
    """One chart: `metrics` maps a metric's name to its label; fractions of 1 if `percent`."""

    title: str
    note: str
    y_title: str
    metrics: dict[str, str]
    percent: bool = False


CHARTS = (
    Chart("Reward", "mean over the step's rollouts", "reward", {"reward": "training", "eval_reward": "evaluation"}),
    Chart(
        "Accuracy and format",
        "share of the sampled responses",
        "share",
        {
            "rewards/accuracy_reward/mean": "right answer",
            "rewards/format_reward/mean": "right format",
            "eval_rewards/accuracy_reward/mean": "right answer, evaluation",
        },
        percent=True,
    ),
    Chart(
        "Perception loss (CPL)",
        "mean over the selected tokens, before its weight. CPPO's is softplus((d+ \u2212 d\u2212) / "
        "temperature), without unit or upper bound: 0.693 if I+ and I\u2212 change the answers equally, "
        "lower if I\u2212 changes them more",
        "CPL",
        {"perception/cpl": "CPL"},
    ),
    Chart(
        "Dependency on the image",
        "mean score of a rollout's tokens, by which its advantages are weighted",
        "score",
        {"perception/dependency": "dependency"},
    ),
    Chart(
        "Divergence from the views",
        "mean over the selected tokens",
        "divergence (nats)",
        {"perception/d_preserving": "d+ (information kept)", "perception/d_removing": "d\u2212 (information removed)"},
    ),
    Chart(
        "Entropy under the three views",
        "mean over the selected tokens",
        "entropy (nats)",
        {
            "perception/entropy": "image",
            "perception/entropy_preserving": "I+ (kept)",
            "perception/entropy_removing": "I\u2212 (removed)",
        },
    ),
    Chart(
        "Selection and gate",
        "share of tokens that are perception tokens, share of rollouts that pass the gate",
        "share",
        {"perception/selected_fraction": "tokens selected", "perception/gated_fraction": "rollouts that pass the gate"},
        percent=True,
    ),
    Chart("Policy entropy", "mean over all response tokens", "entropy (nats)", {"entropy": "entropy"}),
    Chart("KL to the reference", "mean over all response tokens", "KL (nats)", {"kl": "KL"}),
    Chart(
        "Response length",
        "of the step's rollouts",
        "length (tokens)",
        {"completions/mean_length": "mean", "completions/max_length": "longest"},
    ),
    Chart(
        "Groups and lengths",
        "groups with equal rewards teach nothing; responses at the limit are cut off",
        "share",
        {"frac_reward_zero_std": "groups of equal rewards", "completions/clipped_ratio": "responses at the limit"},
        percent=True,
    ),
    Chart("Loss", "as the optimizer sees it", "loss", {"loss": "training", "eval_loss": "evaluation"}),
    Chart("Token accuracy", "share of the reference's tokens", "share", {"mean_token_accuracy": "training"}, True),
    Chart("Gradient norm", "before clipping", "norm", {"grad_norm": "norm"}),
    Chart(
        "Perception's share of the gradient",
        "of the two norms",
        "share",
        {"perception/grad_norm_share": "share"},
        percent=True,
    ),
    Chart(
        "Time of a step",
        "by phase; scoring is the forward passes, update is the rest",
        "time (s)",
        {f"time/{phase}": phase for phase in ("rollout", "reward", "views", "scoring", "update")},
    ),
    Chart(
        "Memory",
        "peaks since the process began",
        "memory (MiB)",
        {"memory/peak_rss_mib": "resident", "memory/peak_cuda_mib": "GPU, allocated"},
    ),
)


def reward_label(metric: str) -> str:
    """The name of the reward with this mean as its metric, without `_reward`; empty for any other metric."""
    parts = metric.removeprefix("eval_").split("/")
    return parts[1].removesuffix("_reward") if parts[0] == "rewards" and parts[2:] == ["mean"] else ""


def charts_of(runs: Sequence[RunData]) -> list[Chart]:
    """`CHARTS`, with the runs' other rewards after the standard ones."""
    shown = {metric for chart in CHARTS for metric in chart.metrics}
    logged = dict.fromkeys(metric for run in runs for row in run.metrics for metric in row if reward_label(metric))
    others = [metric for metric in logged if metric not in shown]
    labels = {name: reward_label(name) + ", evaluation" * name.startswith("eval_") for name in others}
    charts = list(CHARTS)
    for first in reversed(range(0, len(others), STYLES)):
        part = {name: labels[name] for name in others[first : first + STYLES]}
        charts.insert(2, Chart("Other rewards", "mean over the step's rollouts, before its weight", "reward", part))
    return charts


def run_figures(run: RunData) -> list[Markup]:
    """Charts of a run's logged metrics."""
    figures = [held_out_figure([run])] if run.probes else []
    for chart in charts_of([run]):
        series = [Series(label, points) for metric, label in chart.metrics.items() if (points := run.series(metric))]
        if series:
            figures.append(figure(chart.title, series, note=chart.note, y_title=chart.y_title, percent=chart.percent))
    return figures


def comparison_figures(runs: Sequence[RunData], names: Sequence[str]) -> list[Markup]:
    """One chart a metric, one line per run; at most `STYLES` runs, the number of distinct line styles.

    Args:
        names: of the runs, all different.
    """
    assert len(runs) <= STYLES
    figures = [held_out_figure(runs, names)] if any(run.probes for run in runs) else []
    for chart in charts_of(runs):
        for metric, label in chart.metrics.items():
            found = [(name, run.series(metric)) for run, name in zip(runs, names, strict=True)]
            # A run without the metric keeps its place, and so its style.
            if any(points for _, points in found):
                title = chart.title if len(chart.metrics) == 1 else f"{chart.title}: {label}"
                series = [Series(name, points) for name, points in found]
                figures.append(figure(title, series, note=chart.note, y_title=chart.y_title, percent=chart.percent))
    return figures


def held_out_figure(runs: Sequence[RunData], names: Sequence[str] = ("greedy",)) -> Markup:
    """Accuracy on the same held-out items over training, with its 95 % interval."""
    series = []
    for run, name in zip(runs, names, strict=True):
        rows = [row for row in run.probes if isinstance(row.get("accuracy"), float)]
        band = [(row["step"], *row["accuracy_ci95"]) for row in rows] if len(runs) == 1 else []
        series.append(Series(name, [(row["step"], row["accuracy"]) for row in rows], band))
    items = max(row["n"] for run in runs for row in run.probes)
    note = f"the same {items:,} items each time, greedy" + ("; band: 95\u00a0% interval" if len(runs) == 1 else "")
    return figure("Held-out accuracy", series, note=note, y_title="accuracy", percent=True, smooth=False)
