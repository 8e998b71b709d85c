"""Warnings from a run's metrics. Each is a pure function of the run, and names its numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from cppo.reports.charts import Point
from cppo.reports.run_data import RunData

LEAST_STEPS = 10
"""Number of logged steps below which trends mean nothing."""
FALL = 0.3
"""A relative fall below the best running mean of reward or accuracy is a collapse, unless chance explains it."""
CHANCE = 4.5
"""Standard errors of a difference of means that count as chance: the best of many windows is high by chance alone."""
LOW_ENTROPY = 0.005
"""Policy entropy in nats below which nearly all rollouts of a prompt are the same."""
FAR_OUT = 10.0
"""Above this median `perception/cpl`, I+ changes the answers far more than I-; it is ln 2 without contrast."""
PUBLISHED_TEMPERATURE = 0.1
EQUAL_GROUPS, AT_LIMIT, NOTHING_SELECTED = 0.75, 0.1, 0.25


def run_warnings(run: RunData) -> list[str]:
    """What the run reported when it came (fallbacks, form), then `metric_warnings`; empty if there are none."""
    told = [f"{line[:1].upper()}{line[1:]}." for line in run.fallbacks]
    form = without_form(run)
    return [*told, *([form] if form else []), *metric_warnings(run)]


def metric_warnings(run: RunData) -> list[str]:
    """Warnings from the metrics, one or two sentences each; empty if there are none."""
    signs: tuple[Callable[[RunData], str | None], ...] = (
        not_finite,
        collapse,
        low_entropy,
        equal_groups,
        nothing_selected,
        high_contrast,
        lengths_at_limit,
    )
    return [text for sign in signs if (text := sign(run)) is not None]


def not_finite(run: RunData) -> str | None:
    """Steps with a NaN or infinite loss or gradient, which the metrics hold as null."""
    steps = [
        row.get("step") for row in run.metrics if any(row.get(name, 0.0) is None for name in ("loss", "grad_norm"))
    ]
    if not steps:
        return None
    return (
        f"Loss or gradient was not finite in {len(steps)} step(s), first in step {steps[0]}: lower learning_rate or "
        "max_grad_norm, or train in float32 or bfloat16."
    )


def without_form(run: RunData) -> str | None:
    """The warning of the first steps about the form of the responses, as long as none has it."""
    told = run.progress.get("form_warning")
    if not told:
        return None
    points = _latest(run.series(f"rewards/{told.split()[0]}_reward/mean"))
    return None if any(value for _, value in points) else f"{told[0].upper()}{told[1:]}."


def collapse(run: RunData) -> str | None:
    """Accuracy, or without it the reward, is far below its own best."""
    for metric, name in (("rewards/accuracy_reward/mean", "accuracy"), ("reward", "reward")):
        points = run.series(metric)
        if len(points) < LEAST_STEPS:
            continue
        size = max(LEAST_STEPS // 2, len(points) // 10)
        windows = [points[end - size : end] for end in range(size, len(points) + 1)]
        best, last = max(windows, key=_mean), windows[-1]
        fall = _mean(best) - _mean(last)
        error = _noise(points) * math.sqrt(2 / size)
        if fall > FALL * abs(_mean(best)) and fall > CHANCE * error:
            return (
                f"Collapse: the training {name} fell from {_mean(best):.3f} around step {best[size // 2][0]:g} to "
                f"{_mean(last):.3f} (means of {size} steps). Take an earlier checkpoint, lower learning_rate or "
                "perception_weight, or raise beta."
            )
        return None
    return None


def low_entropy(run: RunData) -> str | None:
    """The policy samples nearly always the same response."""
    points = run.series("entropy")
    if len(points) < LEAST_STEPS or (value := _mean(_latest(points))) >= LOW_ENTROPY:
        return None
    first = _mean(points[: len(_latest(points))])
    return (
        f"Collapse: the policy's entropy is {value:.4f} nats ({first:.4f} at the start): the rollouts of a group are "
        "nearly the same. Raise temperature or beta, or lower learning_rate."
    )


def equal_groups(run: RunData) -> str | None:
    """Most groups have equal rewards, and so no advantage."""
    points = _latest(run.series("frac_reward_zero_std"))
    if not points or (share := _mean(points)) <= EQUAL_GROUPS:
        return None
    return (
        f"{share:.0%} of the groups in the latest {len(points)} logged steps have equal rewards and teach "
        "nothing: the data is too easy or too hard for the model. Mix other rows, or raise num_generations "
        "or temperature."
    )


def nothing_selected(run: RunData) -> str | None:
    """Steps in which no token was selected for the perception loss."""
    gated = run.series("perception/gated_fraction")
    if not gated:
        return None
    selected = dict(run.series("perception/selected_fraction"))
    idle = [step for step, _ in gated if selected.get(step, 0.0) == 0]
    if len(idle) <= NOTHING_SELECTED * len(gated):
        return None
    closed = sum(share == 0 for _, share in gated)
    return (
        f"In {len(idle)} of {len(gated)} logged steps no perception token was selected ({closed} of them let "
        "no rollout through the gate): the perception loss did nothing there. Check the views (`cppo "
        "views`), or choose another perception_gate or perception_score."
    )


def lengths_at_limit(run: RunData) -> str | None:
    """Responses reach the limit of their length and are cut off."""
    points = _latest(run.series("completions/clipped_ratio"))
    if not points or (share := _mean(points)) <= AT_LIMIT:
        return None
    limit = run.config.get("max_completion_length")
    now = "" if limit is None else f" (now {limit})"
    return (
        f"{share:.0%} of the responses in the latest {len(points)} logged steps reach the limit of their "
        f"length and are cut off: raise max_completion_length{now}, or reward shorter responses."
    )


def equal_rewards(rows: Sequence[Mapping[str, Any]], steps: int) -> str | None:
    """The warning for rewards that never differed within a group, or that no rollout earned.

    Args:
        rows: the metrics of the first logged steps.
        steps: number of optimizer steps in them.
    """
    means = [name for name in rows[0] if name.startswith("rewards/") and name.endswith("/mean")]
    never = [
        name.split("/")[1].removesuffix("_reward")
        for name in means
        if all(row.get(name) == 0 and row.get(name.replace("/mean", "/std")) == 0 for row in rows)
    ]
    flat = all(row.get("frac_reward_zero_std") == 1.0 for row in rows)
    if not (never or flat):
        return None
    found = [f"{name} 0 for every rollout" for name in never]
    found += ["equal rewards in every group, so that the rewards teach nothing"] if flat else []
    if never:
        remedy = (
            "the model cannot do this task yet (fine-tune it first with `cppo sft`, or take a stronger model or easier "
            "rows), or right answers are not recognized (read the responses in report.html, or with `cppo eval "
            "--responses FILE`)"
        )
    else:
        remedy = "mix easier or harder rows, or raise num_generations or temperature"
    return f"in the first {steps} steps: {'; '.join(found)}: {remedy}"


def far_out(rows: Sequence[Mapping[str, Any]], temperature: float) -> str | None:
    """The warning for a contrast `softplus((d+ - d-) / temperature)` far above ln 2, its value without contrast."""
    logged = [row.get("perception/cpl") for row in rows]
    values = [value for value in logged if value is not None and math.isfinite(value)]
    if not values or (cpl := median(values)) <= FAR_OUT:
        return None
    return (
        f"the median CPL of the latest steps is {cpl:.1f} (0.693 if I+ and I- change the answers equally, "
        f"lower is better): I+ changes the selected tokens by about {cpl * temperature:.1f} nats more than "
        f"I-, at perception_temperature {temperature:g}. Check both with `cppo views --data DATA --model "
        "MODEL`, and use a milder I+ (preserving_views and its strengths) or a stronger I-"
    )


def high_contrast(run: RunData) -> str | None:
    """The latest CPL is very high: I+ changes the answers far more than I-."""
    latest = run.metrics[-max(LEAST_STEPS // 2, len(run.metrics) // 10) :]
    if run.config.get("perception_sink", "contrast") != "contrast":
        return None
    sign = far_out(latest, float(run.config.get("perception_temperature", PUBLISHED_TEMPERATURE)))
    return sign and f"{sign[0].upper()}{sign[1:]}."


def _latest(points: Sequence[Point]) -> Sequence[Point]:
    """The last tenth, but at least five."""
    return points[-max(LEAST_STEPS // 2, len(points) // 10) :]


def _mean(points: Sequence[Point]) -> float:
    return math.fsum(value for _, value in points) / len(points)


def _noise(points: Sequence[Point]) -> float:
    """Standard deviation of a value around its trend, from the differences of neighbours."""
    return math.sqrt(math.fsum((after - before) ** 2 for (_, before), (_, after) in pairwise(points)) / 2 / len(points))
